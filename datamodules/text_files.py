"""Local .jsonl, .json, .parquet and .txt files, plain or .gz / .zst, each row as it is written."""

import glob
import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from datamodules.documents import Document, Source, hash64, is_unicode
from datamodules.file_faults import text_lines, zst_is_cut
from datamodules.json_rows import json_rows, reach
from t6_lightning.common.errors import BadInput, first_line

if TYPE_CHECKING:
    import pyarrow as pa

TxtDocuments = Literal["file", "line", "paragraph"]

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
COMPRESSIONS = (".gz", ".zst")
SUFFIXES = ", ".join(FORMATS) + ", the text formats also with " + " or ".join(COMPRESSIONS)

ROWS_AT_ONCE = 256
ROWS_THAT_TELL = 10_000
"""A column that occurs in none of so many first rows of a JSON file is refused there and then."""


def find_files(
    patterns: str | Iterable[str], exclude: Iterable[str] = (), field: str = "files"
) -> list[Path]:
    """The files that paths, globs and folders (searched through) name: absolute, sorted, each once.

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
        if path.is_file():
            builder_of(path)
            matches = [path]
        elif path.is_dir():
            matches = [inside for inside in path.rglob("*") if inside.is_file() and _readable(inside)]
        else:
            matches = [Path(name) for name in glob.glob(str(path), recursive=True) if _readable(Path(name))]
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
    path: Path, text_field: str, domain_field: str | None, domain: str, txt: TxtDocuments
) -> Source:
    """One file as a source. Its identity is path, size, time of change, and how it is cut into documents."""
    stat = path.stat()
    identity = f"{path} {stat.st_size} {stat.st_mtime_ns} {text_field} {domain_field or '=' + domain} {txt}"

    def documents() -> Iterator[Document]:
        for text, label in _rows(path, text_field, domain_field, txt):
            yield Document(text, domain if label is None else label, hash64(text))

    return Source(path.name, identity, documents)


def read_documents(
    paths: str | Iterable[str],
    text_field: str = "text",
    exclude: Iterable[str] = (),
    txt: TxtDocuments = "file",
) -> Iterator[str]:
    """The texts of the files, in sorted order, empty ones left out. Raises BadInput."""
    for path in find_files(paths, exclude):
        for text, _ in _rows(path, text_field, None, txt):
            yield text


def _rows(
    path: Path, text_field: str, domain_field: str | None, txt: TxtDocuments
) -> Iterator[tuple[str, str | None]]:
    """(text, label) of each row that has text. Raises BadInput naming the file and, if it can, the line."""
    builder = builder_of(path)
    if not path.is_file():
        raise BadInput(f"{path} does not exist.")
    if path.stat().st_size == 0:
        raise BadInput(f"{path} is empty.")
    try:
        cut = path.suffix == ".zst" and zst_is_cut(path)
    except Exception as error:  # zstandard's own
        raise BadInput(f"{path}: the compressed data is damaged ({first_line(error)}).") from error
    if cut:
        raise BadInput(f"{path}: the compressed data is cut off; fetch or make the file again.")
    if builder == "text":
        text_field, domain_field = "text", None
    if builder == "json":
        values = _json_values(path, text_field, domain_field)
    else:
        values = _table_values(path, builder, text_field, domain_field, txt)
    some = False
    try:
        for place, text, label in values:
            where = f"{path}: {place}" if place else str(path)
            if text is not None and not isinstance(text, str):
                raise BadInput(f"{where}: column {text_field!r} holds {type(text).__name__}, not text.")
            if text and not is_unicode(text):
                raise BadInput(
                    f"{where}: column {text_field!r} holds half of a surrogate pair, which is no text."
                )
            if text:
                some = True
                yield text, None if label is None else str(label)
    except BadInput:
        raise
    except Exception as error:  # pyarrow, zlib, zstandard and codecs each raise their own
        if builder == "text":
            deque(text_lines(path), maxlen=0)  # where a line is at fault, it names the line
        raise BadInput(f"{path}: {first_line(error)}.") from error
    if not some:
        raise BadInput(f"{path} holds no text: no row of it has a non-empty {text_field!r}.")


Value = tuple[str, Any, Any]
"""(place in the file or "", text, label) of a row, as they are written"""


def _json_values(path: Path, text_field: str, domain_field: str | None) -> Iterator[Value]:
    missing = {"text_field": text_field} | ({"domain_field": domain_field} if domain_field else {})
    names = list(missing.values())
    present: dict[str, None] = {}
    for number, (place, row) in enumerate(json_rows(path), start=1):
        try:
            values = [row[name] if name in row else reach([row.get(_root(name))], name)[0] for name in names]
        except ValueError as error:
            raise BadInput(f"{path}: {place} holds text in the way of {' or '.join(names)}.") from error
        if missing:
            present |= dict.fromkeys(row)
            for field, name in list(missing.items()):
                if name in row or values[names.index(name)] is not None:
                    del missing[field]
            if number == ROWS_THAT_TELL:
                _refuse_missing(path, missing, present)
        yield place, values[0], values[1] if domain_field else None
    _refuse_missing(path, missing, present)


def _table_values(
    path: Path, builder: str, text_field: str, domain_field: str | None, txt: TxtDocuments
) -> Iterator[Value]:
    for number, table in enumerate(_tables(path, builder, txt)):
        texts = _column(table, text_field, path, "text_field")
        labels: Iterable[Any] = repeat(None)
        if domain_field is not None:
            labels = _column(table, domain_field, path, "domain_field")
        if builder == "text" and number == 0:
            texts[0] = texts[0].removeprefix("\ufeff")  # a byte order mark is no text
        yield from zip(repeat(""), texts, labels, strict=False)


def _refuse_missing(path: Path, missing: dict[str, str], present: Iterable[str]) -> None:
    """BadInput for the first of the columns (field -> name) that are not there."""
    for field, name in missing.items():
        raise BadInput(f"{field}: {path} has no column {name!r}; present: {', '.join(present)}.")


def _root(name: str) -> str:
    return name.split(".")[0]


def _tables(path: Path, builder: str, txt: TxtDocuments) -> Iterator["pa.Table"]:
    import datasets

    # It logs each error that it raises; here the raised one is said once.
    logging.getLogger("datasets.packaged_modules.parquet.parquet").setLevel(logging.CRITICAL)
    options: dict[str, Any] = {}
    if builder == "text":
        options["sample_by"] = "document" if txt == "file" else txt
    else:
        options["batch_size"] = ROWS_AT_ONCE  # else that of the first row group, which may have none
    # The reader gets one file by its exact name: [ ] * ? in it are no pattern.
    stream = datasets.load_dataset(
        builder, data_files=[glob.escape(str(path))], split="train", streaming=True, **options
    )
    assert isinstance(stream, datasets.IterableDataset)
    yield from stream.with_format("arrow").iter(batch_size=ROWS_AT_ONCE)  # type: ignore[misc]


def _column(table: "pa.Table", name: str, path: Path, field: str) -> list[Any]:
    """Values of a column; a dotted name (meta.pile_set_name) reaches into structs."""
    if name in table.column_names:
        return table.column(name).to_pylist()
    if _root(name) in table.column_names:
        values = reach(table.column(_root(name)).to_pylist(), name)
        if any(value is not None for value in values):
            return values
    _refuse_missing(path, {field: name}, table.column_names)
    return []
