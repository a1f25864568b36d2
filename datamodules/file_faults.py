"""What is wrong with a text file that a reader refused, and on which line: asked only after the refusal."""

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path


def first_fault(path: Path, builder: str) -> str | None:
    """One clause naming the first bad line of a .txt or JSON-lines file; None where nothing is found."""
    if builder == "parquet":
        return None
    number = 0
    try:
        for number, line in enumerate(_lines(path), start=1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = line[error.start]
                return f"line {number}, byte {error.start + 1} of it (0x{byte:02x}) is not UTF-8"
            if number == 1 and builder == "json" and text.lstrip("\ufeff \t").startswith("["):
                return None  # one JSON array: its errors are no line's
            if builder == "json" and text.strip():
                try:
                    row = json.loads(text.lstrip("\ufeff") if number == 1 else text)
                except json.JSONDecodeError as error:
                    return f"line {number} is not JSON ({error.msg}, column {error.colno})"
                if not isinstance(row, dict):
                    return f"line {number} is a JSON {type(row).__name__}, not an object"
    except Exception as error:  # the decompressor's
        return f"the compressed data is damaged after line {number} ({error or type(error).__name__})"
    return None


def zst_is_cut(path: Path) -> bool:
    """Whether a .zst file ends inside a frame. Its readers take that for the end of the text and say nothing."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor()
    frame = decompressor.decompressobj()
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            while data:
                if frame.eof:
                    frame = decompressor.decompressobj()
                frame.decompress(data)
                data = frame.unused_data
    return not frame.eof


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stored:
        if path.suffix == ".gz":
            yield from gzip.GzipFile(fileobj=stored)
        elif path.suffix == ".zst":
            import zstandard

            yield from io.BufferedReader(
                zstandard.ZstdDecompressor().stream_reader(stored, read_across_frames=True)
            )
        else:
            yield from stored
