"""Corpora too large to hold: read piece by piece from the hub or a local mirror, in the order of `lanes`.

Nothing is downloaded whole. Validation and test text comes from the source's own files of these splits; where there
are none, from a fixed part of the documents (by hash) of a few fixed pieces, which is held out of training whatever
`val_tokens` is. A source with one held-out split has it halved, by hash. None of this depends on the seed.
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
from datamodules.corpus import DocumentTable, Side, check_domains, held_out_summary
from datamodules.documents import Damage, Document, HeldOut, is_test
from datamodules.lanes import Lanes
from datamodules.limits import MAX_DOCUMENT_LENGTH
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
"""Files, evenly spread, that held-out text and a tokenizer's training text are taken from."""
VALIDATION_PIECES = 128
"""At most so many pieces are read to validate and test on: rare domains get what is there. Where documents are held
out of training files, these pieces are the first ones of each of the spread files, in equal shares."""
TEST_NAMES = ["test[/._-]*", "*[/._-]test[/._-]*"]
"""Files to test on in a folder that just holds some."""


class StreamedData(TokenData):
    """A corpus of JSON lines or parquet files, streamed; see TokenData for the other settings.

    Args:
        repository: "owner/name" of a data set on the hub (HF_ENDPOINT, HF_TOKEN).
        revision: Branch, tag or commit. The commit is kept in T6_HOME and in checkpoints.
        path: A local folder that mirrors the repository, or just holds such files (leave `config` out then); nothing
            is downloaded.
        text_field: Column that holds the text; a dotted name reaches into an object.
        domain_field: Column whose value labels a document's validation domain; null: one domain.
        val_tokens: At most this many tokens per domain to validate on, and as many to test on, in whole documents.
        val_fraction: Share of the documents of the pieces read for validation that is held out, where the source
            has no validation files: half of it to validate on, half of it to test on.
        lanes: Streams that the files are dealt over (fewer where there are fewer files and row groups). Loader
            processes read only their own lanes where lanes is a multiple of batch_size * ranks * num_workers.
        cache_gb: Tokenized text kept on disk, in 10^9 bytes; what was not used for longest goes first.
        patience: Seconds that a failing read is tried again before the run stops.
        max_document_length: UTF-8 bytes of a document, or of a JSON line; a longer one is left out and counted.
    """

    streamed = True
    train_patterns: list[str]
    """Which files train, by path in the repository."""
    val_patterns: list[str] = []  # noqa: RUF012
    """Which files only validate."""
    test_patterns: list[str] = []  # noqa: RUF012
    """Which files only test."""
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
        max_document_length: int = MAX_DOCUMENT_LENGTH,
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
        if max_document_length < 1:
            raise BadInput(f"max_document_length: {max_document_length} is not allowed; allowed: 1 or more.")
        self.max_document_length = max_document_length
        self.repository, self.revision, self.path = repository, revision, path
        self.text_field, self.domain_field = text_field, domain_field
        self.val_fraction, self.lanes, self.cache_gb, self.patience = val_fraction, lanes, cache_gb, patience
        self.damage: Damage = Counter()
        """What is wrong with the pieces read so far in this process."""

    @cached_property
    def store(self) -> Store:
        return open_store(self.repository, self.revision, self.path, self.patience)

    def check_sources(self) -> None:
        if self.path is not None:
            _ = self.train_files

    @cached_property
    def train_files(self) -> list[StoredFile]:
        """Sorted by path. Raises BadInput where there are none."""
        held_out = {*self.val_files, *self.test_files}
        for patterns in (self.train_patterns, *([["*train*"], ["*"]] if self._takes_any else [])):
            found = [file for file in self.store.files(patterns) if readable(file.path)]
            if files := [file for file in found if file not in held_out and file.size > 0]:
                return files
        if self._takes_any:
            files = [file for file in self.store.files(["*"]) if readable(file.path)]
            empty = sum(file.size == 0 for file in files)
            raise BadInput(
                f"path: {self.store.name} holds no text to train on: {len(files)} parquet or JSON-lines files, "
                f"of which {empty} are empty and {len(held_out)} only validate or test."
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

    @cached_property
    def test_files(self) -> list[StoredFile]:
        """Files that only test; none where the source has no such split."""
        if not self.test_patterns:
            return []
        for patterns in (self.test_patterns, *([TEST_NAMES] if self._takes_any else [])):
            found = [file for file in self.store.files(patterns) if file not in self.val_files]
            if files := [file for file in found if readable(file.path) and file.size > 0]:
                return files
        return []

    @property
    def _held_out(self) -> HeldOut | None:
        """What is held out of the training files; None where other files validate."""
        if self.val_files:
            return None
        files = _spread(len(self.train_files))
        return HeldOut(frozenset(files), VALIDATION_PIECES // len(files), self.val_fraction)

    def _pieces(self, files: list[StoredFile]) -> Pieces:
        return self._pieces_in(files, PieceCache(self.tokenizer, int(self.cache_gb * 1e9)))

    def _pieces_in(self, files: list[StoredFile], cache: PieceCache | None) -> Pieces:
        columns = self.text_field, self.domain_field, self.domain
        return Pieces(self.store, files, cache, *columns, self.damage, self.max_document_length)

    @property
    def validation(self) -> Side:
        """The pieces read for validation, and domain -> its validation documents."""
        return self._sides[0]

    @property
    def test(self) -> Side:
        """The pieces read to test on, and validation domain -> its test documents, maybe none."""
        return self._sides[1]

    @cached_property
    def _sides(self) -> tuple[Side, Side]:
        """What validates and what tests. Raises BadInput where nothing validates."""
        most = math.inf if self.val_tokens is None else self.val_tokens
        files = self.val_files or self.train_files
        table, validation, test = self._read_held_out(files, self._held_out, most, not self.test_files)
        if not validation:
            raise BadInput(
                f"val_fraction: {self.val_fraction} of {len(table)} documents of {self.store.name} leaves none to "
                "validate on."
            )
        test_table = table
        if self.test_files:
            test_table, test, _ = self._read_held_out(self.test_files, None, most, halved=False)
            for name in sorted(set(test) - set(validation)):
                log.info("The test documents of %r are left out: it has no validation documents.", name)
        seen = table.key[np.concatenate(list(validation.values()))]
        nothing = np.zeros(0, dtype=np.int64)
        chosen = {name: test.get(name, nothing) for name in validation}
        unseen = {name: numbers[~np.isin(test_table.key[numbers], seen)] for name, numbers in chosen.items()}
        return (table, validation), (test_table, unseen)

    def _read_held_out(
        self, files: list[StoredFile], held_out: HeldOut | None, most: float, halved: bool
    ) -> tuple[DocumentTable, dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Read pieces until each domain has its `most` tokens on each side.

        Returns their documents, and per side domain -> the chosen ones. `halved`: into those that validate and those
        that test; otherwise the second side has none. `held_out`: of which pieces and documents (None: of all).
        Raises BadInput where there is no document.
        """
        pieces = self._pieces(files)
        shards: list[Shard] = []
        sides = [_Choice(most) for _ in range(1 + halved)]
        first = 0

        def read(file: int, piece: int) -> tuple[Shard, np.ndarray] | None:
            if held_out is not None and piece >= held_out.pieces:
                return None
            if (shard := pieces.shard(file, piece)) is None:
                return None
            if held_out is None:
                return shard, np.arange(len(shard.key))
            return shard, np.flatnonzero(held_out.of(file, piece, shard.key))

        for shard, held in _round_robin(len(files), read):
            lengths = np.diff(shard.offsets) + 1
            side = is_test(shard.key) & halved
            for i in held.tolist():
                sides[int(side[i])].offer(shard.domains[shard.domain[i]], first + i, int(lengths[i]))
            shards.append(shard)
            first += len(lengths)
            names = set().union(*(choice.names for choice in sides))
            check_domains(names)
            if len(shards) == VALIDATION_PIECES or (names and all(choice.is_full(names) for choice in sides)):
                break
        if first == 0:
            met: Counter[str] = Counter()
            for (kind, _), times in self.damage.items():
                met[kind] += times
            why = ", ".join(f"{kind} ({times:,} x)" for kind, times in met.most_common())
            raise BadInput(
                f"{'path' if self.path else 'repository'}: no document could be read from {self.store.name}: "
                f"{why or 'its files hold no text'}."
            )
        validation, test = sides[0].documents(), sides[1].documents() if halved else {}
        for name in set(test) - set(validation):
            validation[name] = test.pop(name)  # nothing of the domain would be left to validate on
        table = DocumentTable(shards, sorted({name for shard in shards for name in shard.domains}))
        return table, dict(sorted(validation.items())), test

    @property
    def domains(self) -> list[str]:
        return list(self.validation[1])

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        # Of the tokens only the first piece that is read whatever `val_tokens` is: the hub names each file's content.
        digest = hashlib.sha256(self.tokenizer.fingerprint.encode())
        digest.update(self.corpus_identity().encode())
        digest.update(json.dumps(self._identities(self.test_files)).encode())
        digest.update(json.dumps([side[0].shards[0].checksum for side in self._sides]).encode())
        return digest.hexdigest()

    def corpus_identity(self) -> str:
        files = self._identities([*self.train_files, *self.val_files])
        settings = (self.text_field, self.domain_field, self.val_fraction)
        return hashlib.sha256(json.dumps([files, settings]).encode()).hexdigest()

    def _identities(self, files: list[StoredFile]) -> list[tuple[str, int, str]]:
        # A local mirror is known by its names and sizes: times of change differ from copy to copy.
        local = self.store.revision == LOCAL
        return [(file.path, file.size, "" if local else file.content) for file in files]

    def summary(self) -> dict[str, Any]:
        """What is streamed, and `held_out_summary` of what is held out."""
        digest = hashlib.sha256(self.fingerprint.encode())
        for table, documents in self._sides:
            digest.update(json.dumps([shard.checksum for shard in table.shards]).encode())
            for name, chosen in documents.items():
                digest.update(name.encode() + b"|" + np.ascontiguousarray(chosen, dtype="<i8").tobytes())
        kept = t6_home() / "tokens" / "summaries" / f"{digest.hexdigest()}.json"
        try:
            held = json.loads(kept.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            held = held_out_summary(*self._sides, self.tokenizer)
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
        lanes = Lanes(pieces, self.tokenizer, self.lanes, left_out, self._held_out, self.context, self.seed)
        return {"text": lanes}

    def validation_windows(self) -> ValidationWindows:
        return ValidationWindows(*self.validation, self.tokenizer, self.context)

    def test_windows(self) -> ValidationWindows:
        """All test windows, domain after domain, numbered as in `domains`. Raises BadInput where there are none."""
        windows = ValidationWindows(*self.test, self.tokenizer, self.context)
        if len(windows) == 0:
            raise BadInput(
                f"{'path' if self.path else 'repository'}: the held-out documents of {self.store.name} are too few "
                "to validate and to test on; raise val_fraction, or name a source with larger held-out files."
            )
        return windows

    def validation_keys(self) -> np.ndarray:
        """Sorted hashes of the documents chosen to validate and to test on, uint64: of those beyond `val_tokens`,
        which `training_windows` leaves out where they are stored, not all are read."""
        return np.unique(
            np.concatenate([table.key[chosen] for table, side in self._sides for chosen in side.values()])
        )

    def tokenizer_texts(self) -> Iterator[str]:
        for document in self._spread_documents():
            yield document.text

    def example_documents(self, number: int) -> Iterator[Document]:
        keys = set(self.validation_keys().tolist())
        for document in self._spread_documents():
            if number > 0 and document.key not in keys:
                number -= 1
                yield document

    def _spread_documents(self) -> Iterator[Document]:
        """Texts of some training pieces, not tokenized, up to TRAINING_BYTES characters; none that may be held out."""
        pieces = self._pieces_in(self.train_files, None)
        least_key = 0.0 if self.val_files else self.val_fraction * 2.0**64
        characters = 0
        for documents in _round_robin(len(self.train_files), pieces.documents):
            yield from (document for document in documents if document.key >= least_key)
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
            for name in ("store", "train_files", "val_files", "test_files", "_sides", "_fingerprint"):
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
    """C4 (Raffel et al. 2020), compressed JSON lines; its validation split is halved by hash, to validate
    and to test on.

    Args:
        config: en, en.noblocklist, en.noclean, realnewslike, or a language of the multilingual part (mC4), English
            as en-multi.
    """

    domain = "c4"

    def __init__(self, config: str = "en", repository: str = "allenai/c4", **common: Any):
        super().__init__(repository, **common)
        self.config = None if config == "en" else config
        if config in ("en", "en.noblocklist", "en.noclean", "realnewslike"):
            prefix, train, validation = f"{config}/c4", "-train.", "-validation."
        else:
            # The hub's name of the English part of mC4 tells it from C4; its files are named as of any language.
            language = "en" if config == "en-multi" else config
            prefix, train, validation = f"multilingual/c4-{language}", ".tfrecord-", "-validation.tfrecord-"
        self.train_patterns = [f"{prefix}{train}*.json.gz"]
        self.val_patterns = [f"{prefix}{validation}*.json.gz"]


class Pile(StreamedData):
    """The Pile (Gao et al. 2020) from a mirror, compressed JSON lines, with its own validation and test splits; its
    subsets are the validation domains.

    Args:
        repository: A mirror with the published layout: the original is gone from the hub.
        domain_field: Column that names the subset.
    """

    domain = "pile"
    train_patterns = ["train/*", "data/train*"]  # noqa: RUF012
    val_patterns = ["val.jsonl*", "val/*", "data/val*"]  # noqa: RUF012
    test_patterns = ["test.jsonl*", "test/*", "data/test*"]  # noqa: RUF012

    def __init__(
        self,
        repository: str = "monology/pile-uncopyrighted",
        domain_field: str | None = "meta.pile_set_name",
        **common: Any,
    ):
        super().__init__(repository, domain_field=domain_field, **common)


class _Choice:
    """Chooses the documents of one side while they are read: whole documents up to `most` tokens per domain."""

    def __init__(self, most: float):
        self.most = most
        self.names: set[str] = set()
        """Domains of what was offered."""
        self._chosen: dict[str, list[int]] = {}
        self._tokens: dict[str, int] = {}
        self._too_long: dict[str, tuple[int, int]] = {}

    def offer(self, name: str, document: int, tokens: int) -> None:
        self.names.add(name)
        held = self._tokens.get(name, 0)
        if tokens > self.most:
            shortest = self._too_long.get(name, (tokens, document))
            self._too_long[name] = min((tokens, document), shortest)
        elif held + tokens <= self.most:
            self._chosen.setdefault(name, []).append(document)
            self._tokens[name] = held + tokens
        else:
            self._tokens[name] = int(self.most)  # full: no shorter document slips in behind

    def is_full(self, names: set[str]) -> bool:
        """Whether it was offered something of each of the domains, and enough where not all was too long."""
        return names <= self.names and min(self._tokens.values(), default=0) >= self.most

    def documents(self) -> dict[str, np.ndarray]:
        """Domain -> the chosen documents; the shortest one where all are longer than `most`."""
        alone = {name: [document] for name, (_, document) in self._too_long.items()}
        return {name: np.array(chosen) for name, chosen in sorted((alone | self._chosen).items())}


def _spread(n_files: int) -> list[int]:
    """Numbers of SPREAD_FILES files, evenly spread; of all where there are fewer."""
    return sorted({i * n_files // SPREAD_FILES for i in range(SPREAD_FILES)})


def _round_robin(n_files: int, read: Callable[[int, int], Piece | None]) -> Iterator[Piece]:
    """The first pieces of SPREAD_FILES files evenly spread, then their second ones, and so on."""
    reading = _spread(n_files)
    piece = 0
    while reading:
        for file in list(reading):
            found = read(file, piece)
            if found is not None:
                yield found
            else:
                reading.remove(file)
        piece += 1
