"""The corpora to choose from, as Lightning data modules."""

from pathlib import Path
from typing import Any

from datamodules.documents import Source
from datamodules.indexed import IndexedData
from datamodules.limits import MAX_DOCUMENT_LENGTH
from datamodules.mixture import Mixture
from datamodules.pixels import Pixels
from datamodules.python_docs import VAL_FRACTION, standard_library
from datamodules.streamed import C4, FineWebEdu, Pile
from datamodules.text_files import file_source, find_files
from datamodules.text_reading import TxtDocuments
from t6_lightning.common.errors import BadInput

__all__ = ["C4", "FineWebEdu", "Mixture", "Pile", "Pixels", "PythonDocs", "TextFiles"]


class PythonDocs(IndexedData):
    """Docstrings and documentation topics (domain "prose") and source (domain "code") of Python's standard
    library.

    Real text on every machine, nothing to download, the same for everyone with the same Python version.
    """

    val_fraction = VAL_FRACTION

    def sources(self) -> list[Source]:
        return [standard_library()]


class TextFiles(IndexedData):
    """Local .jsonl, .json, .parquet and .txt files, the text formats also with .gz, .zst, .xz or .bz2.

    Args:
        files: Paths, globs, or folders (searched through, linked ones too); one needs no list.
        exclude: Glob or globs on file names to leave out of `files`.
        val_files: Further validation domains: name -> path(s), glob(s) or folder(s). A training document that
            occurs there is left out of training. These domains have no test documents.
        val_fraction: Share of the documents of `files` held out by a hash of their text: half of it to validate
            on, half of it to test on.
        text_field: Column that holds the text; a dotted name reaches into an object.
        domain_field: Column whose value labels a document's validation domain; null: all are "text".
        txt_documents: How a .txt becomes documents: the whole file, each line, or each paragraph (blank line
            between). Line ends inside a document stay as they are, CR and CR LF too.
        max_document_length: UTF-8 bytes of a document, or of a JSON row; a longer one is refused.
    """

    def __init__(
        self,
        files: list[str] | str,
        exclude: list[str] | str | None = None,
        val_files: dict[str, list[str] | str] | None = None,
        val_fraction: float = 0.01,
        text_field: str = "text",
        domain_field: str | None = None,
        txt_documents: TxtDocuments = "file",
        max_document_length: int = MAX_DOCUMENT_LENGTH,
        **common: Any,
    ):
        super().__init__(**common)
        if not 0 <= val_fraction < 1:
            raise BadInput(
                f"val_fraction: {val_fraction} is not allowed; allowed: 0 or more and less than 1."
            )
        if txt_documents not in ("file", "line", "paragraph"):
            raise BadInput(
                f"txt_documents: {txt_documents!r} is not allowed; allowed: file, line, paragraph."
            )
        if max_document_length < 1:
            raise BadInput(f"max_document_length: {max_document_length} is not allowed; allowed: 1 or more.")
        self.max_document_length = max_document_length
        self.files, self.val_files = files, val_files or {}
        self.exclude = [exclude] if isinstance(exclude, str) else exclude or []
        self.val_fraction = val_fraction
        self.text_field, self.domain_field = text_field, domain_field
        self.txt_documents: TxtDocuments = txt_documents

    def check_sources(self) -> None:
        named = {"files": find_files(self.files, self.exclude)}
        named |= {f"val_files.{name}": find_files(given) for name, given in self.val_files.items()}
        for field, paths in named.items():
            for path in paths:
                try:
                    with path.open("rb") as file:
                        is_empty = not file.read(1)
                except OSError as error:
                    raise BadInput(f"{field}: {path} cannot be read: {error.strerror}.") from error
                if is_empty:
                    raise BadInput(f"{field}: {path} is empty.")

    def sources(self) -> list[Source]:
        return [
            self._source(path, self.domain_field, "text") for path in find_files(self.files, self.exclude)
        ]

    def validation_sources(self) -> dict[str, list[Source]]:
        return {
            name: [self._source(path, None, name) for path in find_files(patterns, field=f"val_files.{name}")]
            for name, patterns in self.val_files.items()
        }

    def _source(self, path: Path, domain_field: str | None, domain: str) -> Source:
        return file_source(
            path, self.text_field, domain_field, domain, self.txt_documents, self.max_document_length
        )
