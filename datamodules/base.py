"""The Lightning side of a corpus: what every data module shares."""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from datamodules.corpus import Corpus
from datamodules.documents import Source
from datamodules.errors import BadData
from datamodules.packing import Batch, TrainingWindows, ValidationWindows
from datamodules.token_cache import cached_shards
from datamodules.tokenizer import Tokenizer, load_tokenizer
from datamodules.tokenizer_loading import TRAINING_BYTES

log = logging.getLogger(__name__)

ENDLESS = 1 << 40
"""Length that the training stream claims: Lightning drops a batch per resume of a stream without one."""


class TokenData(LightningDataModule):
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
                raise BadData(f"{name}: {value} is not allowed; allowed: {lowest[name]} or more.")
        if val_tokens is not None and val_tokens < 1:
            raise BadData(f"val_tokens: {val_tokens} is not allowed; allowed: 1 or more, or null for all.")
        self.tokenizer_spec, self.vocab_size = tokenizer, vocab_size
        self.batch_size, self.context, self.val_tokens = batch_size, context, val_tokens
        self.num_workers, self.seed = num_workers, seed
        self._position = _Position()

    # What a corpus provides.

    val_fraction: float = 0.0
    """Share of the training documents that validates instead."""

    def sources(self) -> list[Source]:
        """What to train on (less `val_fraction` of it). Raises BadData."""
        raise NotImplementedError

    def validation_sources(self) -> dict[str, list[Source]]:
        """domain -> what only validates. Raises BadData."""
        return {}

    # What the training side uses.

    @cached_property
    def tokenizer(self) -> Tokenizer:
        identity = [source.identity for source in self.sources()]
        corpus = hashlib.sha256(repr((identity, self.val_fraction)).encode()).hexdigest()
        return load_tokenizer(self.tokenizer_spec, self.vocab_size, self._training_texts, corpus)

    @property
    def domains(self) -> list[str]:
        """Names of the validation domains; a batch's `domain` is an index into it."""
        return self.corpus.domains

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the tokens, bytes and split: equal for equal data on any machine."""
        return self.corpus.fingerprint

    def summary(self) -> dict[str, Any]:
        """See `Corpus.summary`."""
        return self.corpus.summary

    @property
    def samples(self) -> int:
        """Training samples consumed so far over all ranks. Who trains advances it; loaders begin there."""
        return self._position.samples

    @samples.setter
    def samples(self, samples: int) -> None:
        self._position.samples = samples

    @cached_property
    def corpus(self) -> Corpus:
        """The tokenized documents; made on first use, from the cache where it has them."""
        training = self.sources()
        validation = self.validation_sources()
        every = [*training, *(source for sources in validation.values() for source in sources)]
        shards = iter(cached_shards(every, self.tokenizer))
        training_shards = [next(shards) for _ in training]
        validation_shards = {name: [next(shards) for _ in sources] for name, sources in validation.items()}
        return Corpus(self.tokenizer, training_shards, validation_shards, self.val_fraction, self.val_tokens)

    def prepare_data(self) -> None:
        """Train the tokenizer and fill the token cache where they are missing. Raises BadData."""
        _ = self.corpus

    def setup(self, stage: str | None = None) -> None:
        _ = self.corpus

    def train_dataloader(self) -> DataLoader:
        """An endless loader from `samples` on: micro-batch m of rank r of W holds the samples
        start + (m*W + r)*B .. + B - 1."""
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        windows = TrainingWindows(
            self.corpus.table, self.corpus.training_documents, self.tokenizer, self.context, self.seed
        )
        return self._loader(_TrainingStream(windows, self._position, self.batch_size, rank, world))

    def val_dataloader(self) -> DataLoader:
        """All validation windows in a fixed order, the same on every rank."""
        windows = ValidationWindows(
            self.corpus.table, self.corpus.validation_documents, self.tokenizer, self.context
        )
        return self._loader(_ValidationStream(windows, self.batch_size))

    def test_dataloader(self) -> DataLoader:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader:
        return self.val_dataloader()

    def state_dict(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "seed": self.seed,
            "context": self.context,
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the saved position, in the saved order. Warns when the data is not the same."""
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

    def _loader(self, stream: "IterableDataset[Batch]") -> DataLoader:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        # The loader draws a seed whenever it is iterated. From its own generator: the global one belongs to
        # the model, and a resumed run must find it where it was.
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(
            stream, batch_size=None, num_workers=self.num_workers, generator=generator, pin_memory=on_gpu
        )

    def _training_texts(self) -> Iterator[str]:
        """Texts to train a tokenizer on: the beginning of every source, held-out documents left out."""
        held_out_below = self.val_fraction * 2.0**64
        sources = self.sources()
        for source in sources:
            characters = 0
            for document in source.documents():
                if characters * len(sources) >= TRAINING_BYTES:
                    break
                if document.key >= held_out_below:
                    characters += len(document.text)
                    yield document.text


@dataclass
class _Position:
    """Shared by the data module and its streams, so that a loader iterated later begins where training is."""

    samples: int = 0


class _TrainingStream(IterableDataset):
    """Micro-batches of one rank. Worker k of n yields numbers k, k + n, ...; the loader asks them in turn."""

    def __init__(self, windows: TrainingWindows, position: _Position, batch_size: int, rank: int, world: int):
        self.windows, self.position = windows, position
        self.batch_size, self.rank, self.world = batch_size, rank, world

    def __len__(self) -> int:
        return ENDLESS

    def __iter__(self) -> Iterator[Batch]:
        start = self.position.samples
        micro_batch, step = _worker()
        while True:
            first = start + (micro_batch * self.world + self.rank) * self.batch_size
            yield self.windows.batch(first, self.batch_size)
            micro_batch += step


class _ValidationStream(IterableDataset):
    def __init__(self, windows: ValidationWindows, batch_size: int):
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
