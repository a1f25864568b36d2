"""Damaged files of every form, made at random: each is read, or refused in one sentence, soon and without a crash."""

from __future__ import annotations

import io
import json
import random
import signal
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from data_helpers import TEXTS, many_texts, write

from datamodules import BadInput, stores
from datamodules.pieces import Pieces
from datamodules.stores import Folder
from datamodules.text_files import read_documents
from datamodules.token_cache import cached_shards
from datamodules.tokenizer import load_tokenizer

ROWS = [{"text": text, "meta": {"n": i}} for i, text in enumerate(TEXTS + many_texts(40))]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"
PROSE = "\n\n".join(TEXTS)
SECONDS_A_MUTANT = 20


def parquet(**options):
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), buffer, row_group_size=16, **options)
    return buffer.getvalue()


def originals(folder):
    """name -> bytes of whole files; those whose format has a checksum can never give another text."""
    contents = {
        "a.txt": PROSE,
        "a.txt.gz": PROSE,
        "a.jsonl": LINES,
        "a.json": json.dumps(ROWS, indent=1),
        "a.jsonl.gz": LINES,
        "a.jsonl.xz": LINES,
        "a.json.bz2": json.dumps(ROWS),
    }
    files = {name: write(folder / name, content).read_bytes() for name, content in contents.items()}
    checked = zstandard.ZstdCompressor(write_checksum=True).compress(LINES.encode())
    plain = {"b.parquet": parquet(), "c.parquet": parquet(compression="zstd", write_page_checksum=True)}
    return files | {"a.jsonl.zst": checked} | plain


CHECKSUMMED = (".gz", ".xz", ".bz2", ".zst")


def damaged(data, rng):
    """The bytes with flips, a cut, or a piece that is overwritten, doubled or lost."""
    kind = rng.choice(["flip", "flips", "cut", "overwritten", "doubled", "lost"])
    changed = bytearray(data)
    at = rng.randrange(len(data))
    length = rng.randint(1, min(300, len(data)))
    if kind.startswith("flip"):
        for _ in range(1 if kind == "flip" else rng.randint(2, 12)):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del changed[at:]
    elif kind == "overwritten":
        changed[at : at + length] = rng.choice([bytes(length), b"\xff" * length, rng.randbytes(length)])
    elif kind == "doubled":
        changed[at:at] = data[at : at + length]
    else:
        del changed[at : at + length]
    return bytes(changed)


def read_as_a_file(path):
    return list(read_documents(str(path)))


def read_as_a_stream(path):
    store = Folder(str(path.parent))
    pieces = Pieces(
        store, [file for file in store.files([path.name]) if file.size], None, "text", None, "text"
    )
    texts, piece = [], 0
    while pieces.files and (documents := pieces.documents(0, piece)) is not None:
        texts += [document.text for document in documents]
        piece += 1
    return texts


def outcome(read, path, whole):
    """ "same", "other" (a text that the damaged bytes do say) or "refused". Fails for anything else."""
    texts, said = None, None
    signal.alarm(SECONDS_A_MUTANT)
    try:
        texts = read(path)
    except BadInput as error:
        said = str(error)
    finally:
        signal.alarm(0)
    if said is not None:
        assert "\n" not in said
        assert 20 < len(said) < 600
        return "refused"
    return "same" if texts == whole else "other"


def fuzzed(folder, seed, mutants):
    """(name, reader) -> outcomes of so many mutants of each file."""
    rng = random.Random(seed)
    found = {}
    for name, data in originals(folder).items():
        path = folder / f"mutant-{name}"
        path.write_bytes(data)
        readers = [read_as_a_file]
        if name.endswith(".parquet") or ".jsonl" in name:  # what a stream takes
            readers.append(read_as_a_stream)
        whole = {read: read(path) for read in readers}
        counts = {read: Counter() for read in readers}
        for _ in range(mutants):
            path.write_bytes(bad := damaged(data, rng))
            for read in readers:
                stores.damage.clear()
                result = outcome(read, path, whole[read])
                if result == "other" and name.endswith(CHECKSUMMED):  # a stream goes on, and says so
                    assert read is read_as_a_stream, (name, bad.hex())
                    assert stores.damage, (name, bad.hex())
                if result == "other" and read is read_as_a_file and name == "a.txt":
                    assert "".join(read(path)) == bad.decode().removeprefix("\ufeff")
                counts[read][result] += 1
        path.unlink()
        found |= {(name, read.__name__): counts[read] for read in readers}
    return found


@pytest.fixture(autouse=True)
def _watched():
    """A read that hangs fails; what streams count stays here."""

    def late(*_):
        raise TimeoutError(f"a mutant took more than {SECONDS_A_MUTANT} s")

    before = signal.signal(signal.SIGALRM, late)
    stores.damage.clear()
    yield
    signal.signal(signal.SIGALRM, before)
    stores.damage.clear()


def test_a_damaged_file_is_read_or_refused_in_a_sentence(tmp_path):
    found = fuzzed(tmp_path, seed=1, mutants=12)
    assert sum(sum(counts.values()) for counts in found.values()) > 150
    assert sum(counts["refused"] for counts in found.values()) > 50


@pytest.mark.prove
def test_many_damaged_files_are_read_or_refused_in_a_sentence(tmp_path):
    found = fuzzed(tmp_path, seed=2, mutants=1000)
    print()
    for (name, read), counts in found.items():
        print(f"{name:12} {read:16} {', '.join(f'{n} {what}' for what, n in sorted(counts.items()))}")


def test_a_damaged_cache_entry_gives_the_same_tokens_again(tmp_path, monkeypatch, caplog):
    """Any byte of it, the sizes in its header too."""
    from datamodules.documents import Document, Source

    monkeypatch.setenv("T6_HOME", str(tmp_path))
    tokenizer, rng = load_tokenizer("bytes", 0, list), random.Random(3)
    source = Source("s", "s", lambda: iter([Document(text, "d", i) for i, text in enumerate(TEXTS)]))
    (whole,) = cached_shards([source], tokenizer)
    (entry,) = [path for path in (tmp_path / "tokens").iterdir() if path.suffix != ".lock"]
    data = entry.read_bytes()
    header = int.from_bytes(data[:8], "little")
    sizes = [(1 << bits).to_bytes(8, "little") + data[8:] for bits in (0, 10, 31, 62, 63)]
    nested = (header).to_bytes(8, "little") + b"[" * header + data[8 + header :]
    for bad in [*sizes, nested, *(damaged(data, rng) for _ in range(150))]:
        entry.unlink()
        entry.write_bytes(bad)
        signal.alarm(SECONDS_A_MUTANT)
        (again,) = cached_shards([source], tokenizer)
        signal.alarm(0)
        assert again.tokens.tolist() == whole.tokens.tolist()
        assert again.domains == whole.domains
        assert again.n_bytes.tolist() == whole.n_bytes.tolist()
