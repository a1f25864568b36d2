"""Tokenized documents on disk: unshuffled, memory-mapped, one file per source and tokenizer.

A source is a local file, or one piece (some hundred kilobytes to megabytes) of a streamed file. An entry
T6_HOME/tokens/KEY, or T6_HOME/tokens/pieces/KEY, is a safetensors file, written beside and renamed, of

    tokens       uint16 (uint32 for large vocabularies) (n_tokens,)   ids of all documents, no separators
    offsets      int64  (n_documents + 1,)   where each document begins in tokens
    n_bytes      int64  (n_documents,)       its UTF-8 bytes
    domain       uint16 (n_documents,)       its domain, an index into the list `domains`
    key          uint64 (n_documents,)       its hash for the train/validation split
    counts       int64  (vocab_size,)        how often each id occurs; not for pieces
    token_bytes  uint32 (n_tokens,)          bytes each token covers; only where an id does not tell
    lost         int64  (n_documents,)       bytes that the ids do not give back; only where there are token_bytes

and its metadata: `domains` (a JSON list), `damage` (what had to be left out, a JSON list of [kind, place, how often]),
what it was made of, and a SHA-256 of arrays and domains.

KEY hashes the source's identity (for a file: path, size, time of change and how it is cut), the tokenizer's
fingerprint and this layout. An entry whose SHA-256 is not that of its contents is made again.
Pieces are many: beyond a limit on their bytes those not used for longest are removed.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
from filelock import FileLock

from datamodules.documents import Damage, Document, Source
from datamodules.mapping import mapped
from datamodules.progress import TokenizingProgress
from datamodules.system_faults import named, written
from datamodules.tokenizer import Tokenizer
from t6_lightning.common.errors import BadInput
from t6_lightning.common.home import t6_home

log = logging.getLogger(__name__)

LAYOUT = 3
BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 1024
CHARACTERS_AHEAD = 16 << 20
"""Of batches that wait or are encoded at a time, where there are several."""
IN_MEMORY_BYTES = 16 << 20
"""Ids of a source held in memory while it is tokenized; more go through a file."""
COUNTED_AT_ONCE = 1 << 20
"""Ids, of which numpy makes wider ones to count them."""
DTYPES = {"U16": "<u2", "U32": "<u4", "U64": "<u8", "I64": "<i8"}
"""Safetensors' names of numpy's types."""
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
    lost: np.ndarray | None
    domains: list[str]
    checksum: str
    """sha256 (hex) over everything above: the same wherever and whenever it was tokenized."""
    damage: Damage
    """What of the source had to be left out."""


class PieceCache:
    """Shards of single pieces, from the cache or tokenized into it; at most `limit` bytes of them stay.

    Several processes and threads may share the folder. A shard in use stays readable when its entry goes.
    """

    def __init__(self, tokenizer: Tokenizer, limit: int):
        self.tokenizer, self.limit = tokenizer, limit
        self._written = limit  # so that the first entry written looks at what others have left

    def shard(self, source: Source) -> Shard:
        """The piece, which may hold no document. Raises what reading the source raises."""
        file = t6_home() / "tokens" / "pieces" / _key(source, self.tokenizer)
        shard = _open(file)
        if shard is not None:
            with contextlib.suppress(OSError):
                os.utime(file)  # the time of its last use
            return shard
        shard = _fill(file, source, self.tokenizer, None)
        self._written += _stat(file).st_size
        if self._written > self.limit // 16:
            self._written = 0
            self._remove_oldest(file.parent)
        return shard

    def _remove_oldest(self, pieces: Path) -> None:
        with FileLock(pieces / "removal.lock"):
            entries = [(_stat(file), file) for file in pieces.iterdir() if file.suffix == ""]
            total = 0
            for stat, file in sorted(entries, key=lambda entry: entry[0].st_mtime, reverse=True):
                total += stat.st_size
                if total > self.limit:
                    file.unlink(missing_ok=True)


def are_cached(sources: Iterable[Source], tokenizer: Tokenizer) -> bool:
    """Whether `cached_shards` would tokenize nothing."""
    return all(_file(source, tokenizer).exists() for source in sources)


def cached_shards(sources: Iterable[Source], tokenizer: Tokenizer) -> list[Shard]:
    """The shards of the sources, from the cache where it has them, else tokenized into it.

    Raises BadInput for what is wrong with a source; the cache then holds nothing of it.
    """
    sources = list(sources)
    shards = {i: shard for i, source in enumerate(sources) if (shard := _open(_file(source, tokenizer)))}
    missing = [i for i in range(len(sources)) if i not in shards]
    if not missing:
        log.info("All %d sources come from the token cache; nothing is tokenized.", len(sources))
    else:
        log.info("%d of %d sources come from the token cache.", len(shards), len(sources))
        with TokenizingProgress(len(missing)) as progress:
            for i in missing:
                shards[i] = _fill(_file(sources[i], tokenizer), sources[i], tokenizer, progress)
                progress.finish_source()
    return [shards[i] for i in range(len(sources))]


def _key(source: Source, tokenizer: Tokenizer) -> str:
    layout = f"{LAYOUT}" if tokenizer.token_bytes is not None else f"{LAYOUT} lost"
    text = f"{layout}\0{source.identity}\0{tokenizer.fingerprint}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _file(source: Source, tokenizer: Tokenizer) -> Path:
    return t6_home() / "tokens" / _key(source, tokenizer)


def _stat(file: Path) -> os.stat_result:
    """Of an entry that another process may have removed: then all zeros."""
    try:
        return file.stat()
    except OSError:
        return os.stat_result([0] * 10)


def _fill(file: Path, source: Source, tokenizer: Tokenizer, progress: TokenizingProgress | None) -> Shard:
    """Tokenize a source into its file. Without `progress` it is a piece, which may be empty."""
    with written(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        # A fixed set of lock files: pieces are too many to have one each.
        with FileLock(file.with_name(f"{file.name[:2]}.lock")):
            if shard := _open(file):  # another process was faster
                return shard
            # Under the lock nobody else writes this entry: what lies here was left by a process that was killed.
            beside = file.with_suffix(".tmp")
            try:
                _write(source, tokenizer, beside, progress)
                os.replace(beside, file)
            finally:
                beside.unlink(missing_ok=True)
            shard = _open(file)
    if shard is None:
        raise OSError(f"{file} does not read back as it was written.")
    return shard


def _write(source: Source, tokenizer: Tokenizer, file: Path, progress: TokenizingProgress | None) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    by_id = tokenizer.token_bytes
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    lengths: list[int] = []
    n_bytes: list[int] = []
    domain: list[int] = []
    lost: list[int] = []
    key: list[int] = []
    domains: dict[str, int] = {}
    with _spooled(file) as tokens, _spooled(file) as token_bytes:

        def take(documents: list[Document], encoded: Encoded) -> None:
            for document, (ids, covered) in zip(documents, encoded, strict=True):
                if len(ids) == 0:  # nothing to predict: blanks that the tokenizer drops
                    continue
                lengths.append(len(ids))
                n_bytes.append(int(covered.sum()))
                domain.append(domains.setdefault(document.domain, len(domains)))
                key.append(document.key)
                tokens.write(ids.astype(dtype).data)
                if by_id is None:
                    lost.append(tokenizer.lost_bytes(document.text, ids))
                    token_bytes.write(covered.astype(np.uint32).data)
                if progress is not None:
                    for begin in range(0, len(ids), COUNTED_AT_ONCE):
                        counts[:] += np.bincount(ids[begin : begin + COUNTED_AT_ONCE], minlength=len(counts))
            if progress is not None:
                progress.add(source.name, len(documents), sum(len(ids) for ids, _ in encoded))
            if len(domains) > 1 << 16:
                raise BadInput(
                    f"domain_field: {source.name} has more than {1 << 16:,} domains; name a column with fewer values."
                )

        for batch in _encoded(_batches(source.documents()), tokenizer):
            take(*batch)
            del batch  # a single document may be long: two of them are not held at a time
        if not lengths and progress is not None:
            raise BadInput(f"{source.name} holds no documents.")
        # The widest first, so that each array begins where its dtype may lie.
        parts: dict[str, tuple[str, int, IO[bytes]]] = {
            "offsets": _part("I64", np.cumsum([0, *lengths], dtype="<i8")),
            "n_bytes": _part("I64", np.array(n_bytes, dtype="<i8")),
            "key": _part("U64", np.array(key, dtype="<u8")),
        }
        if progress is not None:
            parts["counts"] = _part("I64", counts.astype("<i8"))
        if by_id is None:
            parts["lost"] = _part("I64", np.array(lost, dtype="<i8"))
            parts["token_bytes"] = "U32", sum(lengths), token_bytes
        parts["tokens"] = f"U{8 * dtype.itemsize}", sum(lengths), tokens
        parts["domain"] = _part("U16", np.array(domain, dtype="<u2"))
        about = {
            "source": source.name,
            "tokenizer": tokenizer.fingerprint,
            "documents": str(len(lengths)),
            "bytes": str(sum(n_bytes)),
            "damage": json.dumps([[*what, times] for what, times in sorted(source.damage.items())]),
        }
        _write_safetensors(file, parts, list(domains), about)


def _spooled(file: Path) -> "tempfile.SpooledTemporaryFile[bytes]":
    return tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES, dir=str(file.parent))


def _part(dtype: str, values: np.ndarray) -> tuple[str, int, IO[bytes]]:
    return dtype, len(values), io.BytesIO(values.tobytes())


def _write_safetensors(
    file: Path, parts: dict[str, tuple[str, int, IO[bytes]]], domains: list[str], about: dict[str, str]
) -> None:
    """Arrays (dtype, length, bytes) one after the other. The library's own writer holds all of them in memory."""
    place = 0
    arrays: dict[str, Any] = {}
    for name, (dtype, length, _) in parts.items():
        end = place + length * np.dtype(DTYPES[dtype]).itemsize
        arrays[name] = {"dtype": dtype, "shape": [length], "data_offsets": [place, end]}
        place = end
    digest = _digest(arrays, domains)
    for _, _, content in parts.values():
        content.seek(0)
        while chunk := content.read(1 << 20):
            digest.update(chunk)
    metadata = about | {"domains": json.dumps(domains), "sha256": digest.hexdigest()}
    header = json.dumps({"__metadata__": metadata, **arrays}).encode()
    header += b" " * (-len(header) % 8)
    with open(file, "wb") as written:
        written.write(len(header).to_bytes(8, "little") + header)
        for _, _, content in parts.values():
            content.seek(0)
            shutil.copyfileobj(content, written, 1 << 20)


def _digest(arrays: dict[str, Any], domains: list[str]) -> "hashlib._Hash":
    return hashlib.sha256(json.dumps([arrays, domains], sort_keys=True).encode())


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
    """The batches in order, each with its ids: threads encode some batches ahead while this one reads, as long as the
    batches together have no more than CHARACTERS_AHEAD."""
    waiting: deque[tuple[list[Document], Future[Encoded], int]] = deque()
    characters = 0
    with ThreadPoolExecutor(TOKENIZING_THREADS) as pool:
        for batch in chain(batches, [None]):
            texts = [document.text for document in batch or []]
            length = sum(map(len, texts))
            while waiting and (
                batch is None
                or len(waiting) > 2 * TOKENIZING_THREADS
                or characters + length > CHARACTERS_AHEAD
            ):
                documents, future, finished = waiting.popleft()
                yield documents, future.result()
                characters -= finished
                del documents, future
            if batch is not None:
                waiting.append((batch, pool.submit(tokenizer.encode_batch_with_bytes, texts), length))
                characters += length
                del texts


def _open(file: Path) -> Shard | None:
    """The entry, checked; None if there is none or (with a warning) a damaged one."""
    try:
        with named(str(file)):
            contents = mapped(file)
            begin = 8 + int.from_bytes(contents[:8], "little")
            arrays = json.loads(bytes(contents[8:begin]))
            metadata = arrays.pop("__metadata__")
            domains = json.loads(metadata["domains"])
            digest = _digest(arrays, domains)
            with open(
                file, "rb"
            ) as opened:  # not through the mapping, whose pages would count as this process's
                opened.seek(min(begin, len(contents)))
                while chunk := opened.read(1 << 20):
                    digest.update(chunk)
        if digest.hexdigest() != metadata["sha256"]:
            raise ValueError("its SHA-256 is not what was written")
        data = {
            name: np.ndarray(of["shape"], DTYPES[of["dtype"]], contents, begin + of["data_offsets"][0])
            for name, of in arrays.items()
        }
        return Shard(
            tokens=data["tokens"],
            offsets=data["offsets"],
            n_bytes=data["n_bytes"],
            domain=data["domain"],
            key=data["key"],
            counts=data.get("counts"),
            token_bytes=data.get("token_bytes"),
            lost=data.get("lost"),
            domains=domains,
            checksum=metadata["sha256"],
            damage=Counter({(kind, place): n for kind, place, n in json.loads(metadata["damage"])}),
        )
    except BadInput as error:
        if isinstance(error.__cause__, FileNotFoundError):  # also removed meanwhile: it was not used for long
            return None
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        log.warning("The token cache entry %s is damaged (%s) and is made again.", file, error)
        return None
