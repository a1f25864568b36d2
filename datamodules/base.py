"""The Lightning side of a corpus: what every data module shares."""

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from torch.utils.data import DataLoader

from datamodules.documents import Document
from datamodules.limits import MAX_BATCH_SIZE, MAX_BATCH_TOKENS, MAX_CONTEXT, MAX_SEED, max_workers
from datamodules.loaders import EvaluationStream, Loader, TrainingLoader, without_text
from datamodules.met import Met, News, of_all_ranks
from datamodules.packing import Batch, FixedWindows, Windows
from datamodules.tokenizer import Tokenizer, load_tokenizer
from t6_lightning.common.errors import BadInput

log = logging.getLogger(__name__)


class TokenData(LightningDataModule, ABC):
    """Packed windows of a corpus, with held-out validation and a position that checkpoints carry.

    It serves any LightningModule and a stock Trainer resumes exactly: `state_dict` and `load_state_dict` are the
    hooks that Lightning calls, and the training loader carries the same state for loops that use it alone.

    A training batch holds tokens, targets, documents (B, T), n_bytes, domain and sample (B,); see `Rows.batch`.

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
        for name, value, least, most in (
            ("batch_size", batch_size, 1, MAX_BATCH_SIZE),
            ("context", context, 1, MAX_CONTEXT),
            ("num_workers", num_workers, 0, max_workers()),
            ("seed", seed, 0, MAX_SEED),
            ("batch_size * context", batch_size * context, 1, MAX_BATCH_TOKENS),
        ):
            if not least <= value <= most:
                raise BadInput(f"{name}: {value:,} is not allowed; allowed: {least} to {most:,}.")
        if val_tokens is not None and val_tokens < 1:
            raise BadInput(f"val_tokens: {val_tokens} is not allowed; allowed: 1 or more, or null for all.")
        self.tokenizer_spec, self.vocab_size = tokenizer, vocab_size
        self.batch_size, self.context, self.val_tokens = batch_size, context, val_tokens
        self.num_workers, self.seed = num_workers, seed
        self.met, self.news = Met(), News()
        """What went wrong in reading: so far on this rank, and since this process was last asked."""
        self._train_loader: TrainingLoader | None = None
        self._pending: dict[str, Any] | None = None
        """A state that the next training loader takes up."""
        self._taken_up: dict[str, Any] | None = None
        """What `take_up` was last given."""
        self._stop_requested: Callable[[], bool] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes that are not forked: without trainer and loaders."""
        left_out = ("trainer", "_train_loader", "_stop_requested")
        return self.__dict__ | dict.fromkeys(left_out)

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

    def test_windows(self) -> FixedWindows:
        """All windows to test on: those of validation where the corpus has no test split of its own."""
        return self.validation_windows()

    def windows_per_epoch(self, windows: Mapping[str, Windows]) -> int | None:
        """Training windows of one pass; None of streams and mixtures, which have no length that is known."""
        return None if self.streamed else sum(each.per_epoch or 0 for each in windows.values()) or None

    def locate(self, sample: int) -> tuple[int, int]:
        """Sample -> (index into `training_windows`, number of the window there)."""
        return 0, sample

    def samples_of_each(self) -> list[int]:
        """Training samples handed out so far, of each of the `training_windows`."""
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
    def train_loader(self) -> TrainingLoader | None:
        """The newest training loader."""
        return self._train_loader

    @property
    def samples(self) -> int:
        """Training samples handed out so far over all ranks."""
        if self._pending is not None:
            return self._pending["samples"]
        return self._train_loader.samples if self._train_loader is not None else 0

    @property
    def seconds_waited(self) -> float:
        """How long this process has waited for batches of the newest training loader."""
        return self._train_loader.seconds_waited if self._train_loader else 0.0

    @property
    def faults(self) -> Counter[str]:
        """kind of fault in reading -> how often this rank met it in preparation and while its batches so far were
        made; damage of the same place in the data counts once, however many loader processes read it."""
        return self.met.by_kind()

    def faults_of_all_ranks(self) -> Counter[str]:
        """`faults` of all ranks, what several read counted once. With several ranks all of them must call it."""
        together = Met()
        for met in of_all_ranks(self.met):
            together.add(met)
        return together.by_kind()

    def check_sources(self) -> None:
        """Refuse local files and folders that are not there or cannot be opened. Reads no text, asks no network.

        Raises:
            BadInput: naming the setting or the file.
        """

    def prepare_data(self) -> None:
        """Train the tokenizer and fill the token cache where they are missing. Raises BadInput."""
        _ = self.domains

    def setup(self, stage: str | None = None) -> None:
        _ = self.domains

    def train_dataloader(self) -> TrainingLoader:
        """A training loader that starts where the state says that was loaded last, else at the beginning.

        Called again by the Trainer that trains on its loader (`reload_dataloaders_every_n_epochs`), it goes on there.
        """
        newest, state = self._train_loader, self._pending
        if state is None and newest is not None and getattr(self.trainer, "train_dataloader", None) is newest:
            state = newest.state_dict()
        loader = self._training_loader(state)
        if loader.length is None:
            self.check_epochs(self.trainer)
        self._train_loader, self._pending = loader, None
        return loader

    def check_epochs(self, trainer: Any) -> None:
        """Refuse `max_epochs` where an epoch has no end. Raises BadInput."""
        if not self.streamed or trainer is None or trainer.max_epochs in (None, -1):
            return
        # An epoch of so many batches has a length for Lightning.
        if isinstance(trainer.limit_train_batches, int) or trainer.overfit_batches > 0:
            return
        raise BadInput(
            f"trainer.max_epochs={trainer.max_epochs} is not possible: {type(self).__name__} is a stream "
            "of unknown length: set trainer.max_steps (max_epochs -1)"
        )

    def _training_loader(self, state: dict[str, Any] | None) -> TrainingLoader:
        trainer: Any = self.trainer
        loader = TrainingLoader(
            self,
            ranks=self._ranks,
            accumulate=trainer.accumulate_grad_batches if trainer else 1,
            overfit=trainer is not None and trainer.overfit_batches > 0,
            stop_requested=self._stop_requested,
            **self._options(),
        )
        if state is not None:
            loader.load_state_dict(state)
        return loader

    def batches_into_epoch(self) -> int:
        """How many micro-batches of its present epoch the next training loader counts as handed out.

        Lightning's progress has a count of its own; the two differ where ranks, batch size or accumulation changed.
        """
        return self._training_loader(self._pending).batches_into_epoch if self._pending else 0

    def hold_when_cut_off(self, stop_requested: Callable[[], bool]) -> None:
        """Where a source cannot be reached any more, hold the last training batch instead of raising.

        With several ranks one of them meets the fault first. If it raised, the others would wait for it for ever in
        their next collective operation. So its loader gives its last batch (one without text before the first) again
        and again, and `train_loader.cut_off` says why: the training loop asks all ranks once a step, and all stop at
        the same one. `samples` does not count what is held.

        Args:
            stop_requested: Polled while waiting for worker processes; True (a signal came) ends the wait in the same
                way, because a hub that is away is a long wait.
        """
        self._stop_requested = stop_requested
        if self._train_loader is not None:
            self._train_loader.hold_when_cut_off(stop_requested)

    def epochs(self) -> dict[str, float]:
        """How often each of the `training_windows` has been gone through since training began.

        Of a stream, whose length nobody knows beforehand, the whole times of the furthest of the lanes that this
        rank has read. Empty before `train_dataloader`.
        """
        if self._train_loader is None:
            return {}
        found = {}
        marks = self._train_loader.marks
        for source, (name, windows) in enumerate(self._train_loader.windows.items()):
            if windows.per_epoch:
                found[name] = self.samples_of_each()[source] / windows.per_epoch
            else:
                epochs = [epoch for (number, _), (_, epoch, *_) in marks.items() if number == source]
                found[name] = float(max(epochs, default=0))
        return found

    def val_dataloader(self) -> DataLoader:
        """All validation windows in a fixed order, batches dealt over the ranks."""
        return self._evaluation_loader(self.validation_windows())

    def test_dataloader(self) -> DataLoader:
        """All test windows in a fixed order, batches dealt over the ranks."""
        return self._evaluation_loader(self.test_windows())

    def predict_dataloader(self) -> DataLoader:
        """All validation windows in a fixed order, the same on every rank."""
        windows = self.validation_windows()
        return Loader(
            EvaluationStream(windows, self.batch_size, self.context, ranks=(0, 1)), **self._options()
        )

    def _evaluation_loader(self, windows: FixedWindows) -> DataLoader:
        strategy = self.trainer.strategy if self.trainer else None
        # The forward pass of a sharded model is a collective operation: all ranks need equally many.
        sharded = strategy is not None and (
            not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy))
            or isinstance(strategy, DeepSpeedStrategy)
        )
        # Else a rank may have no batch where there are fewer batches than ranks.
        self.allow_zero_length_dataloader_with_multiple_devices = not sharded
        return Loader(
            EvaluationStream(windows, self.batch_size, self.context, self._ranks, padded=sharded),
            **self._options(),
        )

    @property
    def _ranks(self) -> tuple[int, int] | None:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else None

    def _options(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            # A loader draws a seed whenever it is iterated. From its own generator: the global one belongs to the
            # model, and a resumed run must find it where it was.
            "generator": torch.Generator().manual_seed(self.seed),
            "pin_memory": self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        }

    def state_dict(self) -> dict[str, Any]:
        """The position: a state that no loader has taken up yet, else that of the newest training loader.

        Of streams, every rank must call it: each knows the lanes that it reads.
        """
        if self._pending is not None:
            return self._pending
        if self._train_loader is not None:
            return self._train_loader.state_dict()
        state = {"samples": 0, "epoch": 0, "epoch_start": 0, "batch": 0, "length": 0}
        state |= {"seed": self.seed, "context": self.context, "fingerprint": self.fingerprint}
        if self.streamed:
            state |= {"order": self.order_state(), "lanes": {}}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the saved order now; the next training loader goes on at the saved position."""
        self.take_up(state_dict)
        self._pending = state_dict

    def take_up(self, state: Mapping[str, Any]) -> None:
        """Take up the order of a state. Warns where the data is not the same, once for a state."""
        concerns = {name: state.get(name) for name in ("order", "fingerprint", "context", "seed")}
        if concerns == self._taken_up:
            return
        self._taken_up = concerns
        if "order" in state:
            self.restore_order(state["order"])
        if state["fingerprint"] != self.fingerprint:
            log.warning(
                "THE DATA HAS CHANGED: the checkpoint was trained on data %s and goes on with data %s; its "
                "position means other text now, and its validation figures cannot be compared.",
                state["fingerprint"][:12],
                self.fingerprint[:12],
            )
        if state["context"] != self.context:
            log.warning(
                "CONTEXT HAS CHANGED from %d to %d: the text is cut anew and parts of it may come again.",
                state["context"],
                self.context,
            )
        if state["seed"] != self.seed:
            log.warning(
                "The order of samples keeps the checkpoint's seed %d, not %d.", state["seed"], self.seed
            )
        self.seed = state["seed"]

    def nothing(self) -> Batch:
        """A micro-batch without targets, for a rank that cannot even read its first one."""
        return without_text(self.batch_size, self.context)
