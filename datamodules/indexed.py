"""Corpora that are tokenized whole and indexed by document: any window is at hand, nothing is streamed."""

import hashlib
from abc import abstractmethod
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from datamodules.base import TokenData
from datamodules.corpus import Corpus, Side
from datamodules.documents import Document, Source
from datamodules.packing import TrainingWindows, ValidationWindows, Windows
from datamodules.token_cache import cached_shards
from datamodules.tokenizer_loading import TRAINING_BYTES
from t6_lightning.common.errors import BadInput


class IndexedData(TokenData):
    """A corpus of sources, each tokenized as a whole; see TokenData for the settings."""

    val_fraction: float = 0.0
    """Share of the training documents that is held out, to validate and to test on."""

    @abstractmethod
    def sources(self) -> list[Source]:
        """What to train on (less `val_fraction` of it). Raises BadInput."""

    def validation_sources(self) -> dict[str, list[Source]]:
        """domain -> what only validates. Raises BadInput."""
        return {}

    def check_sources(self) -> None:
        self.sources()
        self.validation_sources()

    @property
    def domains(self) -> list[str]:
        return self.corpus.domains

    @property
    def fingerprint(self) -> str:
        return self.corpus.fingerprint

    def summary(self) -> dict[str, Any]:
        """See `Corpus.summary`."""
        return self.corpus.summary

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

    def training_windows(self, left_out: np.ndarray) -> dict[str, Windows]:
        table, documents = self.corpus.table, self.corpus.training_documents
        documents = documents[~np.isin(table.key[documents], left_out)]
        return {"text": TrainingWindows(table, documents, self.tokenizer, self.context, self.seed)}

    @property
    def validation(self) -> Side:
        """The table of documents, and domain -> its validation documents."""
        return self.corpus.table, self.corpus.validation_documents

    @property
    def test(self) -> Side:
        """The table of documents, and domain -> its test documents, maybe none."""
        return self.corpus.table, self.corpus.test_documents

    def validation_windows(self) -> ValidationWindows:
        return ValidationWindows(*self.validation, self.tokenizer, self.context)

    def test_windows(self) -> ValidationWindows:
        """All test windows, domain after domain, numbered as in `domains`. Raises BadInput where there are none."""
        windows = ValidationWindows(*self.test, self.tokenizer, self.context)
        if len(windows) == 0:
            raise BadInput(
                f"val_fraction: {self.val_fraction} of {len(self.corpus.table)} documents leaves none to test on; "
                "raise it, or cut .txt files into lines or paragraphs (txt_documents)."
            )
        return windows

    def validation_keys(self) -> np.ndarray:
        """Sorted hashes of all held-out documents, uint64: those that validate, test, or are beyond `val_tokens`."""
        held = np.concatenate(list(self.corpus.held_out_documents.values()))
        return np.unique(self.corpus.table.key[held])

    def corpus_identity(self) -> str:
        identity = [source.identity for source in self.sources()]
        return hashlib.sha256(repr((identity, self.val_fraction)).encode()).hexdigest()

    def tokenizer_texts(self) -> Iterator[str]:
        """The beginning of every source."""
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

    def example_documents(self, number: int) -> Iterator[Document]:
        table, documents = self.corpus.table, self.corpus.training_documents
        for document in documents[:: max(1, len(documents) // max(1, number))][:number]:
            yield Document(self.tokenizer.decode(table.tokens(document)), "", int(table.key[document]))
