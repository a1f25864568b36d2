"""Corpora too large to hold: read piece by piece from the hub or a local mirror, in the order of `lanes`.

Nothing is downloaded whole. Validation text comes from the source's own validation files, else from a fixed part
of the documents (by hash) of a few fixed pieces; it never depends on the seed, and no document of it is trained on.
"""

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from datamodules.base import TokenData
from datamodules.corpus import DocumentTable, validation_summary
from datamodules.documents import Damage, Document, held_out
from datamodules.lanes import Lanes
from datamodules.packing import ValidationWindows, Windows
from datamodules.pieces import Pieces, readable
from datamodules.stores import LOCAL, PATIENCE_SECONDS, Store, StoredFile, open_store
from datamodules.token_cache import PieceCache, Shard
from datamodules.tokenizer_loading import TRAINING_BYTES
from t6_lightning.common.errors import BadInput
from t6_lightning.common.files import write_atomically
from t6_lightning.common.home import t6_home

log = logging.getLogger(__name__)

Piece = TypeVar("Piece")

SPREAD_FILES = 8
"""Files, evenly spread, that validation text and a tokenizer's training text are taken from."""
VALIDATION_PIECES = 128
"""At most so many pieces are read for validation: rare domains get what is there."""
COMPRESSED_BYTES = 32 << 20
"""Validation text up to this size is compressed by gzip and xz for comparison."""


class StreamedData(TokenData):
    """A corpus of JSON lines or parquet files, streamed; see TokenData for the other settings.

    Args:
        repository: "owner/name" of a data set on the hub (HF_ENDPOINT, HF_TOKEN).
        revision: Branch, tag or commit. The commit is kept in T6_HOME and in checkpoints.
        path: A local folder that mirrors the repository, or just holds such files (leave `config` out then); nothing
            is downloaded.
        text_field: Column that holds the text; a dotted name reaches into an object.
        domain_field: Column whose value labels a document's validation domain; null: one domain.
        val_tokens: At most this many validation tokens per domain, in whole documents.
        val_fraction: Share of the documents of the pieces read for validation that is held out, where the source
            has no validation files.
        lanes: Streams that the files are dealt over (fewer where there are fewer files and row groups). Loader
            processes read only their own lanes where lanes is a multiple of batch_size * ranks * num_workers.
        cache_gb: Tokenized text kept on disk, in 10^9 bytes; what was not used for longest goes first.
        patience: Seconds that a failing read is tried again before the run stops.
    """

    streamed = True
    train_patterns: list[str]
    """Which files train, by path in the repository."""
    val_patterns: list[str] = []  # noqa: RUF012
    """Which files only validate."""
    domain: str
    """Name of the validation domain where no column tells."""
    config: str | None = None
    """The part of the repository that was chosen, where it is not the usual one."""

    def __init__(
        self,
        repository: str,
        revision: str = "main",
        path: str | None = None,
        text_field: str = "text",
        domain_field: str | None = None,
        val_tokens: int | None = 500_000,
        val_fraction: float = 0.1,
        lanes: int = 64,
        cache_gb: float = 50.0,
        patience: float = PATIENCE_SECONDS,
        **common: Any,
    ):
        super().__init__(val_tokens=val_tokens, **common)
        if lanes < 1:
            raise BadInput(f"lanes: {lanes} is not allowed; allowed: 1 or more.")
        if not 0 < val_fraction < 1:
            raise BadInput(
                f"val_fraction: {val_fraction} is not allowed; allowed: more than 0 and less than 1."
            )
        if cache_gb <= 0:
            raise BadInput(f"cache_gb: {cache_gb} is not allowed; allowed: more than 0.")
        if path is None and repository.count("/") != 1:
            raise BadInput(f"repository: {repository!r} is not allowed; allowed: owner/name.")
        self.repository, self.revision, self.path = repository, revision, path
        self.text_field, self.domain_field = text_field, domain_field
        self.val_fraction, self.lanes, self.cache_gb, self.patience = val_fraction, lanes, cache_gb, patience
        self.damage: Damage = Counter()
        """What is wrong with the pieces read so far in this process."""

    @cached_property
    def store(self) -> Store:
        return open_store(self.repository, self.revision, self.path, self.patience)

    @cached_property
    def train_files(self) -> list[StoredFile]:
        """Sorted by path. Raises BadInput where there are none."""
        validate = set(self.val_files)
        for patterns in (self.train_patterns, *([["*train*"], ["*"]] if self._takes_any else [])):
            found = [file for file in self.store.files(patterns) if readable(file.path)]
            if files := [file for file in found if file not in validate and file.size > 0]:
                return files
        if self._takes_any:
            files = [file for file in self.store.files(["*"]) if readable(file.path)]
            empty = sum(file.size == 0 for file in files)
            raise BadInput(
                f"path: {self.store.name} holds no text to train on: {len(files)} parquet or JSON-lines files, "
                f"of which {empty} are empty and {len(validate)} only validate."
            )
        looked_for = " or ".join(self.train_patterns)
        chosen = "repository:" if self.config is None else f"config: for {self.config!r}"
        raise BadInput(
            f"{chosen} {self.store.name} ({self.store.revision}) has no parquet or JSON-lines file {looked_for}."
        )

    @property
    def _takes_any(self) -> bool:
        """Whether files are taken under other names than the repository's: a folder may just hold some."""
        return self.path is not None and self.config is None

    @cached_property
    def val_files(self) -> list[StoredFile]:
        """Files that only validate; none where the source has no such split."""
        for patterns in (
            self.val_patterns,
            *([["*validation*", "*val.*", "*val-*"]] if self._takes_any else []),
        ):
            found = self.store.files(patterns) if self.val_patterns else []
            if files := [file for file in found if readable(file.path) and file.size > 0]:
                return files
        return []

    def _pieces(self, files: list[StoredFile]) -> Pieces:
        return self._pieces_in(files, PieceCache(self.tokenizer, int(self.cache_gb * 1e9)))

    def _pieces_in(self, files: list[StoredFile], cache: PieceCache | None) -> Pieces:
        return Pieces(self.store, files, cache, self.text_field, self.domain_field, self.domain, self.damage)

    @cached_property
    def validation(self) -> tuple[DocumentTable, dict[str, np.ndarray]]:
        """The pieces read for validation, and domain -> its validation documents. Raises BadInput."""
        files = self.val_files or self.train_files
        fraction = 1.0 if self.val_files else self.val_fraction
        pieces = self._pieces(files)
        shards: list[Shard] = []
        chosen: dict[str, list[int]] = {}
        tokens: dict[str, int] = {}
        too_long: dict[str, tuple[int, int]] = {}
        first = 0
        most = math.inf if self.val_tokens is None else self.val_tokens
        for shard in _round_robin(len(files), pieces.shard):
            lengths = np.diff(shard.offsets) + 1
            for i in np.flatnonzero(held_out(shard.key, fraction)).tolist():
                name, n = shard.domains[shard.domain[i]], int(lengths[i])
                if n > most:
                    too_long[name] = min((n, first + i), too_long.get(name, (n, first + i)))
                elif tokens.get(name, 0) + n <= most:
                    chosen.setdefault(name, []).append(first + i)
                    tokens[name] = tokens.get(name, 0) + n
                else:
                    tokens[name] = int(most)  # full: no shorter document slips in behind
            shards.append(shard)
            first += len(lengths)
            if len(shards) == VALIDATION_PIECES or (tokens and min(tokens.values()) >= most):
                break
        for name, (_, document) in too_long.items():
            chosen.setdefault(name, [document])  # the shortest, where all are longer than what is asked for
        if first == 0:
            met: Counter[str] = Counter()
            for (kind, _), times in self.damage.items():
                met[kind] += times
            why = ", ".join(f"{kind} ({times:,} x)" for kind, times in met.most_common())
            raise BadInput(
                f"{'path' if self.path else 'repository'}: no document could be read from {self.store.name}: "
                f"{why or 'its files hold no text'}."
            )
        if not chosen:
            raise BadInput(
                f"val_fraction: {fraction} of {first} documents of {self.store.name} leaves none to validate on."
            )
        names = sorted({name for shard in shards for name in shard.domains})
        documents = {name: np.array(chosen[name]) for name in sorted(chosen)}
        return DocumentTable(shards, names), documents

    @property
    def domains(self) -> list[str]:
        return list(self.validation[1])

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(self.tokenizer.fingerprint.encode())
        digest.update(self.corpus_identity().encode())
        table, documents = self.validation
        digest.update(json.dumps([shard.checksum for shard in table.shards]).encode())
        for name, chosen in documents.items():
            digest.update(name.encode() + b"|" + np.ascontiguousarray(chosen, dtype="<i8").tobytes())
        return digest.hexdigest()

    def corpus_identity(self) -> str:
        # A local mirror is known by its names and sizes: times of change differ from copy to copy.
        local = self.store.revision == LOCAL
        files = [
            (file.path, file.size, "" if local else file.content)
            for file in (*self.train_files, *self.val_files)
        ]
        settings = (self.text_field, self.domain_field, self.val_fraction)
        return hashlib.sha256(json.dumps([files, settings]).encode()).hexdigest()

    def summary(self) -> dict[str, Any]:
        """What is streamed, and `validation_summary` of what is held out."""
        kept = t6_home() / "tokens" / "summaries" / f"{self.fingerprint}.json"
        try:
            held = json.loads(kept.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            table, documents = self.validation
            held = validation_summary(table, documents, self.tokenizer, COMPRESSED_BYTES)
            write_atomically(kept, json.dumps(held))
        return {
            "source": self.store.name,
            "revision": self.store.revision,
            "train_files": len(self.train_files),
            "train_stored_bytes": sum(file.size for file in self.train_files),
            **held,
        }

    def training_windows(self, left_out: np.ndarray) -> dict[str, Windows]:
        pieces = self._pieces(self.train_files)
        return {"text": Lanes(pieces, self.tokenizer, self.lanes, left_out, self.context, self.seed)}

    def validation_windows(self) -> ValidationWindows:
        table, documents = self.validation
        return ValidationWindows(table, documents, self.tokenizer, self.context)

    def validation_keys(self) -> np.ndarray:
        table, documents = self.validation
        return np.unique(table.key[np.concatenate(list(documents.values()))])

    def tokenizer_texts(self) -> Iterator[str]:
        fraction = 0.0 if self.val_files else self.val_fraction
        for document in self._spread_documents():
            if document.key >= fraction * 2.0**64:
                yield document.text

    def example_documents(self, number: int) -> Iterator[Document]:
        keys = set(self.validation_keys().tolist())
        for document in self._spread_documents():
            if number > 0 and document.key not in keys:
                number -= 1
                yield document

    def _spread_documents(self) -> Iterator[Document]:
        """Texts of some training pieces, not tokenized, up to TRAINING_BYTES characters."""
        pieces = self._pieces_in(self.train_files, None)
        characters = 0
        for documents in _round_robin(len(self.train_files), pieces.documents):
            yield from documents
            characters += sum(len(document.text) for document in documents)
            if characters >= TRAINING_BYTES:
                return

    def order_state(self) -> dict[str, Any]:
        return {"revision": self.store.revision, "lanes": self.lanes}

    def restore_order(self, state: dict[str, Any]) -> None:
        if state["lanes"] != self.lanes:
            log.warning(
                "The order of samples keeps the checkpoint's %d lanes, not %d.", state["lanes"], self.lanes
            )
            self.lanes = state["lanes"]
        now = self.store.revision
        if LOCAL not in (state["revision"], now) and state["revision"] != now:
            log.warning(
                "%s goes on at the checkpoint's revision %s, not %s.",
                self.repository,
                state["revision"],
                now,
            )
            self.revision = state["revision"]
            for name in ("store", "train_files", "val_files", "validation", "_fingerprint"):
                vars(self).pop(name, None)


class FineWebEdu(StreamedData):
    """FineWeb-Edu (Lozhkov et al. 2024): educational web pages, parquet.

    Args:
        config: sample-10BT, sample-100BT, sample-350BT, default (all of it), or a crawl such as CC-MAIN-2024-10.
    """

    domain = "fineweb-edu"

    def __init__(
        self, config: str = "sample-10BT", repository: str = "HuggingFaceFW/fineweb-edu", **common: Any
    ):
        super().__init__(repository, **common)
        self.config = None if config == "sample-10BT" else config
        folder = {"default": "data"}.get(config, config.replace("sample-", "sample/"))
        self.train_patterns = [f"{folder if '/' in folder or folder == 'data' else 'data/' + folder}/*"]


class C4(StreamedData):
    """C4 (Raffel et al. 2020), compressed JSON lines, with its own validation split.

    Args:
        config: en, en.noblocklist, en.noclean, realnewslike, or a language of the multilingual part (mC4).
    """

    domain = "c4"

    def __init__(self, config: str = "en", repository: str = "allenai/c4", **common: Any):
        super().__init__(repository, **common)
        self.config = None if config == "en" else config
        if config in ("en", "en.noblocklist", "en.noclean", "realnewslike"):
            prefix, train, validation = f"{config}/c4", "-train.", "-validation."
        else:
            prefix, train, validation = f"multilingual/c4-{config}", ".tfrecord-", "-validation.tfrecord-"
        self.train_patterns = [f"{prefix}{train}*.json.gz"]
        self.val_patterns = [f"{prefix}{validation}*.json.gz"]


class Pile(StreamedData):
    """The Pile (Gao et al. 2020) from a mirror, compressed JSON lines; its subsets are the validation domains.

    Args:
        repository: A mirror with the published layout: the original is gone from the hub.
        domain_field: Column that names the subset.
    """

    domain = "pile"
    train_patterns = ["train/*", "data/train*"]  # noqa: RUF012
    val_patterns = ["val.jsonl*", "val/*", "data/val*"]  # noqa: RUF012

    def __init__(
        self,
        repository: str = "monology/pile-uncopyrighted",
        domain_field: str | None = "meta.pile_set_name",
        **common: Any,
    ):
        super().__init__(repository, domain_field=domain_field, **common)


def _round_robin(n_files: int, read: Callable[[int, int], Piece | None]) -> Iterator[Piece]:
    """The first pieces of SPREAD_FILES files evenly spread, then their second ones, and so on."""
    reading = sorted({i * n_files // SPREAD_FILES for i in range(SPREAD_FILES)})
    piece = 0
    while reading:
        for file in list(reading):
            found = read(file, piece)
            if found is not None:
                yield found
            else:
                reading.remove(file)
        piece += 1
