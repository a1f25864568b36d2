"""Compressed bytes to plain ones, in bounded memory: .gz, .zst, .xz and .bz2, with all members or frames of a file."""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from t6_lightning.common.errors import BadInput, first_line

STORED_AT_ONCE = 1 << 14
"""Stored bytes given to a decompressor at a time: so much, at most, is lost in front of damage."""
ZST_AT_ONCE = 1 << 10
"""The same of .zst, whose decompressor takes no limit on its output: one byte may stand for 32 KiB of text."""
MOST_AT_ONCE = 1 << 20
"""Decompressed bytes asked of the other decompressors at a time."""
WINDOW_BYTES = 1 << 31
"""Window of a .zst frame, at most; `zstd --long=31` makes one of this size."""
XZ_MEMORY_BYTES = 1 << 30
"""Memory that an .xz stream may ask for; `xz -9` takes 65 MiB."""
UNSUSPICIOUS_BYTES, MOST_RATIO = 1 << 30, 64
"""A file that decompresses to more than this, and to more than so many times its stored bytes, is no natural text."""

ZERO_PADDED = (".gz", ".xz")
"""Formats in which zeros may follow a member."""


class Damaged(Exception):
    """What a decompressor says of bytes that it has read.

    Args:
        reason: What is wrong.
        place: About how many stored bytes are before it.
        cut: The data ends inside a member.
    """

    def __init__(self, reason: str, place: int, cut: bool = False):
        super().__init__(reason)
        self.reason, self.place, self.cut = reason, place, cut


class _Format(NamedTuple):
    begin: Callable[[], Any]
    stored_at_once: int
    limited: bool
    """Whether `decompress` takes a limit on its output."""


def _zst() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES).decompressobj()


FORMATS = {
    ".gz": _Format(lambda: zlib.decompressobj(zlib.MAX_WBITS | 16), STORED_AT_ONCE, True),
    ".zst": _Format(_zst, ZST_AT_ONCE, False),
    ".xz": _Format(lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY_BYTES), STORED_AT_ONCE, True),
    ".bz2": _Format(bz2.BZ2Decompressor, STORED_AT_ONCE, True),
}
COMPRESSIONS = tuple(FORMATS)


def decompressed(chunks: Iterable[bytes], path: str) -> Iterator[bytes]:
    """The text of a file with one of COMPRESSIONS as its suffix; of other files the chunks as they are.

    Raises Damaged for what is damaged or cut, BadInput for what would take too much memory, ImportError where the
    package of a format is missing.
    """
    suffix = next((suffix for suffix in COMPRESSIONS if path.endswith(suffix)), None)
    if suffix is None:
        yield from chunks
        return
    form = FORMATS[suffix]
    member: Any = None
    stored = plain = members = 0
    for chunk in chunks:
        for begin in range(0, len(chunk), form.stored_at_once):
            part = chunk[begin : begin + form.stored_at_once]
            stored += len(part)
            while part:
                place = stored - len(part)
                if member is None:
                    if members and suffix in ZERO_PADDED and not (part := part.lstrip(b"\0")):
                        break
                    member, members = form.begin(), members + 1
                try:
                    for text in _fed(member, part, form.limited):
                        plain += len(text)
                        yield text
                except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError) as error:
                    raise _explained(path, error, place) from error
                except Exception as error:
                    if type(error).__name__ != "ZstdError":
                        raise
                    raise _explained(path, error, place) from error
                if plain > UNSUSPICIOUS_BYTES and plain > MOST_RATIO * stored:
                    raise BadInput(
                        f"{path}: it decompresses to more than {MOST_RATIO} times its stored bytes, which no natural "
                        "text does; decompress it beforehand if that is meant."
                    )
                part = b""
                if member.eof:
                    part, member = member.unused_data, None
    if member is not None:
        raise Damaged("the data ends inside a member", stored, cut=True)


def _fed(member: Any, data: bytes, limited: bool) -> Iterator[bytes]:
    """What a decompressor gives for some stored bytes, in parts of at most MOST_AT_ONCE where it can be limited."""
    if not limited:
        yield member.decompress(data)
        return
    while True:
        text = member.decompress(data, MOST_AT_ONCE)
        yield text
        data = getattr(member, "unconsumed_tail", b"")
        if member.eof or not (data or len(text) == MOST_AT_ONCE):
            return


def _explained(path: str, error: Exception, place: int) -> Exception:
    reason = first_line(error)
    if "memory" in reason.lower():
        return BadInput(f"{path}: it cannot be decompressed in the memory that is allowed ({reason}).")
    return Damaged(reason, place)
