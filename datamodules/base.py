"""The Lightning side of a corpus: what every data module shares."""

import logging
import os
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from datamodules.documents import Document
from datamodules.met import Met, News, of_all_ranks
from datamodules.packing import MIXED, Batch, FixedWindows, Mark, Rows, WindowReader, Windows
from datamodules.tokenizer import Tokenizer, load_tokenizer
from t6_lightning.common.errors import BadInput, SourceUnavailable

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 5
"""How long loader processes are waited for before `asked_to_stop` is looked at."""

ENDLESS = 1 << 40
"""Length that the training stream claims: Lightning drops a batch per resume of a stream without one."""


class TokenData(LightningDataModule, ABC):
    """Packed windows of a corpus, with held-out validation and a position that checkpoints carry.

    Args:
        tokenizer: "bpe" (byte-level, trained on the corpus at first use), "bytes", a folder or a hub name.
        vocab_size: Symbols of "bpe", separator included; other tokenizers have their own.
        batch_size: Sequences per micro-batch and rank.
        context: Tokens per sequence.
        val_tokens: At most this many validation tokens per domain, in whole documents; null takes all.
        num_workers: Loader processes; the order of samples does not depend on it.
        seed: Of the order of documents and windows.
    """

    def __init__(
        self,
        tokenizer: str = "bpe",
        vocab_size: int = 8192,
        batch_size: int = 8,
        context: int = 512,
        val_tokens: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        lowest = {"batch_size": 1, "context": 1, "num_workers": 0, "seed": 0}
        given = {"batch_size": batch_size, "context": context, "num_workers": num_workers, "seed": seed}
        for name, value in given.items():
            if value < lowest[name]:
                raise BadInput(f"{name}: {value} is not allowed; allowed: {lowest[name]} or more.")
        if val_tokens is not None and val_tokens < 1:
            raise BadInput(f"val_tokens: {val_tokens} is not allowed; allowed: 1 or more, or null for all.")
        self.tokenizer_spec, self.vocab_size = tokenizer, vocab_size
        self.batch_size, self.context, self.val_tokens = batch_size, context, val_tokens
        self.num_workers, self.seed = num_workers, seed
        self._position = _Position()
        self._windows: dict[str, Windows] = {}
        self._met = Met()
        self._news = News()
        self.repeats_when_cut_off = False
        """Whether, where a source cannot be reached any more, the last training batch (one of nothing before the
        first) comes again and again and `cut_off` says why, so that all ranks can stop at one step; otherwise
        SourceUnavailable is raised."""
        self.cut_off: str | None = None
        self.asked_to_stop: Callable[[], bool] = lambda: False
        """Looked at while a batch is waited for, by who `repeats_when_cut_off`: a hub that is away is a long wait."""
        self.seconds_waited = 0.0
        """How long this process has waited for training batches, as its clock counts."""

    # What a corpus provides.

    streamed = False
    """Whether checkpoints carry the places of lanes."""

    @property
    @abstractmethod
    def domains(self) -> list[str]:
        """Names of the validation domains; a batch's `domain` is an index into it."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 (hex) of the data, its tokens and the split: equal for equal data on any machine."""

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """Counts, and what simple models reach on the validation text."""

    @abstractmethod
    def training_windows(self, left_out: np.ndarray) -> dict[str, Windows]:
        """Name -> windows to train on, without the documents whose hash (uint64) is in `left_out`."""

    @abstractmethod
    def validation_windows(self) -> FixedWindows:
        """All validation windows, domain after domain."""

    @abstractmethod
    def validation_keys(self) -> np.ndarray:
        """Sorted hashes of the validation documents, uint64."""

    def locate(self, sample: int) -> tuple[int, int]:
        """Sample -> (index into `training_windows`, number of the window there)."""
        return 0, sample

    def samples_of_each(self) -> list[int]:
        """Training samples consumed so far, of each of the `training_windows`."""
        return [self.samples]

    @abstractmethod
    def tokenizer_texts(self) -> Iterator[str]:
        """Texts to train a tokenizer on, without held-out documents."""

    @abstractmethod
    def example_documents(self, number: int) -> Iterator[Document]:
        """Some training documents to look at."""

    @abstractmethod
    def corpus_identity(self) -> str:
        """sha256 (hex) of where the texts come from; a trained tokenizer is kept by it."""

    def order_state(self) -> dict[str, Any]:
        """What else the order of samples depends on, for checkpoints: plain values."""
        return {}

    def restore_order(self, state: dict[str, Any]) -> None:
        """Take up the order of a checkpoint."""

    # What the training side uses.

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(
            self.tokenizer_spec, self.vocab_size, self.tokenizer_texts, self.corpus_identity()
        )

    @property
    def samples(self) -> int:
        """Training samples consumed so far over all ranks. Who trains advances it; loaders begin there."""
        return self._position.samples

    @samples.setter
    def samples(self, samples: int) -> None:
        self._position.samples = samples

    @property
    def faults(self) -> Counter[str]:
        """kind of fault in reading -> how often this rank met it in preparation and while its batches so far were
        made; damage of the same place in the data counts once, however many loader processes read it."""
        return self._met.by_kind()

    def faults_of_all_ranks(self) -> Counter[str]:
        """`faults` of all ranks, what several read counted once. With several ranks all of them must call it."""
        together = Met()
        for met in of_all_ranks(self._met):
            together.add(met)
        return together.by_kind()

    def prepare_data(self) -> None:
        """Train the tokenizer and fill the token cache where they are missing. Raises BadInput."""
        _ = self.domains

    def setup(self, stage: str | None = None) -> None:
        _ = self.domains

    def train_dataloader(self) -> DataLoader:
        """An endless loader from `samples` on: micro-batch m of rank r of W holds the samples
        start + (m*W + r)*B .. + B - 1."""
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        self._windows = self.training_windows(self.validation_keys())
        self._met.add(self._news.take())
        return self._loader(_TrainingStream(self, self._windows, rank, world))

    def epochs(self) -> dict[str, float]:
        """How often each of the `training_windows` has been gone through since training began.

        Of a stream, whose length nobody knows beforehand, the whole times of the furthest of the lanes that this
        rank has read. Empty before `train_dataloader`.
        """
        self._position.settle()
        found = {}
        for source, (name, windows) in enumerate(self._windows.items()):
            if windows.per_epoch:
                found[name] = self.samples_of_each()[source] / windows.per_epoch
            else:
                marks = [mark for (number, _), mark in self._position.marks.items() if number == source]
                found[name] = float(max((epoch for _, epoch, *_ in marks), default=0))
        return found

    def val_dataloader(self) -> DataLoader:
        """All validation windows in a fixed order, the same on every rank."""
        return self._loader(_ValidationStream(self.validation_windows(), self.batch_size))

    def test_dataloader(self) -> DataLoader:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader:
        return self.val_dataloader()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Take out of a batch what concerns the data alone: where its lanes go on, and faults on the way."""
        if "marks" in batch:
            self._position.coming.append((int(batch["sample"].max()), batch.pop("marks")))
        if "faults" in batch:
            self._met.add(Met(*batch.pop("faults")))
        self.cut_off = batch.pop("cut_off", self.cut_off)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position. With several ranks all of them must call it: each knows the lanes that it reads."""
        state = {
            "samples": self.samples,
            "seed": self.seed,
            "context": self.context,
            "fingerprint": self.fingerprint,
        }
        if self.streamed:
            state |= {"order": self.order_state(), "lanes": self._position.marks_of_all_ranks()}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the saved position, in the saved order. Warns when the data is not the same."""
        if "order" in state_dict:
            self.restore_order(state_dict["order"])
        if state_dict["fingerprint"] != self.fingerprint:
            log.warning(
                "THE DATA HAS CHANGED: the checkpoint was trained on data %s and goes on with data %s; its "
                "position means other text now, and its validation figures cannot be compared.",
                state_dict["fingerprint"][:12],
                self.fingerprint[:12],
            )
        if state_dict["context"] != self.context:
            log.warning(
                "CONTEXT HAS CHANGED from %d to %d: the text is cut anew and parts of it may come again.",
                state_dict["context"],
                self.context,
            )
        if state_dict["seed"] != self.seed:
            log.warning(
                "The order of samples keeps the checkpoint's seed %d, not %d.", state_dict["seed"], self.seed
            )
        self.seed = state_dict["seed"]
        self.samples = state_dict["samples"]
        self._position.restore(state_dict.get("lanes", {}))

    def nothing(self) -> Batch:
        """A micro-batch without text, for a rank that cannot even read its first one."""
        size = self.batch_size
        return Rows(size, self.context).batch(np.full(size, MIXED), np.arange(size))

    def _loader(self, stream: "IterableDataset[Batch]") -> DataLoader:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        # The loader draws a seed whenever it is iterated. From its own generator: the global one belongs to
        # the model, and a resumed run must find it where it was.
        generator = torch.Generator().manual_seed(self.seed)
        return _Loader(
            stream,
            self,
            batch_size=None,
            collate_fn=_as_it_is,  # torch's own would look into every batch for arrays to convert
            num_workers=self.num_workers,
            worker_init_fn=_end_with_parent,
            generator=generator,
            pin_memory=on_gpu,
            timeout=SECONDS_BETWEEN_LOOKS if self.num_workers else 0,
        )


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _end_with_parent(worker: int) -> None:
    """Let a loader process end by its parent's SIGTERM alone.

    One that is sent to all processes of a job asks for a checkpoint after the present step, which may need batches.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class _Loader(DataLoader):
    def __init__(self, stream: "IterableDataset[Batch]", data: TokenData, **options: Any):
        super().__init__(stream, **options)
        self._data = data
        self._trains = isinstance(stream, _TrainingStream)

    def __iter__(self) -> Iterator[Batch]:  # pyright: ignore[reportIncompatibleMethodOverride]
        batch: Batch = {}
        try:
            batches = super().__iter__()
            while True:
                began = time.perf_counter()
                batch = self._next(batches)
                if not batch:
                    return
                if self._trains:
                    self._data.seconds_waited += time.perf_counter() - began
                yield dict(batch)
        except SourceUnavailable as error:
            if not self._repeats:
                raise
            batch = batch or self._data.nothing()
            repeated: dict[str, Any] = {
                name: value for name, value in batch.items() if name not in ("marks", "faults")
            }
            repeated["cut_off"] = str(error)
            while True:
                yield dict(repeated)

    @property
    def _repeats(self) -> bool:
        return self._data.repeats_when_cut_off and self._trains

    def _next(self, batches: Iterator[Batch]) -> Batch:
        while True:
            try:
                return next(batches, {})
            except RuntimeError as error:
                if not str(error).startswith("DataLoader timed out"):
                    raise
            if self._repeats and self._data.asked_to_stop():
                raise SourceUnavailable(
                    "stopped by a signal while data was waited for: go on with the same command"
                )


Lane = tuple[int, int]
"""(index of the source, number of the lane)"""


@dataclass
class _Position:
    """Shared by the data module and its streams, so that a loader iterated later begins where training is."""

    samples: int = 0
    marks: dict[Lane, Mark] = field(default_factory=dict)
    """Where each lane was when `samples` were trained, or some time before."""
    coming: deque[tuple[int, torch.Tensor]] = field(default_factory=deque)
    """(highest sample, marks int64 (B, 7): source, lane, mark) of batches, until they are trained."""

    def settle(self) -> None:
        """Take over the marks of the batches that are trained."""
        while self.coming and self.coming[0][0] < self.samples:
            for source, lane, *mark in self.coming.popleft()[1].tolist():
                if source >= 0:
                    self.marks[source, lane] = tuple(mark)

    def marks_of_all_ranks(self) -> dict[str, list[list[int]]]:
        """source -> [lane, *mark] of each lane that was read, as plain lists."""
        self.settle()
        latest: dict[Lane, Mark] = {}
        for marks in of_all_ranks(self.marks):
            for lane, mark in marks.items():
                latest[lane] = max(mark, latest.get(lane, mark))
        found: dict[str, list[list[int]]] = {}
        for (source, lane), mark in sorted(latest.items()):
            found.setdefault(str(source), []).append([lane, *mark])
        return found

    def restore(self, saved: Mapping[str, Sequence[Sequence[int]]]) -> None:
        self.coming.clear()
        self.marks = {
            (int(source), lane): (window, epoch, unit, piece, position)
            for source, rows in saved.items()
            for lane, window, epoch, unit, piece, position in rows
        }


class _TrainingStream(IterableDataset):
    """Micro-batches of one rank. Worker k of n yields numbers k, k + n, ...; the loader asks them in turn."""

    def __init__(self, data: TokenData, windows: dict[str, Windows], rank: int, world: int):
        self.windows, self.rank, self.world = list(windows.values()), rank, world
        self.position, self.locate = data._position, data.locate
        self.batch_size, self.context = data.batch_size, data.context
        self.news = data._news

    def __len__(self) -> int:
        return ENDLESS

    def __iter__(self) -> Iterator[Batch]:
        self.position.settle()
        start, marks = self.position.samples, self.position.marks
        readers = [
            windows.reader({lane: mark for (number, lane), mark in marks.items() if number == source})
            for source, windows in enumerate(self.windows)
        ]
        micro_batch, step = _worker()
        try:
            while True:
                first = start + (micro_batch * self.world + self.rank) * self.batch_size
                yield self._batch(readers, first)
                micro_batch += step
        finally:
            for reader in readers:
                reader.close()

    def _batch(self, readers: list[WindowReader], first: int) -> Batch:
        places = [self.locate(sample) for sample in range(first, first + self.batch_size)]
        for source, reader in enumerate(readers):
            reader.prepare([window for number, window in places if number == source])
        rows = Rows(self.batch_size, self.context)
        seen = [
            (source, readers[source].read(rows, row, window)) for row, (source, window) in enumerate(places)
        ]
        samples = np.arange(first, first + self.batch_size)
        batch: dict[str, Any] = rows.batch(np.full(self.batch_size, MIXED), samples)
        if any(lane is not None for _, lane in seen):
            nothing = (-1,) * 7
            marks = [nothing if lane is None else (source, *lane) for source, lane in seen]
            batch["marks"] = torch.from_numpy(np.array(marks))
        met = self.news.take()
        if met.passing or met.damage:
            batch["faults"] = met.passing, met.damage
        return batch


class _ValidationStream(IterableDataset):
    def __init__(self, windows: FixedWindows, batch_size: int):
        self.windows, self.batch_size = windows, batch_size

    def __len__(self) -> int:
        return -(-len(self.windows) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        worker, step = _worker()
        for batch in range(worker, len(self), step):
            yield self.windows.batch(batch * self.batch_size, self.batch_size)


def _worker() -> tuple[int, int]:
    info = get_worker_info()
    return (info.id, info.num_workers) if info is not None else (0, 1)
