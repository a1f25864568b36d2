"""The token cache: what it keeps, reuses, refuses and repairs; several processes at once."""

import json
import logging
import subprocess
import sys
import time

import numpy as np
import pytest
import tokenizers
from data_helpers import TEXTS, many_texts, write_jsonl
from safetensors import safe_open
from tokenizers import models, normalizers, pre_tokenizers, trainers

from datamodules import token_cache
from datamodules.documents import Document, Source, hash64
from datamodules.text_files import file_source
from datamodules.token_cache import PieceCache, cached_shards
from datamodules.tokenizer import load_tokenizer
from t6_lightning.common.errors import BadInput


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("T6_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def entries(folder):
    return sorted(path for path in folder.iterdir() if path.is_file() and path.suffix == "")


def source_of(texts, name="texts", reads=None):
    """A source over texts; `reads` collects one entry each time that it is read."""

    def documents():
        if reads is not None:
            reads.append(name)
        for i, text in enumerate(texts):
            yield Document(text, "even" if i % 2 == 0 else "odd", hash64(text))

    return Source(name, f"{name} {hash(tuple(texts))}", documents)


def test_entry_holds_every_document_exactly():
    tokenizer = load_tokenizer("bpe", 400, lambda: TEXTS)
    texts = many_texts(3000) + TEXTS
    (shard,) = cached_shards([source_of(texts)], tokenizer)
    assert shard.tokens.dtype == np.uint16
    assert len(shard.n_bytes) == len(texts)
    for i, text in enumerate(texts):
        assert tokenizer.decode(shard.tokens[shard.offsets[i] : shard.offsets[i + 1]]) == text
        assert shard.n_bytes[i] == len(text.encode())
        assert shard.domains[shard.domain[i]] == ("even" if i % 2 == 0 else "odd")
        assert shard.key[i] == hash64(text)
    assert shard.counts.tolist() == np.bincount(shard.tokens, minlength=tokenizer.vocab_size).tolist()


def test_second_use_reads_and_tokenizes_nothing(caplog):
    caplog.set_level(logging.INFO)
    tokenizer, reads = load_tokenizer("bytes", 0, list), []
    first = cached_shards([source_of(TEXTS, "a", reads), source_of(TEXTS, "b", reads)], tokenizer)
    caplog.clear()
    again = cached_shards([source_of(TEXTS, "a", reads), source_of(TEXTS, "b", reads)], tokenizer)
    assert reads == ["a", "b"]
    assert [shard.checksum for shard in again] == [shard.checksum for shard in first]
    assert "nothing is tokenized" in caplog.text
    cached_shards([source_of(TEXTS, "a", reads), source_of(TEXTS, "c", reads)], tokenizer)
    assert reads == ["a", "b", "c"]  # only what is new


def test_another_tokenizer_or_a_changed_file_is_another_entry(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)

    def tokens(spec):
        source = file_source(path, "text", None, "text", "file")
        return len(cached_shards([source], load_tokenizer(spec, 300, lambda: TEXTS))[0].tokens)

    as_bytes = tokens("bytes")
    assert tokens("bpe") < as_bytes
    write_jsonl(path, [*TEXTS, "more"])
    assert tokens("bytes") == as_bytes + 4


@pytest.mark.parametrize("place", ["length", "header", "offsets", "key", "tokens", "last byte"])
@pytest.mark.parametrize("damage", ["cut", "flip", "emptied"])
def test_damaged_entry_is_made_again(place, damage, home, caplog):
    tokenizer, reads = load_tokenizer("bytes", 0, list), []
    (before,) = cached_shards([source_of(TEXTS, reads=reads)], tokenizer)
    expected = before.tokens.tolist()
    (path,) = entries(home / "tokens")
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    places = {"length": 0, "header": data.index(b"sha256") + 12, "last byte": len(data) - 1}
    at = places[place] if place in places else begin + header[place]["data_offsets"][0]
    path.unlink()  # `before` still maps the old bytes
    flipped = data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]
    path.write_bytes({"cut": data[:at], "flip": flipped, "emptied": b""}[damage])
    (after,) = cached_shards([source_of(TEXTS, reads=reads)], tokenizer)
    assert after.tokens.tolist() == expected
    assert after.checksum == before.checksum
    assert len(reads) == 2
    assert "is damaged" in caplog.text


def test_killed_writer_leaves_nothing_in_the_way(home):
    tokenizer = load_tokenizer("bytes", 0, list)
    cached_shards([source_of(TEXTS)], tokenizer)
    (entry,) = entries(home / "tokens")
    entry.rename(entry.with_suffix(".tmp"))  # as if killed just before the rename
    (shard,) = cached_shards([source_of(TEXTS)], tokenizer)
    assert len(shard.tokens) == sum(len(text.encode()) for text in TEXTS)
    assert not entry.with_suffix(".tmp").exists()


def test_entry_is_a_safetensors_file(home):
    (shard,) = cached_shards([source_of(TEXTS)], load_tokenizer("bytes", 0, list))
    with safe_open(entries(home / "tokens")[0], "numpy") as file:
        assert set(file.keys()) == {"tokens", "offsets", "n_bytes", "domain", "key", "counts"}
        for name in file.keys():  # noqa: SIM118
            assert np.array_equal(file.get_tensor(name), getattr(shard, name))
        size = sum(len(text.encode()) for text in TEXTS)
        assert (file.metadata()["documents"], file.metadata()["bytes"]) == (str(len(TEXTS)), str(size))


def test_a_large_source_goes_through_files(home, monkeypatch):
    tokenizer = load_tokenizer("bytes", 0, list)
    (held,) = cached_shards([source_of(TEXTS)], tokenizer)
    entries(home / "tokens")[0].unlink()
    monkeypatch.setattr(token_cache, "IN_MEMORY_BYTES", 10)
    (through_files,) = cached_shards([source_of(TEXTS)], tokenizer)
    assert through_files.checksum == held.checksum
    assert len(list((home / "tokens").iterdir())) == 2  # the entry and a lock


def test_bad_source_leaves_nothing_behind(home):
    def documents():
        yield Document("good", "text", 1)
        raise BadInput("line 2 is bad.")

    with pytest.raises(BadInput, match="line 2"):
        cached_shards([Source("s", "s", documents)], load_tokenizer("bytes", 0, list))
    assert [path for path in (home / "tokens").iterdir() if path.suffix != ".lock"] == []


def test_two_processes_fill_one_entry(tmp_path, home):
    path = write_jsonl(tmp_path / "a.jsonl", many_texts(5000))
    code = (
        "import sys, pathlib\n"
        "from datamodules.text_files import file_source\n"
        "from datamodules.token_cache import cached_shards\n"
        "from datamodules.tokenizer import load_tokenizer\n"
        "source = file_source(pathlib.Path(sys.argv[1]), 'text', None, 'text', 'file')\n"
        "print(cached_shards([source], load_tokenizer('bytes', 0, list))[0].checksum)\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=100)[0] for process in both]
    assert printed[0] == printed[1] != ""
    assert len(entries(home / "tokens")) == 1


def test_byte_counts_are_exact_without_a_byte_level_tokenizer(tmp_path):
    loaded = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    loaded.normalizer = normalizers.BertNormalizer()
    loaded.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[SEP]"])
    loaded.train_from_iterator(TEXTS, trainer)
    loaded.save(str(tmp_path / "tokenizer.json"))
    (shard,) = cached_shards([source_of([*TEXTS, "   "])], load_tokenizer(str(tmp_path), 0, list))
    assert shard.n_bytes.tolist() == [len(text.encode()) for text in TEXTS]  # "   " has no tokens
    assert shard.token_bytes is not None
    sums = np.add.reduceat(shard.token_bytes, shard.offsets[:-1])
    assert sums.tolist() == shard.n_bytes.tolist()


def pieces_of(home):
    return home / "tokens" / "pieces"


def piece(number, size=1000):
    text = f"{number} " + "x" * size
    return Source(f"piece {number}", f"identity {number}", lambda: iter([Document(text, "d", hash64(text))]))


def test_pieces_not_used_for_longest_go_first(home):
    tokenizer = load_tokenizer("bytes", 0, list)
    cache = PieceCache(tokenizer, 10**9)
    held = cache.shard(piece(0))
    size = entries(pieces_of(home))[0].stat().st_size
    cache = PieceCache(tokenizer, 8 * size + size // 2)
    for number in range(30):
        cache.shard(piece(number))
        cache.shard(piece(0))  # in use all the time
        time.sleep(0.002)
    assert 4 <= len(entries(pieces_of(home))) <= 8 + 1
    assert held.tokens[:2].tolist() == list(b"0 ")  # what is mapped stays readable
    reads = []
    cache.shard(Source("piece 0", "identity 0", lambda: reads.append(1) or iter([])))
    cache.shard(Source("piece 29", "identity 29", lambda: reads.append(1) or iter([])))
    assert reads == []


def test_an_empty_piece_is_kept_like_any_other(home):
    tokenizer, reads = load_tokenizer("bytes", 0, list), []
    source = Source("empty", "empty", lambda: reads.append(1) or iter([]))
    for _ in range(2):
        assert len(PieceCache(tokenizer, 10**9).shard(source).n_bytes) == 0
    assert reads == [1]


def test_a_damaged_piece_is_made_again(home, caplog):
    tokenizer = load_tokenizer("bytes", 0, list)
    before = PieceCache(tokenizer, 10**9).shard(piece(1)).tokens.tolist()
    (path,) = entries(pieces_of(home))
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-4] + b"oops")
    assert PieceCache(tokenizer, 10**9).shard(piece(1)).tokens.tolist() == before
    assert "is damaged" in caplog.text


def test_processes_fill_and_remove_pieces_at_once(home):
    code = (
        "import sys\n"
        "from datamodules.documents import Document, Source, hash64\n"
        "from datamodules.token_cache import PieceCache\n"
        "from datamodules.tokenizer import load_tokenizer\n"
        "cache = PieceCache(load_tokenizer('bytes', 0, list), 60_000)\n"
        "for i in range(200):\n"
        "    text = f'{i % 40} ' + 'x' * 1000\n"
        "    source = Source('s', f'identity {i % 40}', lambda: iter([Document(text, 'd', hash64(text))]))\n"
        "    assert bytes(cache.shard(source).tokens.astype('uint8')) == text.encode()\n"
        "print('good')\n"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in both:
        out, err = process.communicate(timeout=100)
        assert out == "good\n", err
        assert "damaged" not in err
