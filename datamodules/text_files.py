"""Local .jsonl, .json, .parquet and .txt files, each row as it is written; the text formats plain or compressed."""

import glob
import os
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from datamodules.decompression import COMPRESSIONS
from datamodules.documents import Document, Source, hash64, is_unicode, utf8_bytes
from datamodules.folders import files_below
from datamodules.json_rows import json_rows, reach
from datamodules.limits import MAX_DOCUMENT_LENGTH
from datamodules.parquet_rows import parquet_rows
from datamodules.system_faults import named
from datamodules.text_reading import TxtDocuments, too_long, txt_documents
from t6_lightning.common.errors import BadInput

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
SUFFIXES = (
    f"{', '.join(FORMATS)}, the text formats also with {', '.join(COMPRESSIONS[:-1])} or {COMPRESSIONS[-1]}"
)

ROWS_THAT_TELL = 10_000
"""A column that occurs in none of so many first rows of a file is refused there and then."""

TEXT_RECIPE = 2
"""Part of the identity of .txt files: raise it whenever the same bytes would give other documents."""


def find_files(
    patterns: str | Iterable[str], exclude: Iterable[str] = (), field: str = "files"
) -> list[Path]:
    """The files that paths, globs and folders (searched through, linked ones too) name: absolute, sorted, each once.

    `exclude`: globs on file names. Files of other suffixes are passed over in folders and globs, but refused
    when named. Raises BadInput, naming `field`.
    """
    patterns = [patterns] if isinstance(patterns, (str, os.PathLike)) else list(patterns)
    if not patterns:
        raise BadInput(f"{field}: the list is empty; name at least one file, folder or glob.")
    found: set[Path] = set()
    for pattern in patterns:
        if not str(pattern):
            raise BadInput(f"{field}: '' is no path; name a file, a folder or a glob.")
        path = Path(pattern).expanduser()
        with named(f"{field}: {str(pattern)!r}"):
            if path.is_file():
                builder_of(path)
                matches = [path]
            elif path.is_dir():
                matches = [inside for inside in files_below(path) if _readable(inside)]
            else:
                matches = [
                    Path(name) for name in glob.glob(str(path), recursive=True) if _readable(Path(name))
                ]
        if not matches:
            missing = "matches no file" if glob.has_magic(str(pattern)) else "does not exist"
            reason = f"holds no file that can be read ({SUFFIXES})" if path.is_dir() else missing
            raise BadInput(f"{field}: {str(pattern)!r} {reason}.")
        found.update(Path(os.path.abspath(match)) for match in matches)
    kept = [path for path in sorted(found) if not any(fnmatch(path.name, glob_) for glob_ in exclude)]
    if not kept:
        raise BadInput(f"exclude: {list(exclude)} leaves none of the {len(found)} files of {field}.")
    return kept


def builder_of(path: Path) -> str:
    """Which reader takes the file, by its suffix. Raises BadInput for one that none takes."""
    suffixes = path.suffixes
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    suffix = suffixes[-2] if compressed and len(suffixes) > 1 else path.suffix
    if suffix not in FORMATS or (compressed and suffix == ".parquet"):
        raise BadInput(f"{path}: the suffix {path.suffix!r} is not supported; allowed: {SUFFIXES}.")
    return FORMATS[suffix]


def _readable(path: Path) -> bool:
    try:
        return bool(builder_of(path))
    except BadInput:
        return False


def file_source(
    path: Path,
    text_field: str,
    domain_field: str | None,
    domain: str,
    txt: TxtDocuments,
    most: int = MAX_DOCUMENT_LENGTH,
) -> Source:
    """One file as a source. Its identity is path, size, time of change, and how it is cut into documents.

    `most`: UTF-8 bytes of a document; a longer one is refused when it is read.
    """
    with named(str(path)):
        stat = path.stat()
    identity = f"{path} {stat.st_size} {stat.st_mtime_ns} {text_field} {domain_field or '=' + domain} {txt}"
    if builder_of(path) == "text":
        identity += f" {TEXT_RECIPE}"

    def documents() -> Iterator[Document]:
        for text, label in _rows(path, text_field, domain_field, txt, most):
            yield Document(text, domain if label is None else label, hash64(text))

    return Source(path.name, identity, documents)


def read_documents(
    paths: str | Iterable[str],
    text_field: str = "text",
    exclude: Iterable[str] = (),
    txt: TxtDocuments = "file",
    most: int = MAX_DOCUMENT_LENGTH,
) -> Iterator[str]:
    """The texts of the files, in sorted order, empty ones left out. Raises BadInput."""
    for path in find_files(paths, exclude):
        for text, _ in _rows(path, text_field, None, txt, most):
            yield text


def _rows(
    path: Path, text_field: str, domain_field: str | None, txt: TxtDocuments, most: int
) -> Iterator[tuple[str, str | None]]:
    """(text, label) of each row that has text. Raises BadInput naming the file and, if it can, the line."""
    builder = builder_of(path)
    with named(str(path)):
        if not path.is_file():
            raise BadInput(f"{path} does not exist.")
        if path.stat().st_size == 0:
            raise BadInput(f"{path} is empty.")
        some = False
        for place, text, label in _values(path, builder, text_field, domain_field, txt, most):
            if text is not None and not isinstance(text, str):
                raise BadInput(
                    f"{path}: {place}: column {text_field!r} holds {type(text).__name__}, not text."
                )
            if text and (len(text) > most or utf8_bytes(text) > most):
                raise too_long(f"{path}: the text of {place}", most)
            if text and not is_unicode(text):
                raise BadInput(
                    f"{path}: {place}: column {text_field!r} holds half of a surrogate pair, which is no text."
                )
            if text:
                some = True
                yield text, None if label is None else str(label)
    if not some:
        raise BadInput(f"{path} holds no text: no row of it has a non-empty {text_field!r}.")


Value = tuple[str, Any, Any]
"""(place in the file, text, label) of a row, as they are written"""


def _values(
    path: Path, builder: str, text_field: str, domain_field: str | None, txt: TxtDocuments, most: int
) -> Iterator[Value]:
    if builder == "text":
        return ((f"document {i}", text, None) for i, text in enumerate(txt_documents(path, txt, most), 1))
    missing = {"text_field": text_field} | ({"domain_field": domain_field} if domain_field else {})
    if builder == "json":
        return _columns(path, json_rows(path, most), missing, {})
    present, rows = parquet_rows(
        path, [part for name in missing.values() for part in (name, name.split(".")[0])]
    )
    _refuse_missing(path, {f: name for f, name in missing.items() if _root(name, present) is None}, present)
    return _columns(path, rows, missing, dict.fromkeys(present))


def _columns(
    path: Path, rows: Iterable[tuple[str, dict[str, Any]]], fields: dict[str, str], present: dict[str, None]
) -> Iterator[Value]:
    """The columns that `fields` (field -> name of a column) name. `present`: the columns that there are, as far as
    it is known; those of the first rows are added."""
    names = list(fields.values())
    missing = {field: name for field, name in fields.items() if name not in present}
    for number, (place, row) in enumerate(rows, start=1):
        try:
            values = [
                row[name] if name in row else reach([row.get(name.split(".")[0])], name)[0] for name in names
            ]
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path}: {place} holds text in the way of {' or '.join(names)}.") from error
        if missing:
            present |= dict.fromkeys(row)
            for field, name in list(missing.items()):
                if name in row or values[names.index(name)] is not None:
                    del missing[field]
            if number == ROWS_THAT_TELL:
                _refuse_missing(path, missing, present)
        yield place, values[0], values[1] if len(names) > 1 else None
    _refuse_missing(path, missing, present)


def _root(name: str, present: Iterable[str]) -> str | None:
    """The column that a name reaches into, or is."""
    return next((column for column in (name, name.split(".")[0]) if column in present), None)


def _refuse_missing(path: Path, missing: dict[str, str], present: Iterable[str]) -> None:
    """BadInput for the first of the columns (field -> name) that are not there."""
    for field, name in missing.items():
        raise BadInput(f"{field}: {path} has no column {name!r}; present: {', '.join(present)}.")
