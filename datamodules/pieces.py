"""Pieces: the parts in which streamed files are read, tokenized and cached, numbered 0, 1, ... in each file.

Of a parquet file a piece is ROWS_PER_PIECE rows of a row group, so that any depth costs one footer, one column chunk
and the tokenizing of few documents. Of JSON lines, plain or compressed, piece k holds the lines that begin within bytes
k*P .. (k+1)*P - 1 of the decompressed file (P = LINES_BYTES): what lies before it must be decompressed once to get
there, at most the file.
"""

import contextlib
import hashlib
import io
import json
import logging
from collections import Counter, OrderedDict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from datamodules.decompression import COMPRESSIONS, Damaged, decompressed
from datamodules.documents import Damage, Document, Source, hash64, is_unicode, utf8_bytes
from datamodules.json_rows import reach
from datamodules.limits import MAX_DOCUMENT_LENGTH
from datamodules.parquet_rows import rows_at_once
from datamodules.stores import LOCAL, Store, StoredFile, count_damage, counting
from datamodules.token_cache import PieceCache, Shard
from t6_lightning.common.errors import BadInput, first_line
from t6_lightning.common.files import replacing, write_atomically
from t6_lightning.common.home import t6_home

if TYPE_CHECKING:
    import pyarrow.parquet as pq

log = logging.getLogger(__name__)

RECIPE = 2
"""Part of the cache key: raise it whenever the same bytes would give other documents."""

LINES_BYTES = 2 << 20
FETCHED_AT_ONCE = (1 << 20, 8 << 20)
"""Stored bytes of a compressed file asked for at a time: at first, and at most on a long way."""
ROWS_PER_PIECE = 50
ROW_GROUP_BYTES = 64 << 20
"""Stored bytes of a row group's columns up to which they are fetched in one go; larger ones come in parts."""
HELD_BYTES = 256 << 20
"""Stored bytes of row groups that a reader holds for their next pieces."""
FOOTERS_KEPT = 64

TOO_LONG = "a document longer than max_document_length is left out"

PARQUET, LINES = ".parquet", (".jsonl", ".json")


Fetched = list[tuple[int, bytes]]
"""(where in the file, bytes from there on)"""


def readable(path: str) -> bool:
    """Whether a file has a suffix that can be streamed."""
    stem = path
    for suffix in COMPRESSIONS:
        stem = stem.removesuffix(suffix)
    return path.endswith(PARQUET) or stem.endswith(LINES)


class Pieces:
    """The tokenized pieces of some files of a store; for several threads, as long as none shares a file.

    Args:
        store, files: What is read.
        cache: Where tokenized pieces are kept; None where only texts are asked for.
        text_field: Column that holds the text; a dotted name reaches into an object.
        domain_field: Column whose value labels a document's domain; None: all are `domain`.
        most: UTF-8 bytes of a document or line; longer ones are left out.
        told: Damage of pieces read before, which is not counted again; what is met is added to it.
    """

    def __init__(
        self,
        store: Store,
        files: list[StoredFile],
        cache: PieceCache | None,
        text_field: str,
        domain_field: str | None,
        domain: str,
        told: Damage | None = None,
        most: int = MAX_DOCUMENT_LENGTH,
    ):
        self.told: Damage = Counter() if told is None else told
        self.most = most
        self.store, self.files, self.cache = store, files, cache
        self.text_field, self.domain_field, self.domain = text_field, domain_field, domain
        self._start_anew()

    def _start_anew(self) -> None:
        self._groups: dict[int, list[int]] = {}
        self._held: OrderedDict[tuple[int, int], Fetched] = OrderedDict()
        self._lines: dict[int, _Lines] = {}
        self._footer = lru_cache(maxsize=FOOTERS_KEPT)(self._read_footer)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_groups", "_held", "_lines", "_footer")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_anew()

    def groups(self, file: int) -> list[int] | None:
        """How many pieces each row group of a parquet file has. Of a file of lines: how many it has in all, None
        where nobody has read it to the end yet."""
        if file not in self._groups:
            try:
                kept = json.loads(self._kept("counts", file).read_text())
                self._groups[file] = kept["pieces"]
                self._tell(Counter({(kind, place): n for kind, place, n in kept["damage"]}))
            except (OSError, ValueError):
                if not self.is_parquet(file):
                    return None
                footer = self._footer(file)
                rows = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
                self._note_groups(file, [-(-n // ROWS_PER_PIECE) for n in rows], Counter())
        return self._groups[file]

    def _is_behind(self, file: int, piece: int) -> bool:
        groups = self.groups(file)
        return groups is not None and piece >= sum(groups)

    def is_parquet(self, file: int) -> bool:
        return self.files[file].path.endswith(PARQUET)

    def shard(self, file: int, piece: int) -> Shard | None:
        """The documents of a piece, tokenized, maybe none; None behind the end of the file."""
        if self._is_behind(file, piece):
            return None
        name = f"{self.files[file].path}, piece {piece}"
        assert self.cache is not None
        damage: Damage = Counter()
        try:
            shard = self.cache.shard(
                Source(
                    name,
                    self._identity(file, str(piece)),
                    lambda: self._documents(file, piece, damage),
                    damage,
                )
            )
        except _End:
            return None
        self._tell(shard.damage)
        return shard

    def documents(self, file: int, piece: int) -> list[Document] | None:
        """The texts of a piece, not cached; None behind the end of the file."""
        if self._is_behind(file, piece):
            return None
        damage: Damage = Counter()
        try:
            documents = list(self._documents(file, piece, damage))
        except _End:
            return None
        self._tell(damage)
        return documents

    def _tell(self, damage: Damage) -> None:
        """Count damage, also where it is known from the cache; once each."""
        for (kind, place), times in damage.items():
            with counting:
                new = (kind, place) not in self.told
                self.told[kind, place] = times
            if new:
                count_damage(kind, place, times)

    def _documents(self, file: int, piece: int, damage: Damage) -> Iterator[Document]:
        rows = self._row_group(file, piece) if self.is_parquet(file) else self._line_rows(file, piece, damage)
        for text, label in rows:
            if isinstance(text, str) and not is_unicode(text):
                damage["a row with half of a surrogate pair is left out", self._place(file, piece)] += 1
            elif isinstance(text, str) and utf8_bytes(text) > self.most:
                damage[TOO_LONG, self._place(file)] += 1
            elif isinstance(text, str) and text:
                yield Document(text, self.domain if label is None else str(label), hash64(text))
            elif text is not None and text != "":
                damage["a row without text in its text column is left out", self._place(file, piece)] += 1

    def _row_group(self, file: int, piece: int) -> Iterator[tuple[Any, Any]]:
        import pyarrow.parquet as pq

        footer = self._footer(file)
        columns = [self.text_field, *([self.domain_field] if self.domain_field else [])]
        present = footer.schema.to_arrow_schema().names
        if missing := [name for name in columns if name.split(".")[0] not in present]:
            raise self._no_column(file, missing[0], present)
        roots = list(dict.fromkeys(name.split(".")[0] for name in columns))
        groups = self.groups(file) or []
        group, slice_of_group = 0, piece
        while slice_of_group >= groups[group]:
            slice_of_group -= groups[group]
            group += 1
        with _RangeFile(self.store, self.files[file]) as opened:
            spans = _column_chunks(footer.row_group(group), roots)
            large = sum(end - begin for begin, end in spans) > ROW_GROUP_BYTES
            if not large:
                opened.fetched = self._fetched(file, group, spans)
            # In this thread: the reads of pyarrow's own would go on behind an error, and at the program's end.
            buffered = FETCHED_AT_ONCE[1] if large else 0
            reader = pq.ParquetFile(
                opened,
                metadata=footer,
                pre_buffer=False,
                buffer_size=buffered,
                page_checksum_verification=True,
            )
            row = -slice_of_group * ROWS_PER_PIECE
            try:
                size = rows_at_once(footer, [group], roots, ROWS_PER_PIECE)
                for batch in reader.iter_batches(size, [group], columns=roots, use_threads=False):
                    wanted = batch.slice(
                        max(-row, 0), max(min(ROWS_PER_PIECE - row, len(batch)) - max(-row, 0), 0)
                    )
                    row += len(batch)
                    values = [reach(wanted.column(name.split(".")[0]).to_pylist(), name) for name in columns]
                    yield from zip(
                        values[0], values[1] if self.domain_field else [None] * len(wanted), strict=True
                    )
                    if row >= ROWS_PER_PIECE:
                        break
            except BadInput:
                raise
            except Exception as error:  # pyarrow's own
                raise BadInput(f"{self._place(file, piece)}: {first_line(error)}.") from error

    def _fetched(self, file: int, group: int, spans: list[tuple[int, int]]) -> "Fetched":
        """The stored bytes of a row group's columns, held for the pieces that come next."""
        fetched = self._held.pop((file, group), None)
        if fetched is None:
            fetched = [
                (begin, self.store.read(self.files[file], begin, end)) for begin, end in _joined(spans)
            ]
        self._held[file, group] = fetched
        with contextlib.suppress(KeyError, RuntimeError):  # other threads hold and let go as well
            while sum(len(data) for held in list(self._held.values()) for _, data in held) > HELD_BYTES:
                self._held.popitem(last=False)
        return fetched

    def _read_footer(self, file: int) -> "pq.FileMetaData":
        """Footers of remote files are kept on disk for all processes: they are large and asked for often."""
        import pyarrow.parquet as pq

        kept = self._kept("footers", file)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(kept.with_name(f"{kept.name[:2]}.lock")):
            with contextlib.suppress(Exception):  # not there, or damaged
                return pq.read_metadata(kept)
            try:
                with _RangeFile(self.store, self.files[file]) as opened:
                    footer = pq.read_metadata(opened)
            except BadInput:
                raise
            except Exception as error:  # pyarrow's own
                raise BadInput(f"{self._place(file)}: {first_line(error)}.") from error
            if self.store.revision != LOCAL:
                with replacing(kept) as beside:
                    footer.write_metadata_file(str(beside))
            return footer

    def _line_rows(self, file: int, piece: int, damage: Damage) -> Iterator[tuple[Any, Any]]:
        if file not in self._lines or self._lines[file].next > piece:
            self._lines[file] = _Lines(self.store, self.files[file], self.most)
        reader = self._lines[file]
        try:
            lines = reader.piece(piece)
        except BaseException:
            del self._lines[file]  # it stands in the middle of something
            raise
        damage.update({(kind, self._place(file)): n for kind, n in reader.damage.items()})
        if lines is None:
            del self._lines[file]
            self._note_groups(file, [reader.next], damage)
            self._tell(damage)
            raise _End
        columns = [self.text_field, *([self.domain_field] if self.domain_field else [])]
        names: set[str] = set()
        for line in lines.split(b"\n"):
            if len(line) > self.most:
                damage[TOO_LONG, self._place(file)] += 1
            elif line.strip():
                try:
                    row = json.loads(line)
                    names.update(row.keys())
                    values = [reach([row.get(name.split(".")[0])], name)[0] for name in columns]
                except (ValueError, TypeError, AttributeError, RecursionError):  # no JSON, or no object
                    damage["a malformed row is left out", self._place(file, piece)] += 1
                    continue
                yield values[0], values[1] if self.domain_field else None
        if names and (missing := [name for name in columns if name.split(".")[0] not in names]):
            raise self._no_column(file, missing[0], sorted(names))

    def _no_column(self, file: int, name: str, present: list[str]) -> BadInput:
        field = "text_field" if name == self.text_field else "domain_field"
        return BadInput(
            f"{field}: {self._place(file)} has no column {name!r}; present: {', '.join(present)}."
        )

    def _place(self, file: int, piece: int | None = None) -> str:
        place = f"{self.store.name}/{self.files[file].path}"
        return place if piece is None else f"{place}, piece {piece}"

    def _identity(self, file: int, piece: str) -> str:
        stored = self.files[file]
        place = f"{self.store.name} {stored.path} {stored.size} {stored.content}"
        columns = f"{self.text_field} {self.domain_field or '=' + self.domain}"
        if self.most != MAX_DOCUMENT_LENGTH:  # entries of before there was a limit stay valid
            columns += f" {self.most}"
        return f"{RECIPE} {place} {piece} {columns} {LINES_BYTES} {ROWS_PER_PIECE}"

    def _kept(self, kind: str, file: int) -> Path:
        key = hashlib.sha256(self._identity(file, kind).encode()).hexdigest()[:32]
        return t6_home() / "tokens" / kind / key

    def _note_groups(self, file: int, groups: list[int], damage: Damage) -> None:
        self._groups[file] = groups
        note = {"pieces": groups, "damage": [[*what, times] for what, times in damage.items()]}
        write_atomically(self._kept("counts", file), json.dumps(note) + "\n")


class _End(Exception):
    """The file has no such piece."""


class _Lines:
    """Reads a file of lines forward, piece by piece."""

    def __init__(self, store: Store, file: StoredFile, most: int):
        self.next = 0
        """Number of the piece that comes next."""
        self.damage: Counter[str] = Counter()
        """Why the file ends before its end, where it does."""
        self._skipping = False
        name = f"{store.name}/{file.path}"
        self._pieces = _cut(_decompressed(self._stored(store, file), name, self.damage), most, self.damage)

    def piece(self, number: int) -> bytes | None:
        """The lines of a piece not before `next`; None behind the end, and `next` is then their number."""
        while True:
            self._skipping = self.next < number
            lines = next(self._pieces, None)
            if lines is None:
                return None
            self.next += 1
            if self.next == number + 1:
                return lines

    def _stored(self, store: Store, file: StoredFile) -> Iterator[bytes]:
        begin, (size, most) = 0, FETCHED_AT_ONCE
        while begin < file.size:
            yield store.read(file, begin, min(begin + size, file.size))
            begin += size
            size = min(2 * size, most) if self._skipping else FETCHED_AT_ONCE[0]


def _decompressed(chunks: Iterator[bytes], path: str, damage: Counter[str]) -> Iterator[bytes]:
    """The text of a file. What is cut or damaged ends there, and `damage` then says so."""
    try:
        yield from decompressed(chunks, path)
    except Damaged as fault:
        if fault.cut:
            damage["the file is cut off; what is whole in it is read"] += 1
        else:
            damage[f"the file is damaged ({fault.reason}); what follows in it is left out"] += 1


def _cut(chunks: Iterator[bytes], most: int, damage: Counter[str]) -> Iterator[bytes]:
    """Piece after piece: the lines that begin within each LINES_BYTES of the text. Of a line of more than `most` bytes
    nothing is left but its end."""
    text, offset, boundary, dropped = bytearray(), 0, LINES_BYTES, 0
    for chunk in chunks:
        if dropped:
            end = chunk.find(b"\n") + 1
            dropped += end or len(chunk)
            if not end:
                continue
            chunk = chunk[end:]
            offset, dropped = offset + dropped, 0  # of what follows, and of it alone a place is looked for
            if offset + len(text) >= boundary:
                yield bytes(text)
                offset += len(text)
                text.clear()
                boundary += LINES_BYTES
                while offset >= boundary:
                    yield b""
                    boundary += LINES_BYTES
        text += chunk
        while offset + len(text) >= boundary:
            # The first line that begins at or behind the boundary.
            newline = text.find(b"\n", max(boundary - offset - 1, 0))
            if newline < 0:
                break
            yield bytes(text[: newline + 1])
            del text[: newline + 1]
            offset += newline + 1
            boundary += LINES_BYTES
            while offset >= boundary:  # a line longer than a piece
                yield b""
                boundary += LINES_BYTES
        begin = text.rfind(b"\n") + 1
        if len(text) - begin > most:
            damage[TOO_LONG] += 1
            dropped = len(text) - begin
            del text[begin:]
    if text:
        yield bytes(text)


class _RangeFile(io.RawIOBase):
    """A stored file as pyarrow wants it: it reads exactly the ranges that it needs."""

    def __init__(self, store: Store, file: StoredFile):
        self.store, self.file, self.position = store, file, 0
        self.fetched: Fetched = []
        """What is in memory already."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = (
            offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.file.size}[whence]
        )
        return self.position

    def tell(self) -> int:
        return self.position

    def read(self, size: int = -1) -> bytes:  # type: ignore[override]
        end = self.file.size if size < 0 else min(self.position + size, self.file.size)
        for begin, held in self.fetched:
            if begin <= self.position and end <= begin + len(held):
                data = held[self.position - begin : end - begin]
                break
        else:
            data = self.store.read(self.file, self.position, end) if end > self.position else b""
        self.position += len(data)
        return data


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same bytes with neighbours in one."""
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((begin, end))
    return joined


def _column_chunks(row_group: "pq.RowGroupMetaData", roots: list[str]) -> list[tuple[int, int]]:
    """(begin, end) in the file of the columns under these names."""
    spans = []
    for i in range(row_group.num_columns):
        column = row_group.column(i)
        if column.path_in_schema.split(".")[0] in roots:
            begin = column.data_page_offset
            if column.has_dictionary_page and column.dictionary_page_offset:
                begin = min(begin, column.dictionary_page_offset)
            spans.append((begin, begin + column.total_compressed_size))
    return spans
