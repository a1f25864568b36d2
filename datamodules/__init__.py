"""Corpora, tokenizers, the token cache and packing: everything between text on disk or the hub and a batch.

Importing this package is light; the data modules (and Lightning with them) load when first asked for.
"""

from typing import TYPE_CHECKING, Any

from t6_lightning.common.errors import BadInput

if TYPE_CHECKING:
    from datamodules.corpora import C4, FineWebEdu, Mixture, Pile, Pixels, PythonDocs, TextFiles

DATA_MODULES = ("C4", "FineWebEdu", "Mixture", "Pile", "Pixels", "PythonDocs", "TextFiles")

__all__ = ["C4", "BadInput", "FineWebEdu", "Mixture", "Pile", "Pixels", "PythonDocs", "TextFiles"]


def __getattr__(name: str) -> Any:
    if name in DATA_MODULES:
        from datamodules import corpora

        return getattr(corpora, name)
    raise AttributeError(f"module 'datamodules' has no attribute {name!r}")
