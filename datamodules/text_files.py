"""Local .jsonl, .json, .parquet and .txt files, plain or .gz / .zst, through `datasets` streaming."""

import glob
import json
import logging
import os
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from datamodules.documents import Document, Source, hash64
from datamodules.errors import BadData, first_line
from datamodules.file_faults import first_fault, zst_is_cut

if TYPE_CHECKING:
    import pyarrow as pa

TxtDocuments = Literal["file", "line", "paragraph"]

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
COMPRESSIONS = (".gz", ".zst")
SUFFIXES = ", ".join(BUILDERS) + ", the text formats also with " + " or ".join(COMPRESSIONS)

ROWS_AT_ONCE = 256


def find_files(
    patterns: str | Iterable[str], exclude: Iterable[str] = (), field: str = "files"
) -> list[Path]:
    """The files that paths, globs and folders (searched through) name: absolute, sorted, each once.

    `exclude`: globs on file names. Files of other suffixes are passed over in folders and globs, but refused
    when named. Raises BadData, naming `field`.
    """
    patterns = [patterns] if isinstance(patterns, (str, os.PathLike)) else list(patterns)
    if not patterns:
        raise BadData(f"{field}: the list is empty; name at least one file, folder or glob.")
    found: set[Path] = set()
    for pattern in patterns:
        if not str(pattern):
            raise BadData(f"{field}: '' is no path; name a file, a folder or a glob.")
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
            raise BadData(f"{field}: {str(pattern)!r} {reason}.")
        found.update(Path(os.path.abspath(match)) for match in matches)
    kept = [path for path in sorted(found) if not any(fnmatch(path.name, glob_) for glob_ in exclude)]
    if not kept:
        raise BadData(f"exclude: {list(exclude)} leaves none of the {len(found)} files of {field}.")
    return kept


def builder_of(path: Path) -> str:
    """Which of `datasets`' readers takes the file, by its suffix. Raises BadData for one that none takes."""
    suffixes = path.suffixes
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    suffix = suffixes[-2] if compressed and len(suffixes) > 1 else path.suffix
    if suffix not in BUILDERS or (compressed and suffix == ".parquet"):
        raise BadData(f"{path}: the suffix {path.suffix!r} is not supported; allowed: {SUFFIXES}.")
    return BUILDERS[suffix]


def _readable(path: Path) -> bool:
    try:
        return bool(builder_of(path))
    except BadData:
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
    """The texts of the files, in sorted order, empty ones left out. Raises BadData."""
    for path in find_files(paths, exclude):
        for text, _ in _rows(path, text_field, None, txt):
            yield text


def _rows(
    path: Path, text_field: str, domain_field: str | None, txt: TxtDocuments
) -> Iterator[tuple[str, str | None]]:
    """(text, label) of each row that has text. Raises BadData naming the file and, if it can, the line."""
    builder = builder_of(path)
    if not path.is_file():
        raise BadData(f"{path} does not exist.")
    if path.stat().st_size == 0:
        raise BadData(f"{path} is empty.")
    try:
        cut = path.suffix == ".zst" and zst_is_cut(path)
    except Exception as error:  # zstandard's own
        raise BadData(f"{path}: the compressed data is damaged ({first_line(error)}).") from error
    if cut:
        raise BadData(f"{path}: the compressed data is cut off; fetch or make the file again.")
    if builder == "text":
        text_field, domain_field = "text", None
    some = False
    try:
        for table in _tables(path, builder, txt):
            texts = _column(table, text_field, path, "text_field")
            labels: list[str | None] = [None] * len(texts)
            if domain_field is not None:
                labels = [str(label) for label in _column(table, domain_field, path, "domain_field")]
            for text, label in zip(texts, labels, strict=True):
                if text is not None and not isinstance(text, str):
                    raise BadData(f"{path}: column {text_field!r} holds {type(text).__name__}, not text.")
                if text:
                    some = True
                    yield text, label
    except BadData:
        raise
    except Exception as error:  # pyarrow, zlib, zstandard, codecs and pandas each raise their own
        raise BadData(f"{path}: {first_fault(path, builder) or first_line(error)}.") from error
    if not some:
        raise BadData(f"{path} holds no text: no row of it has a non-empty {text_field!r}.")


def _tables(path: Path, builder: str, txt: TxtDocuments) -> Iterator["pa.Table"]:
    import datasets

    # It logs each error that it raises; here the raised one is said once, with its line.
    logging.getLogger("datasets.packaged_modules.json.json").setLevel(logging.CRITICAL)
    options: dict[str, Any] = {}
    if builder == "text":
        options["sample_by"] = "document" if txt == "file" else txt
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
    outer, *inner = name.split(".")
    if inner and outer in table.column_names:
        values = table.column(outer).to_pylist()
        for key in inner:
            # Objects whose keys differ from row to row come as JSON text.
            objects = [json.loads(value) if isinstance(value, str) else value for value in values]
            values = [each.get(key) if isinstance(each, dict) else None for each in objects]
        if any(value is not None for value in values):
            return values
    raise BadData(f"{field}: {path} has no column {name!r}; present: {', '.join(table.column_names)}.")
