"""Local files as text, exactly as it is stored: lines, paragraphs or the whole, plain or compressed."""

import codecs
import io
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Literal

from datamodules.decompression import Damaged, decompressed
from datamodules.system_faults import named
from t6_lightning.common.errors import BadInput

TxtDocuments = Literal["file", "line", "paragraph"]

READ_AT_ONCE = 1 << 20

# A line ends with LF, CR LF or CR. (?>...) does not give the LF of a CR LF back.
SEPARATORS = {
    "line": re.compile(r"\r\n|\r|\n"),
    "paragraph": re.compile(r"(?>\r\n|\r|\n){2}"),
}


def byte_chunks(path: Path) -> Iterator[bytes]:
    """The decompressed bytes of a file. Raises BadInput."""
    with named(str(path)), path.open("rb") as stored:
        try:
            yield from decompressed(iter(lambda: stored.read(READ_AT_ONCE), b""), str(path))
        except Damaged as damage:
            if damage.cut:
                said = "is cut off; fetch or make the file again"
            else:
                said = f"is damaged near byte {damage.place:,} of the file ({damage.reason})"
            raise BadInput(f"{path}: the compressed data {said}.") from damage


def text_pieces(path: Path) -> Iterator[str]:
    """The text, cut anywhere, without a byte order mark. Raises BadInput naming the first byte that is not UTF-8."""
    rest, line, column, first = b"", 1, 0, True
    for chunk in chain(byte_chunks(path), [None]):
        data = rest + (chunk or b"")
        try:
            text, used = codecs.utf_8_decode(data, "strict", chunk is None)
        except UnicodeDecodeError as error:
            newlines = data.count(b"\n", 0, error.start)
            in_line = error.start - (data.rfind(b"\n", 0, error.start) + 1) + (0 if newlines else column)
            raise BadInput(
                f"{path}: line {line + newlines}, byte {in_line + 1} of it (0x{data[error.start]:02x}) is not UTF-8."
            ) from error
        if newlines := data.count(b"\n", 0, used):
            line, column = line + newlines, 0
        column += used - (data.rfind(b"\n", 0, used) + 1)
        rest = data[used:]
        if text and first:
            text, first = text.removeprefix("\ufeff"), False
        if text:
            yield text


def text_lines(path: Path, most: int) -> Iterator[str]:
    """The lines with their ends (LF alone ends one). Raises BadInput, also for one of more than `most` bytes."""
    # Characters are counted: there are no more of them than bytes.
    held: list[str] = []
    length, number = 0, 1
    for piece in text_pieces(path):
        for line in io.StringIO(piece, newline="\n"):
            length += len(line)
            if length > most:
                raise too_long(f"{path}: line {number}", most)
            held.append(line)
            if line.endswith("\n"):
                yield held[0] if len(held) == 1 else "".join(held)
                held, length = [], 0
                number += 1
    if held:
        yield "".join(held)


def txt_documents(path: Path, cut: TxtDocuments, most: int) -> Iterator[str]:
    """The documents of a text file, maybe empty ones: the whole, or what is between its line ends or blank lines.

    Raises BadInput, also for one of more than `most` bytes.
    """
    separator = SEPARATORS.get(cut)
    held: list[str] = []
    length = 0
    for piece in text_pieces(path):
        held.append(piece)
        length += len(piece)
        # What was held has no separator: only one that is in the new piece, or ends there, is looked for.
        if separator is not None and ("\n" in piece or "\r" in piece):
            text = "".join(held)
            # A separator at the very end may go on in the next piece.
            end = len(text) - 3 if len(text) > 3 else 0
            begin = 0
            for found in separator.finditer(text, 0):
                if found.end() > end:
                    break
                yield _bounded(path, text[begin : found.start()], most)
                begin = found.end()
            held, length = [text[begin:]], len(text) - begin
        if length > most:
            raise too_long(f"{path}: a document", most, cut)
    text = "".join(held)
    yield from [text] if separator is None else separator.split(text)


def _bounded(path: Path, text: str, most: int) -> str:
    if len(text) > most:
        raise too_long(f"{path}: a document", most)
    return text


def too_long(what: str, most: int, cut: str = "line") -> BadInput:
    advice = "cut it into lines or paragraphs (txt_documents), or " if cut == "file" else ""
    return BadInput(
        f"{what} has more than {most:,} bytes; {advice}allow longer documents (max_document_length), which take "
        "some 40 bytes of memory for each."
    )
