"""Lanes: the endless, seeded order of a streamed corpus, and the way back to any place in it.

Window number n of the stream is window n // L of lane n % L. The files (the row groups, where there are few parquet
files) are dealt over the L lanes once for all; a lane reads its share in an order drawn for (seed, epoch, lane),
a file's row groups in one drawn for (seed, epoch, lane, file), and shuffles the documents of each piece by (seed,
epoch, lane, file, piece). So the order depends on the seed and the files alone, whoever reads which window.

A lane is a stream as `packing` describes: eot, document, eot, document, ... without end. A mark, five integers,
says where one of its windows begins: (window, epoch, unit, piece, position in the piece's tokens).
"""

import atexit
import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakSet

import numpy as np

from datamodules import stores
from datamodules.corpus import DocumentTable
from datamodules.documents import HeldOut
from datamodules.packing import LaneMark, Mark, Rows, TokenStream
from datamodules.pieces import Pieces
from datamodules.tokenizer import Tokenizer
from t6_lightning.common.errors import BadInput

PIECES_PER_LANE = 4
"""Row groups that a lane gets at least, where row groups are dealt."""
THREADS = 4
"""Pieces fetched and tokenized at a time."""

WINDOWS_LAID_OUT = 16
"""Windows of a lane that are cut from one reading of its documents."""

START: Mark = (0, 0, 0, 0, 0)


class Unit(NamedTuple):
    """What is dealt to lanes: a file, or a single row group of it."""

    file: int
    group: int | None


def dealt(pieces: Pieces, lanes: int, seed: int) -> list[list[Unit]]:
    """Each lane's units: every file, or every row group of fewer parquet files than lanes, in just one lane.

    There are fewer lanes than asked for where there is too little to deal.
    """
    files = range(len(pieces.files))
    if len(files) >= lanes or not all(pieces.is_parquet(file) for file in files):
        units = [Unit(file, None) for file in files]
        lanes = min(lanes, len(units))
    else:
        with ThreadPoolExecutor(THREADS) as pool:
            groups = list(pool.map(pieces.groups, files))
        units = [Unit(file, group) for file in files for group in range(len(groups[file] or []))]
        lanes = max(1, min(lanes, len(units) // PIECES_PER_LANE))
    order = np.random.default_rng([seed, len(units)]).permutation(len(units))
    return [[units[i] for i in order[lane::lanes]] for lane in range(lanes)]


class Lanes:
    """All windows of a stream; it only describes, and can be handed to other processes.

    Args:
        pieces: The training files.
        n_lanes: How many lanes at most.
        left_out: Sorted hashes of documents that validate or test, uint64: wherever they are stored again.
        held_out: Which documents are held out where they are stored; None: no others.
        context, seed: Tokens per window; of the order.
    """

    per_epoch = None

    def __init__(
        self,
        pieces: Pieces,
        tokenizer: Tokenizer,
        n_lanes: int,
        left_out: np.ndarray,
        held_out: HeldOut | None,
        context: int,
        seed: int,
    ):
        self.pieces, self.left_out, self.held_out = pieces, left_out, held_out
        self.context, self.seed = context, seed
        self.eot = tokenizer.eot
        self.token_bytes = None if tokenizer.token_bytes is None else tokenizer.token_bytes.astype(np.int64)
        self.units = dealt(pieces, n_lanes, seed)

    def __len__(self) -> int:
        return len(self.units)

    def reader(self, marks: Mapping[int, Mark]) -> "LaneReader":
        """Reads windows from anywhere on; quickly where the marks are (lane -> mark)."""
        return LaneReader(self, marks)


@dataclass
class _Open:
    """A piece that is being read, a stretch of it laid out: to look for the documents of every window anew takes
    longer than to copy their tokens."""

    epoch: int
    unit: int
    piece: int
    stream: TokenStream
    length: int
    """Its tokens: every document's and the eot before it."""
    begin: int = 0
    end: int = 0
    """The stretch that is laid out."""
    laid_out: tuple[np.ndarray, ...] = ()

    def read(self, position: int, *rows: np.ndarray) -> None:
        """Fill ids, whether they open a document, and their bytes, as `TokenStream.read`."""
        end = position + len(rows[0])
        if position < self.begin or end > self.end:
            self.begin = position
            self.end = min(position + WINDOWS_LAID_OUT * len(rows[0]), self.length)
            self.laid_out = Rows(1, self.end - position - 1).row(0)
            self.stream.read(position, *self.laid_out)
        span = slice(position - self.begin, end - self.begin)
        for row, laid_out in zip(rows, self.laid_out, strict=True):
            row[:] = laid_out[span]


class LaneReader:
    """Reads windows, each lane forward; a window before the last one read starts its lane anew."""

    def __init__(self, lanes: Lanes, marks: Mapping[int, Mark]):
        # Readers of lines stand at a place: each LaneReader needs its own.
        self.lanes, self.marks, self.pieces = lanes, marks, copy.copy(lanes.pieces)
        self._n_lanes = len(lanes)
        self._free, self._stop = threading.Semaphore(THREADS), threading.Event()
        self._cursors: dict[int, _Cursor] = {}
        _readers.add(self)

    def prepare(self, windows: Sequence[int]) -> None:
        """Fetch and tokenize at once what lanes that begin with these windows need first."""
        for window in windows:
            if window % self._n_lanes not in self._cursors:
                self._cursor(window).prepare()

    def read(self, rows: Rows, row: int, window: int) -> LaneMark:
        """Fill a row with a window; returns its lane, and where that goes on."""
        cursor = self._cursor(window)
        cursor.skip_to(window // self._n_lanes)
        tokens, opened, n_bytes = rows.row(row)
        cursor.read(tokens, opened, n_bytes)
        return cursor.lane, *cursor.mark()

    def _cursor(self, window: int) -> "_Cursor":
        number, lane = divmod(window, self._n_lanes)
        cursor = self._cursors.get(lane)
        if cursor is None or cursor.window > number:
            mark = self.marks.get(lane, START)
            mark = mark if mark[0] <= number else START
            cursor = self._cursors[lane] = _Cursor(self, lane, mark)
        return cursor

    def close(self) -> None:
        """Let go of what is under way in the background."""
        self._stop.set()

    def submit(self, find: "Callable[[], _Open]") -> "Future[_Open]":
        """Run in the background. In daemon threads: a process that ends does not wait for a hub that is away."""
        future: Future[_Open] = Future()

        def run() -> None:
            stores.background.stop = self._stop
            try:
                with self._free:
                    future.set_result(find())
            except BaseException as error:  # it is raised where the result is asked for
                future.set_exception(error)

        thread = threading.Thread(target=run, daemon=True)
        _threads.add(thread)
        thread.start()
        return future


_readers: "WeakSet[LaneReader]" = WeakSet()
_threads: "WeakSet[threading.Thread]" = WeakSet()


@atexit.register
def close_all() -> None:
    """Stop reading ahead everywhere. A thread must not be caught inside pyarrow by the end of the interpreter."""
    for reader in list(_readers):
        reader.close()
    for thread in list(_threads):
        thread.join(timeout=15)


class _Cursor:
    """A place in one lane: the beginning of window number `window`."""

    def __init__(self, reader: LaneReader, lane: int, mark: Mark):
        self.reader, self.lanes, self.lane = reader, reader.lanes, lane
        self.window, self._epoch, self._unit, self._piece, self._position = mark
        self._open: _Open | None = None
        self._coming: Future[_Open] | None = None

    def mark(self) -> Mark:
        return self.window, self._epoch, self._unit, self._piece, self._position

    def prepare(self) -> None:
        """Begin to open the piece that is read next."""
        if self._open is None and self._coming is None:
            self._coming = self._later(self._piece)

    def skip_to(self, window: int) -> None:
        """Move on to a later window; only the lengths of documents are looked at."""
        missing = (window - self.window) * self.lanes.context
        while missing > 0:
            step = min(missing, self._here().length - self._position)
            self._position += step
            missing -= step
        self.window = window

    def read(self, tokens: np.ndarray, opened: np.ndarray, n_bytes: np.ndarray) -> None:
        """Fill arrays (context + 1,), and move on by `context` tokens."""
        filled, context = 0, len(tokens) - 1
        while filled <= context:
            here = self._here()
            if filled == context and self._position == 0:
                # The last target is the eot that opens the next piece.
                tokens[filled], opened[filled], n_bytes[filled] = self.lanes.eot, True, 0
                break
            n = min(context + 1 - filled, here.length - self._position)
            span = slice(filled, filled + n)
            here.read(self._position, tokens[span], opened[span], n_bytes[span])
            filled += n
            self._position += n
        else:
            self._position -= 1  # the last target is the next window's first token
        self.window += 1

    def _here(self) -> _Open:
        """The piece that holds the position, opened; the next one where this one is read."""
        if self._open is None or self._position >= self._open.length:
            if self._open is not None:
                self._position = 0
                coming = self._coming or self._later(self._piece + 1)
            else:
                self.prepare()
                coming = self._coming
            assert coming is not None
            self._coming = None
            self._open = coming.result()
            place = self._open.epoch, self._open.unit, self._open.piece
            if place != (self._epoch, self._unit, self._piece):
                self._epoch, self._unit, self._piece = place
                self._position = 0
            if self._position >= self._open.length:
                return self._here()
        elif self._coming is None and 2 * self._position > self._open.length:
            self._coming = self._later(self._piece + 1)
        return self._open

    def _later(self, piece: int) -> Future[_Open]:
        epoch, unit = self._epoch, self._unit
        return self.reader.submit(lambda: self._find(epoch, unit, piece))

    def _find(self, epoch: int, unit: int, piece: int) -> _Open:
        """The first piece with training documents from a place on."""
        units = self.lanes.units[self.lane]
        whole_epochs = 0
        while True:
            if unit == len(units):
                epoch, unit, piece = epoch + 1, 0, 0
                whole_epochs += 1
                if whole_epochs == 2:
                    raise BadInput(
                        f"lanes: lane {self.lane} of {len(self.lanes)} has no document to train on; choose fewer."
                    )
            order = np.random.default_rng([self.lanes.seed, epoch, self.lane]).permutation(len(units))
            stream = self._stream(units[order[unit]], epoch, piece)
            if stream is None:
                unit, piece = unit + 1, 0
            elif len(stream.order) == 0:
                piece += 1
            else:
                return _Open(epoch, unit, piece, stream, stream.length - 1)

    def _stream(self, unit: Unit, epoch: int, piece: int) -> TokenStream | None:
        """The shuffled training documents of the unit's piece number `piece`; None behind its last."""
        pieces, number = self.reader.pieces, piece
        if pieces.is_parquet(unit.file):
            groups = pieces.groups(unit.file) or []
            if unit.group is not None:
                order = np.array([unit.group])
            else:
                rng = np.random.default_rng([self.lanes.seed, epoch, self.lane, unit.file])
                order = rng.permutation(len(groups))
            for group in order.tolist():
                if piece < groups[group]:
                    number = sum(groups[:group]) + piece
                    break
                piece -= groups[group]
            else:
                return None
        shard = pieces.shard(unit.file, number)
        if shard is None:
            return None
        table = DocumentTable([shard], shard.domains)
        held = np.isin(shard.key, self.lanes.left_out)
        if self.lanes.held_out is not None:
            held |= self.lanes.held_out.of(unit.file, number, shard.key)
        training = np.flatnonzero(~held)
        rng = np.random.default_rng([self.lanes.seed, epoch, self.lane, unit.file, number])
        return TokenStream(table, rng.permutation(training), self.lanes.eot, self.lanes.token_bytes)
