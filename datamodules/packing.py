"""Packing: documents laid end to end and cut into windows of `context` predictions.

A stream is  eot, ids of document 0, eot, ids of document 1, ..., eot. Each document is opened by an eot, its
first input token, and closed by the next one, a target. Window w reads positions w*T .. w*T + T (T =
context): the first T are inputs, the last T targets, so each position but the first is a target once.
Shapes: B sequences, T tokens.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch

from datamodules.corpus import DocumentTable
from datamodules.tokenizer import Tokenizer
from t6_lightning.common.errors import BadInput

IGNORED = -100
"""Target of a padded position; cross-entropy's default ignore_index."""

MIXED = -1
"""Domain of a training row, which may hold documents of several."""

Batch = dict[str, torch.Tensor]

Mark = tuple[int, int, int, int, int]
"""Where a lane of a stream goes on; see `lanes`."""
LaneMark = tuple[int, int, int, int, int, int]
"""(lane, *mark)"""


class TokenStream:
    """The stream of some documents in a given order; positions 0 .. length - 1."""

    def __init__(self, table: DocumentTable, order: np.ndarray, eot: int, token_bytes: np.ndarray | None):
        self.table, self.order, self.eot, self.token_bytes = table, order, eot, token_bytes
        self.opens = np.concatenate([[0], np.cumsum(table.length[order] + 1)])
        """Position of the eot that opens each document, and of the last one, which only closes."""
        self.length = int(self.opens[-1]) + 1

    def read(self, position: int, tokens: np.ndarray, opened: np.ndarray, n_bytes: np.ndarray) -> None:
        """Fill three arrays (n,) of zeros from `position` on, not beyond the stream's end.

        They get the ids, whether a token opens a document, and the UTF-8 bytes that it stands for.
        """
        end = position + len(tokens)
        first, behind = self.opens.searchsorted((position, end - 1), side="right").tolist()
        opens = self.opens[first - 1 : behind + 1].tolist()
        for i, document in enumerate(self.order[first - 1 : behind].tolist()):
            if opens[i] >= position:
                tokens[opens[i] - position], opened[opens[i] - position] = self.eot, True
            begin, stop = max(opens[i] + 1, position), min(opens[i + 1], end)
            shard = self.table.shards[self.table.shard[document]]
            source = int(self.table.begin[document]) + begin - opens[i] - 1
            here = slice(begin - position, stop - position)
            tokens[here] = shard.tokens[source : source + stop - begin]
            if shard.token_bytes is not None:
                n_bytes[here] = shard.token_bytes[source : source + stop - begin]
        if behind == len(self.opens):  # the stream's last token
            tokens[-1], opened[-1] = self.eot, True
        if self.token_bytes is not None:
            self.token_bytes.take(tokens, out=n_bytes, mode="clip")  # "raise" would buffer


class WindowReader(Protocol):
    """Reads the windows of one endless sequence, mostly in rising order."""

    def prepare(self, windows: Sequence[int]) -> None:
        """Begin to fetch what these windows need."""
        ...

    def read(self, rows: "Rows", row: int, window: int) -> LaneMark | None:
        """Fill a row; returns (lane, where it goes on), None where nothing need be remembered."""
        ...

    def close(self) -> None:
        """Nothing will be read any more."""
        ...


class Windows(Protocol):
    """An endless sequence of training windows; its `reader` begins quickly at the marks of an earlier one."""

    @property
    def per_epoch(self) -> int | None:
        """Windows of an epoch; None where only reading tells."""
        ...

    def reader(self, marks: Mapping[int, Mark]) -> WindowReader:
        """`marks`: lane -> where one of its windows begins."""
        ...


class FixedWindows(Protocol):
    """Windows to validate or to test on."""

    def __len__(self) -> int: ...

    def batch(self, first: int, size: int) -> Batch:
        """Windows first .. first + size - 1, fewer at the end."""
        ...


class TrainingWindows:
    """The endless sequence of training windows: window number `sample` is a function of (seed, sample) alone.

    Every epoch lays the documents out in a new order, cuts them and orders the windows anew; the rest that
    fills no window is left out of that epoch.
    """

    def __init__(
        self, table: DocumentTable, documents: np.ndarray, tokenizer: Tokenizer, context: int, seed: int
    ):
        self.table, self.documents, self.context, self.seed = table, documents, context, seed
        self.eot, self.token_bytes = tokenizer.eot, _per_token(tokenizer)
        n_tokens = int((table.length[documents] + 1).sum())
        self.per_epoch = n_tokens // context
        if self.per_epoch == 0:
            raise BadInput(
                f"context: {context} is longer than all training text, which has {n_tokens} tokens."
            )
        # A batch may reach over the end of an epoch: two are kept.
        self._epoch = lru_cache(maxsize=2)(self._lay_out)

    def _lay_out(self, epoch: int) -> tuple[TokenStream, np.ndarray]:
        rng = np.random.default_rng([self.seed, epoch])
        stream = TokenStream(self.table, rng.permutation(self.documents), self.eot, self.token_bytes)
        return stream, rng.permutation(self.per_epoch)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_epoch"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._epoch = lru_cache(maxsize=2)(self._lay_out)

    def reader(self, marks: Mapping[int, Mark]) -> "TrainingWindows":
        return self

    def prepare(self, windows: Sequence[int]) -> None:
        pass

    def close(self) -> None:
        pass

    def read(self, rows: "Rows", row: int, window: int) -> None:
        epoch, index = divmod(window, self.per_epoch)
        stream, windows = self._epoch(epoch)
        rows.read(row, stream, int(windows[index]) * self.context)

    def batch(self, first: int, size: int) -> Batch:
        """Samples first .. first + size - 1 of the endless sequence."""
        rows = Rows(size, self.context)
        for row, sample in enumerate(range(first, first + size)):
            self.read(rows, row, sample)
        return rows.batch(np.full(size, MIXED), np.arange(first, first + size))


class ValidationWindows:
    """All windows of the validation (or test) documents, domain after domain, in a fixed order.

    A domain's last window is padded with eot as input and -100 as target: every byte of text and every
    closing eot is a target exactly once. A domain without documents has a number, and no windows.
    """

    def __init__(
        self, table: DocumentTable, documents: dict[str, np.ndarray], tokenizer: Tokenizer, context: int
    ):
        self.context = context
        self.tokenizer = tokenizer
        self._cut(
            [
                TokenStream(table, chosen, tokenizer.eot, _per_token(tokenizer))
                for chosen in documents.values()
            ]
        )

    def followed_by(self, other: "ValidationWindows") -> "ValidationWindows":
        """The windows of both; the other's domains are numbered behind these."""
        both = ValidationWindows.__new__(ValidationWindows)
        both.context, both.tokenizer = self.context, self.tokenizer
        both._cut([*self.streams, *other.streams])
        return both

    def _cut(self, streams: list[TokenStream]) -> None:
        context, self.streams = self.context, streams
        counts = [-(-(stream.length - 1) // context) for stream in self.streams]
        self.domain = np.repeat(np.arange(len(counts)), counts)
        """Domain of each window."""
        self.start = np.concatenate([np.arange(count) * context for count in counts])
        """Where each window begins in its domain's stream."""

    def __len__(self) -> int:
        return len(self.start)

    def batch(self, first: int, size: int) -> Batch:
        """Windows first .. first + size - 1, fewer at the end."""
        samples = np.arange(first, min(first + size, len(self)))
        rows = Rows(len(samples), self.context)
        for row, sample in enumerate(samples):
            rows.read(row, self.streams[self.domain[sample]], int(self.start[sample]))
        return rows.batch(self.domain[samples], samples)


class Rows:
    """B windows while they are read."""

    def __init__(self, size: int, context: int):
        shape = (size, context + 1)
        self.tokens = np.zeros(shape, dtype=np.int64)
        self.opened = np.zeros(shape, dtype=np.int32)
        self.n_bytes = np.zeros(shape, dtype=np.int64)
        self.filled = np.zeros(size, dtype=np.int64)

    def row(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The arrays (T + 1,) of a row that will be filled whole: ids, whether they open a document, bytes."""
        self.filled[row] = self.tokens.shape[1]
        return self.tokens[row], self.opened[row], self.n_bytes[row]

    def read(self, row: int, stream: TokenStream, start: int) -> None:
        n = self.filled[row] = min(self.tokens.shape[1], stream.length - start)
        stream.read(start, self.tokens[row, :n], self.opened[row, :n], self.n_bytes[row, :n])
        self.tokens[row, n:] = stream.eot

    def batch(self, domain: np.ndarray, sample: np.ndarray) -> Batch:
        """tokens, targets int64 (B, T); documents int32 (B, T); n_bytes, domain, sample int64 (B,)."""
        targets = self.tokens[:, 1:].copy()
        if (self.filled < self.tokens.shape[1]).any():
            targets[np.arange(1, self.tokens.shape[1]) >= self.filled[:, None]] = IGNORED
        documents = self.opened[:, :-1].cumsum(axis=1, dtype=np.int32)
        documents -= self.opened[:, :1]
        return {
            "tokens": torch.from_numpy(np.ascontiguousarray(self.tokens[:, :-1])),
            "targets": torch.from_numpy(targets),
            "documents": torch.from_numpy(documents),
            "n_bytes": torch.from_numpy(self.n_bytes[:, 1:].sum(axis=1)),
            "domain": torch.from_numpy(np.asarray(domain, dtype=np.int64)),
            "sample": torch.from_numpy(np.asarray(sample, dtype=np.int64)),
        }


def _per_token(tokenizer: Tokenizer) -> np.ndarray | None:
    return None if tokenizer.token_bytes is None else tokenizer.token_bytes.astype(np.int64)
