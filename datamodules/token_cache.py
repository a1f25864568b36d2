"""Tokenized documents on disk: unshuffled, memory-mapped, one folder per source and tokenizer.

A source is a local file, or one piece (some megabytes) of a streamed file. An entry T6_HOME/tokens/KEY, or
T6_HOME/tokens/pieces/KEY, holds plain little-endian arrays and meta.json, and is written beside and renamed:

    tokens.bin       uint16 (uint32 for large vocabularies) (n_tokens,)   ids of all documents, no separators
    offsets.bin      int64  (n_documents + 1,)   where each document begins in tokens.bin
    n_bytes.bin      int64  (n_documents,)       its UTF-8 bytes
    domain.bin       uint16 (n_documents,)       its domain, an index into meta.json's list
    key.bin          uint64 (n_documents,)       its hash for the train/validation split
    counts.bin       int64  (vocab_size,)        how often each id occurs; not for pieces
    token_bytes.bin  uint32 (n_tokens,)          bytes each token covers; only where an id does not tell

KEY hashes the source's identity (for a file: path, size, time of change and how it is cut), the tokenizer's
fingerprint and this layout. An entry that does not match its meta.json (sizes, SHA-256) is made again.
Pieces are many: beyond a limit on their bytes those not used for longest are removed.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from filelock import FileLock

from datamodules.documents import Document, Source
from datamodules.errors import BadData
from datamodules.home import t6_home
from datamodules.progress import TokenizingProgress
from datamodules.tokenizer import Tokenizer

log = logging.getLogger(__name__)

LAYOUT = 1
BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 1024
TOKENIZING_THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Shard:
    """The tokenized documents of one source; arrays as in the module's docstring."""

    tokens: np.ndarray
    offsets: np.ndarray
    n_bytes: np.ndarray
    domain: np.ndarray
    key: np.ndarray
    counts: np.ndarray | None
    token_bytes: np.ndarray | None
    domains: list[str]
    checksum: str
    """sha256 (hex) over everything above: the same wherever and whenever it was tokenized."""


class PieceCache:
    """Shards of single pieces, from the cache or tokenized into it; at most `limit` bytes of them stay.

    Several processes and threads may share the folder. A shard in use stays readable when its entry goes.
    """

    def __init__(self, tokenizer: Tokenizer, limit: int):
        self.tokenizer, self.limit = tokenizer, limit
        self._written = limit  # so that the first entry written looks at what others have left

    def shard(self, source: Source) -> Shard:
        """The piece, which may hold no document. Raises what reading the source raises."""
        folder = t6_home() / "tokens" / "pieces" / _key(source, self.tokenizer)
        shard = _open(folder)
        if shard is not None:
            with contextlib.suppress(OSError):
                os.utime(folder)  # the time of its last use
            return shard
        shard = _fill(folder, source, self.tokenizer, None)
        self._written += _size(folder)
        if self._written > self.limit // 16:
            self._written = 0
            self._remove_oldest(folder.parent)
        return shard

    def _remove_oldest(self, pieces: Path) -> None:
        with FileLock(pieces / "removal.lock"):
            total = 0
            for entry in sorted(pieces.iterdir(), key=_last_use, reverse=True):
                if entry.is_dir() and entry.suffix == "":
                    total += _size(entry)
                    if total > self.limit:
                        gone = entry.with_suffix(".gone")
                        with contextlib.suppress(OSError):
                            entry.rename(gone)  # in one step, so that nobody opens half of it
                        shutil.rmtree(gone, ignore_errors=True)
                elif entry.suffix == ".gone":  # its remover was killed
                    shutil.rmtree(entry, ignore_errors=True)


def cached_shards(sources: Iterable[Source], tokenizer: Tokenizer) -> list[Shard]:
    """The shards of the sources, from the cache where it has them, else tokenized into it.

    Raises BadData for what is wrong with a source; the cache then holds nothing of it.
    """
    sources = list(sources)
    shards = {i: shard for i, source in enumerate(sources) if (shard := _open(_folder(source, tokenizer)))}
    missing = [i for i in range(len(sources)) if i not in shards]
    if not missing:
        log.info("All %d sources come from the token cache; nothing is tokenized.", len(sources))
    else:
        log.info("%d of %d sources come from the token cache.", len(shards), len(sources))
        with TokenizingProgress(len(missing)) as progress:
            for i in missing:
                shards[i] = _fill(_folder(sources[i], tokenizer), sources[i], tokenizer, progress)
                progress.finish_source()
    return [shards[i] for i in range(len(sources))]


def _key(source: Source, tokenizer: Tokenizer) -> str:
    text = f"{LAYOUT}\0{source.identity}\0{tokenizer.fingerprint}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _folder(source: Source, tokenizer: Tokenizer) -> Path:
    return t6_home() / "tokens" / _key(source, tokenizer)


def _last_use(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def _size(folder: Path) -> int:
    with contextlib.suppress(OSError):
        return sum(entry.stat().st_size for entry in os.scandir(folder))
    return 0


def _fill(folder: Path, source: Source, tokenizer: Tokenizer, progress: TokenizingProgress | None) -> Shard:
    """Tokenize a source into its folder. Without `progress` it is a piece, which may be empty."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A fixed set of lock files: pieces are too many to have one each.
    with FileLock(folder.with_name(f"{folder.name[:2]}.lock")):
        if shard := _open(folder):  # another process was faster
            return shard
        # Under the lock nobody else writes this entry: what lies here was left by a process that was killed.
        beside = folder.with_suffix(".tmp")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        try:
            _write(source, tokenizer, beside, progress)
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(beside, folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        shard = _open(folder)
    if shard is None:
        raise OSError(f"{folder} does not read back as it was written.")
    return shard


def _write(source: Source, tokenizer: Tokenizer, folder: Path, progress: TokenizingProgress | None) -> None:
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    by_id = tokenizer.token_bytes
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    lengths: list[int] = []
    n_bytes: list[int] = []
    domain: list[int] = []
    key: list[int] = []
    domains: dict[str, int] = {}
    with (
        open(folder / "tokens.bin", "wb") as tokens_file,
        open(folder / "token_bytes.bin", "wb") as bytes_file,
    ):
        for documents, encoded in _encoded(_batches(source.documents()), tokenizer):
            for document, (ids, covered) in zip(documents, encoded, strict=True):
                if len(ids) == 0:  # nothing to predict: blanks that the tokenizer drops
                    continue
                lengths.append(len(ids))
                n_bytes.append(int(covered.sum()))
                domain.append(domains.setdefault(document.domain, len(domains)))
                key.append(document.key)
                if by_id is None:
                    covered.tofile(bytes_file)
            ids = np.concatenate([ids for ids, _ in encoded])
            ids.astype(dtype).tofile(tokens_file)
            if progress is not None:
                counts += np.bincount(ids, minlength=len(counts))
                progress.add(source.name, len(documents), len(ids))
    if not lengths and progress is not None:
        raise BadData(f"{source.name} holds no documents.")
    if len(domains) > 1 << 16:
        raise BadData(f"domain_field: {source.name} has {len(domains)} domains; allowed: up to 65536.")
    if by_id is not None:
        (folder / "token_bytes.bin").unlink()
    np.cumsum([0, *lengths], dtype=np.int64).tofile(folder / "offsets.bin")
    np.array(n_bytes, dtype=np.int64).tofile(folder / "n_bytes.bin")
    np.array(domain, dtype=np.uint16).tofile(folder / "domain.bin")
    np.array(key, dtype=np.uint64).tofile(folder / "key.bin")
    if progress is not None:
        counts.tofile(folder / "counts.bin")
    meta = {
        "source": source.name,
        "tokenizer": tokenizer.fingerprint,
        "documents": len(lengths),
        "tokens": sum(lengths),
        "bytes": sum(n_bytes),
        "dtype": np.dtype(dtype).name,
        "domains": list(domains),
        "files": {path.name: [path.stat().st_size, _sha256(path)] for path in sorted(folder.iterdir())},
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


Encoded = list[tuple[np.ndarray, np.ndarray]]


def _encoded(
    batches: Iterator[list[Document]], tokenizer: Tokenizer
) -> Iterator[tuple[list[Document], Encoded]]:
    """The batches in order, each with its ids: threads encode some batches ahead while this one reads."""
    waiting: deque[tuple[list[Document], Future[Encoded]]] = deque()
    with ThreadPoolExecutor(TOKENIZING_THREADS) as pool:
        for batch in chain(batches, [None]):
            if batch is not None:
                texts = [document.text for document in batch]
                waiting.append((batch, pool.submit(tokenizer.encode_batch_with_bytes, texts)))
            while waiting and (batch is None or len(waiting) > 2 * TOKENIZING_THREADS):
                documents, future = waiting.popleft()
                yield documents, future.result()


def _open(folder: Path) -> Shard | None:
    """The entry, checked against its meta.json; None if there is none or (with a warning) a damaged one."""
    if not folder.is_dir():
        return None
    try:
        meta = json.loads((folder / "meta.json").read_text())
        for name, (size, digest) in meta["files"].items():
            path = folder / name
            if path.stat().st_size != size or _sha256(path) != digest:
                raise ValueError(f"{name} is not what was written")
        return Shard(
            tokens=_mapped(folder / "tokens.bin", meta["dtype"]),
            offsets=_mapped(folder / "offsets.bin", "int64"),
            n_bytes=_mapped(folder / "n_bytes.bin", "int64"),
            domain=_mapped(folder / "domain.bin", "uint16"),
            key=_mapped(folder / "key.bin", "uint64"),
            counts=_mapped(folder / "counts.bin", "int64") if "counts.bin" in meta["files"] else None,
            token_bytes=_mapped(folder / "token_bytes.bin", "uint32")
            if "token_bytes.bin" in meta["files"]
            else None,
            domains=meta["domains"],
            checksum=hashlib.sha256(json.dumps([meta["files"], meta["domains"]]).encode()).hexdigest(),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        if not folder.is_dir():  # removed meanwhile: it was not used for long
            return None
        log.warning("The token cache entry %s is damaged (%s) and is made again.", folder, error)
        return None


def _mapped(path: Path, dtype: str) -> np.ndarray:
    if path.stat().st_size == 0:  # cannot be mapped
        return np.zeros(0, dtype=dtype)
    # A plain view of the map: slicing np.memmap itself costs ten times as much.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
