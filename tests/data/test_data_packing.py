"""Packing: windows against a plain Python construction of the stream, and what batches say about bytes."""

import numpy as np
import pytest
import tokenizers
from data_helpers import TEXTS, many_texts
from tokenizers import models, normalizers, pre_tokenizers, trainers

from datamodules.corpus import Corpus
from datamodules.documents import Document, Source, hash64
from datamodules.packing import TrainingWindows, ValidationWindows
from datamodules.token_cache import cached_shards
from datamodules.tokenizer import Tokenizer, load_tokenizer
from t6_lightning.common.errors import BadInput

CONTEXT = 32


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("T6_HOME", str(tmp_path / "home"))


@pytest.fixture(params=["bytes", "bpe", "wordpiece"])
def tokenizer(request, tmp_path) -> Tokenizer:
    if request.param != "wordpiece":
        return load_tokenizer(request.param, 400, lambda: TEXTS)
    loaded = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    loaded.normalizer = normalizers.BertNormalizer()
    loaded.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[SEP]"]
    loaded.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special))
    loaded.save(str(tmp_path / "tokenizer.json"))
    return load_tokenizer(str(tmp_path), 0, list)


def corpus_of(tokenizer, val_fraction=0.3, val_tokens=None, extra=()):
    """Two training sources with a domain each, and one that only validates."""

    def source(name, texts):
        documents = [Document(text, name, hash64(text)) for text in texts]
        return Source(name, f"{name} {hash(tuple(texts))}", lambda: iter(documents))

    texts = {"a": many_texts(60, "a"), "b": many_texts(40, "b"), "c": [*many_texts(9, "c"), *extra]}
    shards = cached_shards([source(name, chosen) for name, chosen in texts.items()], tokenizer)
    return Corpus(tokenizer, shards[:2], {"c": [shards[2]]}, val_fraction, val_tokens)


def plain_stream(corpus, documents):
    """[(token, document, opens)] as the module's docstring says, built one by one."""
    stream = []
    for document in documents:
        stream.append((corpus.tokenizer.eot, True))
        stream += [(int(id), False) for id in corpus.table.tokens(document)]
    return [*stream, (corpus.tokenizer.eot, True)]


def row_of(batch, i):
    return {name: value[i] for name, value in batch.items()}


def test_training_windows_equal_a_plain_construction(tokenizer):
    corpus = corpus_of(tokenizer)
    windows = TrainingWindows(corpus.table, corpus.training_documents, tokenizer, CONTEXT, seed=3)
    n = windows.per_epoch
    for epoch in (0, 1):
        rng = np.random.default_rng([3, epoch])
        stream = plain_stream(corpus, rng.permutation(corpus.training_documents))
        order = rng.permutation(n)
        batch = windows.batch(epoch * n, n)
        for i in range(n):
            start = order[i] * CONTEXT
            expected = stream[start : start + CONTEXT + 1]
            row = row_of(batch, i)
            assert row["tokens"].tolist() == [token for token, _ in expected[:-1]]
            assert row["targets"].tolist() == [token for token, _ in expected[1:]]
            opened = np.cumsum([opens for _, opens in expected[:-1]]) - expected[0][1]
            assert row["documents"].tolist() == opened.tolist()
            assert (row["sample"], row["domain"]) == (epoch * n + i, -1)
            if tokenizer.token_bytes is not None:
                assert row["n_bytes"] == tokenizer.token_bytes[row["targets"].numpy()].sum()


def test_an_epoch_holds_every_byte_at_most_once_and_nearly_all(tokenizer):
    corpus = corpus_of(tokenizer)
    windows = TrainingWindows(corpus.table, corpus.training_documents, tokenizer, CONTEXT, seed=0)
    total = int(corpus.table.n_bytes[corpus.training_documents].sum())
    seen = int(windows.batch(0, windows.per_epoch)["n_bytes"].sum())
    assert total - 16 * CONTEXT < seen <= total


def test_order_depends_on_seed_and_sample_alone(tokenizer):
    corpus = corpus_of(tokenizer)

    def rows(seed, first, size):
        windows = TrainingWindows(corpus.table, corpus.training_documents, tokenizer, CONTEXT, seed)
        return windows.batch(first, size)["tokens"].tolist()

    whole = rows(0, 0, 300)  # several epochs
    assert rows(0, 120, 40) == whole[120:160]
    assert rows(0, 0, 1) + rows(0, 1, 2) == whole[:3]
    assert rows(1, 0, 300) != whole
    n = TrainingWindows(corpus.table, corpus.training_documents, tokenizer, CONTEXT, 0).per_epoch
    assert sorted(whole[:n]) != sorted(whole[n : 2 * n])  # another epoch is cut anew


def test_validation_predicts_every_byte_and_every_end_exactly_once(tokenizer):
    corpus = corpus_of(tokenizer, extra=["日本語の文章です。" * 9])
    windows = ValidationWindows(corpus.table, corpus.validation_documents, tokenizer, CONTEXT)
    batch = windows.batch(0, len(windows) + 5)
    assert batch["sample"].tolist() == list(range(len(windows)))
    for index, (name, documents) in enumerate(corpus.validation_documents.items()):
        rows = batch["domain"] == index
        counted = batch["targets"][rows][batch["targets"][rows] != -100]
        assert counted.tolist() == [token for token, _ in plain_stream(corpus, documents)[1:]]
        assert corpus.domains[index] == name
        assert batch["n_bytes"][rows].sum() == corpus.table.n_bytes[documents].sum()
    assert (batch["tokens"] >= 0).all()
    assert (batch["tokens"] < tokenizer.vocab_size).all()


def test_a_domain_without_documents_keeps_its_number(tokenizer):
    corpus = corpus_of(tokenizer)
    a, b, _ = (corpus.validation_documents[name] for name in "abc")
    for documents in ({"a": a[:0], "b": b}, {"a": a[:0], "b": b[:0], "c": b}, {"a": a[:0]}):
        windows = ValidationWindows(corpus.table, documents, tokenizer, CONTEXT)
        batch = windows.batch(0, len(windows))
        numbers = [i for i, chosen in enumerate(documents.values()) if len(chosen)]
        assert sorted(set(batch["domain"].tolist())) == numbers
        total = sum(int(corpus.table.n_bytes[chosen].sum()) for chosen in documents.values())
        assert int(batch["n_bytes"].sum()) == total
        both = windows.followed_by(ValidationWindows(corpus.table, {"d": a}, tokenizer, CONTEXT))
        assert both.domain[-1] == len(documents)


def test_windows_shorter_and_longer_than_documents(tokenizer):
    corpus = corpus_of(tokenizer)
    total = corpus.summary["val_bytes"]
    for context in (1, 2, 63, 5000):
        windows = ValidationWindows(corpus.table, corpus.validation_documents, tokenizer, context)
        assert windows.batch(0, len(windows))["n_bytes"].sum() == total


def test_too_little_text_for_the_context_is_said(tokenizer):
    corpus = corpus_of(tokenizer)
    with pytest.raises(BadInput, match="context: 1000000 is longer than all training text, which has"):
        TrainingWindows(corpus.table, corpus.training_documents, tokenizer, 1_000_000, 0)


def test_training_and_validation_share_no_document(tokenizer):
    twice = many_texts(60, "a")[:5]  # also in the training source "a"
    corpus = corpus_of(tokenizer, extra=[*twice, twice[0]])
    validation = np.concatenate(list(corpus.validation_documents.values()))
    assert not set(corpus.table.key[corpus.training_documents]) & set(corpus.table.key[validation])
    assert len(corpus.validation_documents["c"]) == 9 + 6
    assert corpus.domains == ["a", "b", "c"]


def test_validation_is_capped_by_whole_documents(tokenizer):
    full, capped = corpus_of(tokenizer), corpus_of(tokenizer, val_tokens=200)
    for side in ("validation_documents", "test_documents"):
        for name, documents in getattr(capped, side).items():
            assert documents.tolist() == getattr(full, side)[name][: len(documents)].tolist()
            assert (capped.table.length[documents] + 1).sum() <= 200 or len(documents) == 1
    assert capped.training_documents.tolist() == full.training_documents.tolist()
    assert capped.fingerprint == full.fingerprint


def test_nothing_left_on_one_side_is_said(tokenizer):
    shards = cached_shards(
        [Source("s", "s", lambda: iter([Document("only one", "text", 1 << 63)]))], tokenizer
    )
    with pytest.raises(BadInput, match=r"val_fraction: 0\.1 of 1 documents leaves none to validate on"):
        Corpus(tokenizer, shards, {}, 0.1, None)
    with pytest.raises(BadInput, match=r"val_fraction: 0\.9 of 1 documents leaves none to train on"):
        Corpus(tokenizer, shards, {}, 0.9, None)
    with pytest.raises(BadInput, match="val_files: 'text' is already a domain"):
        Corpus(tokenizer, shards, {"text": shards}, 0.1, None)


def test_summary_of_the_unigram_model_is_exact(tokenizer):
    corpus = corpus_of(tokenizer)
    train = plain_stream(corpus, corpus.training_documents)[:-1]
    counts = np.bincount([token for token, _ in train], minlength=tokenizer.vocab_size)
    bits = -np.log2((counts + 1) / (counts + 1).sum())
    targets = [
        token
        for chosen in corpus.validation_documents.values()
        for token, _ in plain_stream(corpus, chosen)[1:]
    ]
    summary = corpus.summary
    assert summary["train_tokens"] == len(train)
    assert summary["val_tokens"] == len(targets)
    assert summary["unigram_bits_per_byte"] == pytest.approx(bits[targets].sum() / summary["val_bytes"])
    assert ("gzip_bits_per_byte" in summary) == (tokenizer.token_bytes is not None)
