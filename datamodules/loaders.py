"""The loaders of a data module: training batches with a position that checkpoints carry, and validation batches.

`TrainingLoader` works in any loop that saves its `state_dict()`, a stock Lightning Trainer among them, with or
without the data module. W ranks read micro-batches of B samples: micro-batch m of rank r holds the samples
start + (m*W + r)*B .. + B - 1 of one endless sequence, so the order depends on neither W nor B nor workers.
"""

import contextlib
import os
import re
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler, get_worker_info

from datamodules.met import Met, News, of_all_ranks
from datamodules.packing import MIXED, Batch, FixedWindows, Mark, Rows, WindowReader, Windows
from t6_lightning.common.errors import SourceUnavailable, WorkerDied, require

SECONDS_BETWEEN_LOOKS = 5
"""How often a wait for worker processes is interrupted to ask whether a stop was requested."""

ENDLESS = 1 << 40
"""What `len` says of a training loader whose epoch has no known length.

It is no estimate. Lightning reads a loader without `len` one batch ahead and would lose that batch at every resume.
"""

Lane = tuple[int, int]
"""(index of the source, number of the lane)"""

Marks = dict[Lane, Mark]
"""Where each lane was at some sample, or before it."""


class TrainingSource(Protocol):
    """What a training loader needs from a data module; `TokenData` documents each."""

    streamed: bool
    batch_size: int
    context: int
    seed: int
    met: Met
    news: News

    @property
    def fingerprint(self) -> str: ...
    def training_windows(self, left_out: np.ndarray) -> dict[str, Windows]: ...
    def validation_keys(self) -> np.ndarray: ...
    def windows_per_epoch(self, windows: Mapping[str, Windows]) -> int | None: ...
    def locate(self, sample: int) -> tuple[int, int]: ...
    def order_state(self) -> dict[str, Any]: ...
    def take_up(self, state: Mapping[str, Any]) -> None: ...
    def nothing(self) -> Batch: ...
    def epochs(self) -> dict[str, float]: ...


class Loader(DataLoader):
    """A DataLoader of ready batches that says in one sentence when a worker process died."""

    def __init__(self, dataset: "IterableDataset[Batch]", **options: Any):
        own = {"batch_size": None, "collate_fn": _unchanged, "worker_init_fn": _end_with_parent}
        super().__init__(dataset, **(own | options))
        # DataLoader protects the sampler that it makes; Lightning takes it for one that shuffles.
        object.__setattr__(self, "sampler", _InOrder(dataset))

    def __iter__(self) -> Iterator[Batch]:  # pyright: ignore[reportIncompatibleMethodOverride]
        batches = self._start()
        while batch := self._next(batches):
            yield batch

    def _start(self) -> Iterator[Batch]:
        batches = super().__iter__()
        if self.num_workers:
            _explain_dead_workers()
        return batches

    def _next(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; an empty one at the end."""
        try:
            return next(batches, {})
        except RuntimeError as error:
            if (death := _death(error, batches)) is None:
                raise
            raise death from None
        except (EOFError, OSError) as error:
            if not self.num_workers or "in DataLoader worker process" in str(error):
                raise
            # The memory of a batch went with the worker that made it; that the worker died is known a moment later.
            time.sleep(1)
            raise _died(batches) from None


class TrainingLoader(Loader):
    """Training batches of one rank, in epochs, from a position that `state_dict` saves.

    An iteration gives what is left of the present epoch; the next one gives the next epoch. An epoch is as many
    whole micro-batches as one pass over the windows fills, a multiple of `accumulate`; the sequence of samples goes
    on over its end, so none is left out. Of a stream, whose length only reading tells, an epoch never ends.

    Args:
        data: Gives the windows and their order.
        ranks: (this rank, number of ranks); None takes those of torch.distributed once it is initialized, else 0 of 1.
        accumulate: Micro-batches of one optimizer step.
        overfit: Every epoch begins at the same sample.
        stop_requested: See `hold_when_cut_off`.
        options: Those of `DataLoader`.
    """

    dataset: "TrainingStream"  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        data: TrainingSource,
        ranks: tuple[int, int] | None = None,
        accumulate: int = 1,
        overfit: bool = False,
        stop_requested: Callable[[], bool] | None = None,
        **options: Any,
    ):
        if options.get("num_workers"):
            options.setdefault("timeout", SECONDS_BETWEEN_LOOKS)
        super().__init__(TrainingStream(data), **options)
        object.__setattr__(self, "sampler", _InOrder(self.dataset, self.set_epoch))
        self.data, self.accumulate, self.overfit = data, accumulate, overfit
        self._ranks = ranks
        self._stop_requested = stop_requested
        self.samples = 0
        """Samples handed out over all ranks since training began."""
        self.epoch, self.epoch_start = 0, 0
        """The present epoch, and `samples` at its beginning."""
        self.seconds_waited = 0.0
        """How long this process has waited for batches."""
        self.cut_off: str | None = None
        """Why the source cannot be reached any more, since the last batch is held."""
        self._windows: dict[str, Windows] | None = None
        self._marks: Marks = {}
        self._recent: deque[tuple[int, torch.Tensor]] = deque()
        """(highest sample, marks int64 (B, 7): source, lane, mark) of the batches of the last optimizer steps."""
        self._untouched = True
        """Whether no state was loaded and nothing handed out."""
        self._loaded: dict[str, Any] | None = None
        """The state that was loaded, until something is handed out."""

    @property
    def ranks(self) -> tuple[int, int]:
        """(this rank, number of ranks)"""
        return self._ranks or _ranks_now()

    @property
    def batch(self) -> int:
        """Samples of one micro-batch over all ranks."""
        return self.data.batch_size * self.ranks[1]

    @property
    def windows(self) -> dict[str, Windows]:
        """Name -> windows, as the data module gives them."""
        if self._windows is None:
            self._windows = self.data.training_windows(self.data.validation_keys())
            self.data.met.add(self.data.news.take())
        return self._windows

    @property
    def length(self) -> int | None:
        """Micro-batches of an epoch on each rank; None where only reading tells."""
        windows = self.data.windows_per_epoch(self.windows)
        if windows is None:
            return None
        steps = windows // (self.batch * self.accumulate)
        return max(1, steps) * self.accumulate

    @property
    def batches_into_epoch(self) -> int:
        """Micro-batches of the present epoch that were handed out."""
        return (self.samples - self.epoch_start) // self.batch

    def __len__(self) -> int:
        return self.length or ENDLESS

    # The position.

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch. Lightning calls it through the sampler, at the beginning and in the middle of epochs.

        A loader that was given no state and has handed out nothing goes to the place of that epoch: Lightning does
        not load the states of loaders from a checkpoint that a run of `max_epochs` wrote at the end of an epoch.
        """
        if epoch == self.epoch:
            return
        if self._untouched and self.length is not None and not self.overfit:
            self.samples = epoch * self.length * self.batch
        self._begin_epoch(epoch)

    def _begin_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if self.overfit:
            self.rewind(self.epoch_start)
        self.epoch_start = self.samples

    def state_dict(self) -> dict[str, Any]:
        """The position, in plain values. Of streams, every rank must call it: each knows the lanes that it reads."""
        state: dict[str, Any] = {
            "samples": self.samples,
            "epoch": self.epoch,
            "epoch_start": self.epoch_start,
            "batch": self.batch,
            "accumulate": self.accumulate,
            "length": self.length or 0,
            "seed": self.data.seed,
            "context": self.data.context,
            "fingerprint": self.data.fingerprint,
        }
        if self.data.streamed:
            state |= {"order": self.data.order_state(), "lanes": self._lanes_of_all_ranks()}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the saved position, in the saved order, from the next iteration on.

        With other ranks, batch size, accumulation or data than those of the state, an epoch begins here, as it does
        with states of the time when there were no epochs. A state that was just loaded may be loaded again.

        Raises:
            BadInput: a position that is no number of samples.
        """
        if state_dict == self._loaded:
            return
        for name in ("samples", "epoch", "epoch_start"):
            value = state_dict.get(name, 0)
            is_count = type(value) is int and value >= 0
            require(is_count, f"the data's saved {name}", value, "it must be an integer >= 0")
        order = self.data.seed, self.data.order_state()
        self.data.take_up(state_dict)
        if order != (self.data.seed, self.data.order_state()):
            self._windows = None
        self.samples = state_dict["samples"]
        shape = {"batch": self.batch, "accumulate": self.accumulate, "length": self.length or 0}
        same = shape.items() <= state_dict.items()
        self.epoch_start = state_dict["epoch_start"] if same else self.samples
        self.epoch = state_dict.get("epoch", 0)
        self._recent.clear()
        self._marks = {
            (int(source), lane): (window, epoch, unit, piece, position)
            for source, rows in state_dict.get("lanes", {}).items()
            for lane, window, epoch, unit, piece, position in rows
        }
        self._loaded, self._untouched = state_dict, False

    def rewind(self, samples: int) -> None:
        """Go back to an earlier count of `samples` of this run, from the next iteration on.

        It is quick for up to `accumulate` micro-batches of a stream; further back its lanes are read from their start.
        """
        if samples > self.samples:
            raise ValueError(f"samples={samples} is not possible: only {self.samples} were handed out")
        while self._recent and self._recent[-1][0] >= samples:
            self._recent.pop()
        self.samples = samples
        self.epoch_start = min(self.epoch_start, samples)
        self._loaded = None

    @property
    def marks(self) -> Marks:
        """Where the lanes that this rank has read were at `samples`, or before."""
        marks = dict(self._marks)
        for _, rows in self._recent:
            _note(marks, rows)
        return marks

    def _lanes_of_all_ranks(self) -> dict[str, list[list[int]]]:
        """source -> [lane, *mark] of each lane that was read, as plain lists."""
        latest: Marks = {}
        for marks in of_all_ranks(self.marks):
            for lane, mark in marks.items():
                latest[lane] = max(mark, latest.get(lane, mark))
        found: dict[str, list[list[int]]] = {}
        for (source, lane), mark in sorted(latest.items()):
            found.setdefault(str(source), []).append([lane, *mark])
        return found

    # The batches.

    def hold_when_cut_off(self, stop_requested: Callable[[], bool]) -> None:
        """See `TokenData.hold_when_cut_off`."""
        self._stop_requested = stop_requested

    def __iter__(self) -> Iterator[Batch]:
        left = None
        if self.length is not None:
            if self.batches_into_epoch >= self.length:
                self._begin_epoch(self.epoch + 1)
            left = self.length - self.batches_into_epoch
        self.dataset.begin(self.windows, *self.ranks, self.samples, self.marks, left)
        batch: Batch = {}
        try:
            batches = self._start()
            while True:
                began = time.perf_counter()
                coming = self._next(batches)
                self.seconds_waited += time.perf_counter() - began
                if not coming:
                    return
                batch = self._hand_out(coming)
                yield dict(batch)
        except SourceUnavailable as error:
            if self._stop_requested is None:
                raise
            self.cut_off = str(error)
        batch = batch or self.data.nothing()
        while True:
            yield dict(batch)

    def _next(self, batches: Iterator[Batch]) -> Batch:
        while True:
            try:
                return super()._next(batches)
            except RuntimeError as error:
                if not str(error).startswith("DataLoader timed out"):
                    raise
            if self._stop_requested is not None and self._stop_requested():
                raise SourceUnavailable(
                    "stopped by a signal while data was waited for: go on with the same command"
                )

    def _hand_out(self, batch: dict[str, Any]) -> Batch:
        """Take out of a batch what concerns the loader alone, and count it."""
        if (marks := batch.pop("marks", None)) is not None:
            self._recent.append((int(batch["sample"].max()), marks))
            while len(self._recent) > self.accumulate + 1:
                _note(self._marks, self._recent.popleft()[1])
        if (faults := batch.pop("faults", None)) is not None:
            self.data.met.add(Met(*map(Counter, faults)))
        self.samples += self.batch
        self._untouched, self._loaded = False, None
        return batch


class TrainingStream(IterableDataset):
    """Micro-batches of one rank. Worker k of n yields numbers k, k + n, ...; the loader asks them in turn."""

    def __init__(self, data: TrainingSource):
        self.data = data
        self.windows: list[Windows] = []
        self.rank, self.world, self.start, self.left = 0, 1, 0, None
        self.marks: Marks = {}

    def begin(
        self, windows: dict[str, Windows], rank: int, world: int, start: int, marks: Marks, left: int | None
    ) -> None:
        """Where the next iteration starts, and after how many micro-batches it ends; None: never."""
        self.windows = list(windows.values())
        self.rank, self.world, self.start, self.marks, self.left = rank, world, start, marks, left

    def __iter__(self) -> Iterator[Batch]:
        readers = [
            windows.reader({lane: mark for (number, lane), mark in self.marks.items() if number == source})
            for source, windows in enumerate(self.windows)
        ]
        micro_batch, step = _worker()
        try:
            while self.left is None or micro_batch < self.left:
                first = self.start + (micro_batch * self.world + self.rank) * self.data.batch_size
                yield self._batch(readers, first)
                micro_batch += step
        finally:
            for reader in readers:
                reader.close()

    def _batch(self, readers: list[WindowReader], first: int) -> Batch:
        size = self.data.batch_size
        places = [self.data.locate(sample) for sample in range(first, first + size)]
        for source, reader in enumerate(readers):
            reader.prepare([window for number, window in places if number == source])
        rows = Rows(size, self.data.context)
        seen = [
            (source, readers[source].read(rows, row, window)) for row, (source, window) in enumerate(places)
        ]
        batch: dict[str, Any] = rows.batch(np.full(size, MIXED), np.arange(first, first + size))
        if any(lane is not None for _, lane in seen):
            nothing = (-1,) * 7
            marks = [nothing if lane is None else (source, *lane) for source, lane in seen]
            batch["marks"] = torch.from_numpy(np.array(marks))
        met = self.data.news.take()
        if met.passing or met.damage:
            batch["faults"] = (
                dict(met.passing),
                dict(met.damage),
            )  # pinning memory doubles what a Counter holds
        return batch


class EvaluationStream(IterableDataset):
    """Fixed windows in their order, dealt over ranks: rank r of W gets batches r, r + W, ...

    Args:
        windows: All windows.
        batch_size, context: Rows per batch; tokens per row.
        ranks: (this rank, number of ranks); None takes those of torch.distributed once it is initialized, else 0 of 1.
        padded: Every rank gets equally many batches; one that would have fewer gets one without targets at the end.
    """

    def __init__(
        self,
        windows: FixedWindows,
        batch_size: int,
        context: int,
        ranks: tuple[int, int] | None = None,
        padded: bool = False,
    ):
        self.windows, self.batch_size, self.context = windows, batch_size, context
        self.ranks, self.padded = ranks, padded

    def __getstate__(self) -> dict[str, Any]:  # worker processes know nothing of torch.distributed
        return self.__dict__ | {"ranks": self.ranks or _ranks_now()}

    def _numbers(self) -> range:
        """Numbers of this rank's batches; one beyond the last stands for a batch without targets."""
        rank, world = self.ranks or _ranks_now()
        n = -(-len(self.windows) // self.batch_size)
        return range(rank, -(-n // world) * world if self.padded else n, world)

    def __len__(self) -> int:
        return len(self._numbers())

    def __iter__(self) -> Iterator[Batch]:
        worker, step = _worker()
        for number in self._numbers()[worker::step]:
            first = number * self.batch_size
            if first < len(self.windows):
                yield self.windows.batch(first, self.batch_size)
            else:
                yield without_text(self.batch_size, self.context, domain=0)


class _InOrder(SequentialSampler):
    """Says that nothing is shuffled here, and takes the number of each epoch, which Lightning gives to samplers."""

    def __init__(self, dataset: "IterableDataset[Batch]", set_epoch: Callable[[int], None] | None = None):
        super().__init__(dataset)  # pyright: ignore[reportArgumentType]
        if set_epoch is not None:
            self.set_epoch = set_epoch

    def __iter__(self) -> Iterator[Any]:  # an IterableDataset is asked for None, again and again
        while True:
            yield None


def without_text(batch_size: int, context: int, domain: int = MIXED) -> Batch:
    """A batch without targets: all of them are -100."""
    return Rows(batch_size, context).batch(np.full(batch_size, domain), np.full(batch_size, -1))


def _note(marks: Marks, rows: torch.Tensor) -> None:
    for source, lane, *mark in rows.tolist():
        if source >= 0:
            marks[source, lane] = tuple(mark)


def _ranks_now() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _worker() -> tuple[int, int]:
    info = get_worker_info()
    return (info.id, info.num_workers) if info is not None else (0, 1)


def _unchanged(batch: Batch) -> Batch:
    """In place of torch's own, which would search every batch for arrays to convert."""
    return batch


def _end_with_parent(worker: int) -> None:
    """Let a worker process end by its parent's SIGTERM alone.

    One that is sent to all processes of a job asks for a checkpoint after the present step, which may need batches.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    parent = os.getppid()
    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _death(error: BaseException | None, batches: Iterator[Batch] | None = None) -> WorkerDied | None:
    """What torch says of dead workers, in a sentence; None of other errors."""
    if error is None or isinstance(error, WorkerDied):
        return error
    told = re.match(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is )?([^.]*)", str(error))
    if told is None:
        return None
    return _death(error.__cause__) or _died(batches, told[1], told[2].strip())


def _died(
    batches: Iterator[Batch] | None, process: str = "", reason: str = "exited unexpectedly"
) -> WorkerDied:
    for worker in getattr(batches, "_workers", ()):
        if worker.exitcode and not reason.startswith("killed"):
            process, code = str(worker.pid), worker.exitcode
            reason = (
                f"killed by signal: {signal.strsignal(-code)}"
                if code < 0
                else f"exited with exit code {code}"
            )
    was = "was " if reason.startswith("killed") else ""
    return WorkerDied(
        f"num_workers: worker process {process} of the data loader {was}{reason}: most often memory ran out; give the "
        "job more memory or set fewer workers, and the same command goes on from the last checkpoint"
    )


def _explain_dead_workers() -> None:
    """Raise WorkerDied in place of torch's RuntimeError, which its handler of SIGCHLD raises wherever training is."""
    inner = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    if not callable(inner) or isinstance(inner, _Explained):
        return
    if threading.current_thread() is threading.main_thread():
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGCHLD, _Explained(inner))


class _Explained:
    def __init__(self, inner: Callable[[int, Any], Any]):
        self.inner = inner

    def __call__(self, signum: int, frame: Any) -> None:
        try:
            self.inner(signum, frame)
        except RuntimeError as error:
            if (death := _death(error)) is None:
                raise
            raise death from None
