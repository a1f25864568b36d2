"""Mixtures: exact shares, own epochs, a schedule over tokens, and resume."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from data_helpers import many_texts, write_jsonl
from loopback_hub import LoopbackHub
from stream_helpers import c4, consume, fineweb_edu, first, tokens_of

from datamodules import C4, BadInput, FineWebEdu, Mixture, TextFiles, pieces
from datamodules.__main__ import main as prepare
from datamodules.mixture import Shares

COMMON = {"tokenizer": "bytes", "context": 64, "batch_size": 4, "val_tokens": 1500}
WEIGHTS = {"edu": 0.5, "c4": 0.3, "books": 0.2}


@pytest.fixture(scope="module")
def served():
    with LoopbackHub() as hub:
        hub.add("HuggingFaceFW/fineweb-edu", fineweb_edu())
        hub.add("allenai/c4", c4())
        yield hub


@pytest.fixture(autouse=True)
def hub(served, tmp_path, monkeypatch):
    monkeypatch.setenv("T6_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
    monkeypatch.setattr(pieces, "LINES_BYTES", 4000)
    write_jsonl(tmp_path / "books.jsonl", [f"book {text}" for text in many_texts(120, "b")])
    return served


@pytest.fixture
def mixture(tmp_path):
    def make(weights=None, **options):
        books = TextFiles([str(tmp_path / "books.jsonl")], val_fraction=0.1)
        sources = {"edu": FineWebEdu(), "c4": C4(), "books": books}
        return Mixture(sources, weights or WEIGHTS, **COMMON | options)

    return make


def test_shares_are_exact_at_any_number_of_samples():
    for weights in (
        [1.0],
        [0.5, 0.5],
        [0.7, 0.2, 0.1],
        [0.333, 0.001, 0.6, 0.066],
        [0.0, 1.0, 0.0],
        [5, 3, 2],
    ):
        shares = Shares({0: weights}, seed=4)
        counts = [0] * len(weights)
        for sample in range(3000):
            source, number = shares.locate(sample)
            assert number == counts[source]
            counts[source] += 1
        assert shares.counts(3000) == counts
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - 3000 * weight / sum(weights)) <= len(weights)
    far = 10**14
    counts = Shares({0: [0.7, 0.2, 0.1]}, seed=0).counts(far)
    assert sum(counts) == far
    assert np.allclose(np.array(counts) / far, [0.7, 0.2, 0.1], atol=1e-9)


def test_a_schedule_takes_over_at_its_sample():
    shares = Shares({0: [1.0, 0.0], 100: [0.5, 0.5], 250: [0.0, 1.0]}, seed=1)
    sources = [shares.locate(sample) for sample in range(400)]
    assert sources[:100] == [(0, i) for i in range(100)]
    assert [abs(sum(source for source, _ in sources[100:250]) - 75) <= 1] == [True]
    assert all(source == 1 for source, _ in sources[250:])
    for source in (0, 1):
        numbers = [number for which, number in sources if which == source]
        assert numbers == list(range(len(numbers)))  # none left out, none twice
    assert shares.counts(400) == [len([0 for which, _ in sources if which == s]) for s in (0, 1)]


@pytest.mark.prove
def test_shares_over_a_million_documents():
    n = 10**6
    shares = Shares({0: [0.61, 0.3, 0.09]}, seed=2)
    counts = np.bincount([shares.locate(sample)[0] for sample in range(n)])
    for count, weight in zip(counts, (0.61, 0.3, 0.09), strict=True):
        sigma = (n * weight * (1 - weight)) ** 0.5
        print(f"weight {weight}: {count / n:.6f}, {(count - n * weight) / sigma:+.4f} sigma")
        assert abs(count - n * weight) < 4 * sigma


def starts(data, rows):
    """How many rows of each source: by what its documents begin with."""
    text = [data.tokenizer.decode(row) for row in rows]
    return [sum(mark in each for each in text) for mark in ("edu", "c4-", "book ")]


def test_tokens_come_in_the_shares_asked_for(mixture):
    data = mixture()
    rows = [row for batch in first(data, 100) for row in batch["tokens"].tolist()]
    located = np.bincount([data.locate(sample)[0] for sample in range(400)])
    assert np.abs(located - [200, 120, 80]).max() <= 2
    named = starts(data, rows)  # windows inside a long document name nobody
    assert all(0.5 * a < b <= a for a, b in zip(located, named, strict=True))


def test_resume_is_exact_in_every_source(mixture):
    whole = first(mixture(), 40)
    running = mixture()
    for at in (1, 7, 18, 30):
        consume(running, whole[running.samples // 4 : at])
        again = mixture(num_workers=2 if at == 18 else 0)
        again.load_state_dict(json.loads(json.dumps(running.state_dict())))
        assert tokens_of(first(again, 6)) == tokens_of(whole[at : at + 6])


def test_each_source_goes_through_its_own_epochs(mixture):
    data = mixture({"edu": 0.05, "c4": 0.05, "books": 0.9})
    batches = first(data, 150)
    consume(data, batches)
    epochs = {source: {mark[2] for mark in marks} for source, marks in data.state_dict()["lanes"].items()}
    assert epochs == {"0": {0}, "1": {0}}  # the streams are in their first
    assert 540 / data.sources["books"].corpus.summary["train_tokens"] * 64 > 2  # the books further
    counted = data.samples_of_each()
    assert sum(counted) == 600
    per_epoch = next(iter(data.sources["books"].training_windows(data.validation_keys()).values())).per_epoch
    assert data.epochs() == {"edu": 0, "c4": 0, "books": counted[2] / per_epoch}
    assert data.epochs()["books"] > 2


def test_a_stream_says_in_which_epoch_its_furthest_lane_is(mixture):
    data = mixture({"edu": 0.1, "c4": 0.9, "books": 0})
    for _ in range(20):
        consume(data, first(data, 50))
        last = max(mark[2] for mark in data.state_dict()["lanes"]["1"])
        assert data.epochs()["c4"] == last
        if last == 2:
            break
    assert last == 2
    assert data.epochs()["books"] == 0


def test_validation_has_each_source_as_a_domain_and_leaves_all_training(mixture, tmp_path):
    data = mixture()
    assert data.domains == ["edu", "c4", "books"]
    batches = list(data.val_dataloader())
    domains = torch.cat([batch["domain"] for batch in batches])
    assert set(domains.tolist()) == {0, 1, 2}
    counted = sum(int(batch["n_bytes"].sum()) for batch in batches)
    assert counted == data.summary()["val_bytes"]
    # A book that is also a validation document of C4 is not trained on.
    held = data.sources["c4"].tokenizer.decode(data.sources["c4"].validation[0].tokens(0))
    write_jsonl(tmp_path / "books.jsonl", [f"book {text}" for text in many_texts(30)] + [held])
    again = mixture()
    windows = again.training_windows(again.validation_keys())["books"]
    texts = [windows.table.tokens(i).tolist() for i in windows.documents]
    assert list(held.encode()) not in texts


def test_a_tokenizer_is_trained_on_all_sources(mixture):
    data = mixture(tokenizer="bpe", vocab_size=300)
    assert data.tokenizer.vocab_size == 300
    assert next(iter(data.train_dataloader()))["tokens"].shape == (4, 64)
    assert all(source.tokenizer is data.tokenizer for source in data.sources.values())


def test_settings_of_a_source_that_do_not_hold_are_named(tmp_path, caplog):
    files = str(write_jsonl(tmp_path / "a.jsonl", many_texts(10)))
    sources = {
        "a": TextFiles(files, tokenizer="bytes", batch_size=4, seed=3),
        "b": TextFiles(files, batch_size=2, context=64),
    }
    Mixture(sources, {"a": 1, "b": 1}, tokenizer="bytes", batch_size=2)
    assert [record.getMessage() for record in caplog.records] == [
        "sources.b.context: 64 is not used: the mixture's 512 holds for all its sources.",
        "sources.a.batch_size: 4 is not used: the mixture's 2 holds for all its sources.",
        "sources.a.seed: 3 is not used: the mixture's 0 holds for all its sources.",
    ]


def test_fingerprint_knows_weights_and_sources(mixture):
    prints = {
        mixture().fingerprint,
        mixture(seed=3).fingerprint,
        mixture({"edu": 0.6, "c4": 0.2, "books": 0.2}).fingerprint,
        mixture(schedule={10_000: WEIGHTS}).fingerprint,
    }
    assert len(prints) == 3


def test_bad_settings_are_said(mixture):
    with pytest.raises(BadInput, match=r"weights: it names \['edu'\]; allowed: a weight for each of"):
        mixture({"edu": 1.0})
    with pytest.raises(BadInput, match=r"schedule.500: .* not all 0"):
        mixture(schedule={500: dict.fromkeys(WEIGHTS, 0.0)})
    with pytest.raises(BadInput, match="schedule: -1 is not allowed"):
        mixture(schedule={-1: WEIGHTS})
    for wrong in (1.5, "abc", "1.5", 0, None, float("inf")):
        with pytest.raises(BadInput, match=rf"schedule: {wrong!r} is not allowed; allowed: whole numbers of"):
            mixture(schedule={wrong: WEIGHTS})
    assert mixture(schedule={"500": WEIGHTS, "1e3": WEIGHTS, 2e3: WEIGHTS}).phases.keys() == {
        0,
        500,
        1000,
        2000,
    }
    with pytest.raises(BadInput, match="sources: the list is empty"):
        Mixture({}, {})


REFUSED = {
    "nan": ({"weights": {"a": float("nan"), "b": 1.0}}, "weights: "),
    "infinite": ({"weights": {"a": float("inf"), "b": 1.0}}, "allowed: finite weights from 0 on"),
    "overflow": ({"weights": {"a": 1e308, "b": 1e308}}, "allowed: finite weights from 0 on"),
    "negative": ({"weights": {"a": -1.0, "b": 1.0}}, "allowed: finite weights from 0 on"),
    "missing": ({"weights": {"a": 1.0}}, "weights: it names ['a']"),
    "schedule": ({"schedule": {-5: {"a": 1.0, "b": 0.0}}}, "schedule: -5 is not allowed"),
    "part": ({"schedule": {1.5: {"a": 1.0, "b": 0.0}}}, "schedule: 1.5 is not allowed; allowed: whole"),
    "word": ({"schedule": {"abc": {"a": 1.0, "b": 0.0}}}, "schedule: 'abc' is not allowed; allowed: whole"),
    "type": (
        {"batch_size": 2.5},
        {
            "fit": "data.batch_size=2.5 is not possible: it must be a whole number",
            "prepare": "\"batch_size\": Expected a <class 'int'>. Got value: 2.5",
        },
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("program", ["fit", "prepare"])
def test_what_a_data_module_refuses_is_one_sentence(case, program, tmp_path, capsys):
    wrong, says = REFUSED[case]
    says = says[program] if isinstance(says, dict) else says
    local = {"class_path": "TextFiles", "init_args": {"files": [str(tmp_path / "books.jsonl")]}}
    right = {"sources": {"a": local, "b": local}, "weights": {"a": 0.5, "b": 0.5}, "tokenizer": "bytes"}
    config = tmp_path / "mixture.yaml"
    data = {"data": {"class_path": "Mixture", "init_args": right | wrong}}
    config.write_text(yaml.safe_dump(data))
    if program == "fit":
        from t6_lightning.__main__ import main

        assert main(["fit", "--config", str(config), "--dry_run"]) == 2
    else:
        assert prepare(["prepare", "--config", str(config)]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert len(said.splitlines()) == 1
    assert "Union" not in said


def test_a_schedule_below_one_window_leaves_the_weights_before_it(mixture):
    one, other = {"edu": 1, "c4": 0, "books": 0}, {"edu": 0, "c4": 0, "books": 1}
    data = mixture(one, schedule={10: other})
    data.training_windows(data.validation_keys())
    assert [data.locate(sample)[0] for sample in range(4)] == [0, 2, 2, 2]
