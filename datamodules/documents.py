"""A document, and a source of documents: what corpora hand to the token cache."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


class Document(NamedTuple):
    text: str
    domain: str
    key: int
    """64-bit hash that decides whether the document trains, validates or tests."""


Damage = Counter[tuple[str, str]]
"""(kind, place) -> how often: what is wrong with stored data and had to be left out."""


@dataclass(frozen=True)
class Source:
    """One file, or a set of files always read as a whole. It becomes one entry of the token cache."""

    name: str
    """For messages and the progress line."""
    identity: str
    """Changes whenever `documents()` could yield something else; part of the cache key."""
    documents: Callable[[], Iterator[Document]]
    """Yields every document, always in the same order."""
    damage: Damage = field(default_factory=Counter)
    """What `documents()` has left out, once it is read."""


def hash64(text: str) -> int:
    """Stable 64-bit hash of a text, uniform over [0, 2^64)."""
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def utf8_bytes(text: str) -> int:
    """Length of a text in UTF-8, half surrogates included."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold a text: JSON may escape half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def held_out(keys: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents never train: True where key < fraction * 2^64. keys: uint64 (D,); returns bool (D,)."""
    # The upper 53 bits are exact in float64; 2^64 itself does not fit a uint64.
    return (keys >> np.uint64(11)).astype(np.float64) < fraction * 2.0**53


def is_test(keys: np.ndarray) -> np.ndarray:
    """Which held-out documents test; the others validate. keys: uint64 (D,); returns bool (D,).

    It is the lowest bit, of which `held_out` does not depend: half of any set of held-out documents.
    """
    return (keys & np.uint64(1)).astype(bool)


class HeldOut(NamedTuple):
    """Which documents of a stream's training files never train: a fraction, by hash, of a few fixed pieces."""

    files: frozenset[int]
    """Numbers of the files that have such pieces."""
    pieces: int
    """In each of them it is the first so many pieces."""
    fraction: float

    def of(self, file: int, piece: int, keys: np.ndarray) -> np.ndarray:
        """Which documents of a piece are held out. keys: uint64 (D,); returns bool (D,)."""
        if file in self.files and piece < self.pieces:
            return held_out(keys, self.fraction)
        return np.zeros(len(keys), dtype=bool)
