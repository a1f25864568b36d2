"""Local files as lines of text, plain, .gz or .zst, and what is wrong with them."""

import gzip
import io
from collections.abc import Iterator
from pathlib import Path

from t6_lightning.common.errors import BadInput


def text_lines(path: Path) -> Iterator[str]:
    """The lines with their ends, decompressed, without a byte order mark. Raises BadInput naming the first bad
    line."""
    number = 0
    lines = _lines(path)
    while True:
        try:
            line = next(lines, None)
        except Exception as error:  # the decompressor's
            raise BadInput(
                f"{path}: the compressed data is damaged after line {number} ({error or type(error).__name__})."
            ) from error
        if line is None:
            return
        number += 1
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadInput(
                f"{path}: line {number}, byte {error.start + 1} of it (0x{line[error.start]:02x}) is not UTF-8."
            ) from error
        yield text.removeprefix("\ufeff") if number == 1 else text


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
