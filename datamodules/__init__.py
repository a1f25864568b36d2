"""Corpora, tokenizers, the token cache and packing: everything between text on disk and a batch.

Importing this package is light; the data modules (and Lightning with them) load when first asked for.
"""

from typing import TYPE_CHECKING, Any

from datamodules.errors import BadData

if TYPE_CHECKING:
    from datamodules.corpora import PythonDocs, TextFiles

__all__ = ["BadData", "PythonDocs", "TextFiles"]


def __getattr__(name: str) -> Any:
    if name in ("PythonDocs", "TextFiles"):
        from datamodules import corpora

        return getattr(corpora, name)
    raise AttributeError(f"module 'datamodules' has no attribute {name!r}")
