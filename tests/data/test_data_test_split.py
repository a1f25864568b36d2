"""The test split: documents that neither training nor validation has seen, whatever `val_tokens` is."""

from __future__ import annotations

import gzip
import hashlib
import json

import numpy as np
import pytest
from data_helpers import many_texts, write, write_jsonl
from stream_helpers import (
    SUBSETS,
    c4,
    fineweb_edu,
    first,
    held_out_texts,
    json_lines,
    keys_of,
    lane_documents,
    parquet,
    pile,
    texts_of,
    tokens_of,
    training_texts,
)

from datamodules import C4, BadInput, FineWebEdu, Mixture, Pile, PythonDocs, TextFiles, pieces, streamed
from datamodules.__main__ import main
from datamodules.documents import HeldOut, held_out, is_test

COMMON = {"tokenizer": "bytes", "context": 64, "batch_size": 4, "val_tokens": 1500}
CLASSES = (FineWebEdu, C4, Pile)
REPOSITORIES = {FineWebEdu: fineweb_edu, C4: c4, Pile: pile}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("T6_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(pieces, "LINES_BYTES", 4000)


def digest(numbers) -> str:
    return hashlib.sha256(np.asarray(numbers, dtype="<i8").tobytes()).hexdigest()[:16]


@pytest.fixture
def files(tmp_path):
    write_jsonl(tmp_path / "data" / "a.jsonl", many_texts(300))
    write_jsonl(tmp_path / "data" / "b.jsonl", many_texts(200, "b"))
    write_jsonl(tmp_path / "v" / "v.jsonl", many_texts(20))
    return tmp_path


def text_files(files, **options):
    common = {"tokenizer": "bytes", "context": 32, "batch_size": 4, "val_fraction": 0.1}
    return TextFiles(str(files / "data"), **(common | options))


def all_texts(data, side) -> list[str]:
    return [text for part in texts_of(data, side).values() for text in part]


def mirror(folder, stored: dict[str, bytes]) -> str:
    for path, data in stored.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return str(folder)


# Corpora that are read whole.


def test_half_of_the_held_out_documents_test_by_their_lowest_bit(files):
    data = text_files(files)
    texts = many_texts(300) + many_texts(200, "b")
    held = [text for text in texts if held_out(keys_of([text]), 0.1)[0]]
    sides = [texts_of(data, side)["text"] for side in ("validation", "test")]
    for side, found in enumerate(sides):
        assert sorted(found) == sorted(text for text in held if is_test(keys_of([text]))[0] == side)
        assert keys_of(found).tolist() == sorted(keys_of(found).tolist())
    windows = data.test_windows()
    batch = windows.batch(0, len(windows))
    assert int(batch["n_bytes"].sum()) == sum(len(text.encode()) for text in sides[1])
    assert batch["domain"].tolist() == [0] * len(windows)


# Digests of the training documents, of the first 200 batches, and the fingerprint, of before there was a test split.
BEFORE = {
    "plain": ({}, "fdf1aaa4678a012a", "7ba4503bdea0df42", "da712f9fe37e82b1"),
    "capped": ({"val_tokens": 600}, "fdf1aaa4678a012a", "7ba4503bdea0df42", "da712f9fe37e82b1"),
    "val_files": ({"val_files": {"held": "v"}}, "a480c3fe606a6ef4", "420696831794a952", "c9dfe5b8b9d9a617"),
}


@pytest.mark.parametrize("case", BEFORE)
def test_the_test_split_changes_nothing_in_training(case, files, monkeypatch):
    monkeypatch.chdir(files)
    options, documents, rows, fingerprint = BEFORE[case]
    data = text_files(files, **options)
    assert digest(data.corpus.training_documents) == documents
    assert digest(tokens_of(first(data, 200))) == rows
    assert data.fingerprint[:16] == fingerprint


def test_validation_files_only_validate_and_spare_the_test_documents(files):
    held = texts_of(text_files(files), "test")["text"]
    write_jsonl(files / "v" / "v.jsonl", [*many_texts(20), held[0]])
    data = text_files(files, val_files={"held": str(files / "v")})
    assert len(texts_of(data, "validation")["held"]) == 21
    test = texts_of(data, "test")
    assert test["held"] == []
    assert held[0] not in test["text"]
    assert test["text"]
    assert data.domains == ["text", "held"]
    counts = data.summary()["domains"]
    assert counts["held"]["test_documents"] == 0
    assert counts["text"]["test_documents"] == data.summary()["test_documents"] == len(test["text"])


def test_both_sides_are_held_out_whatever_is_asked_for(files):
    few, whole = text_files(files, val_tokens=100), text_files(files)
    assert few.validation_keys().tolist() == whole.validation_keys().tolist()
    assert len(whole.validation_keys()) == 53
    summary = few.summary()
    assert summary["test_documents"] < whole.summary()["test_documents"]
    assert summary["val_tokens"] <= 100
    assert summary["test_tokens"] <= 100


def test_a_domain_with_one_held_out_document_validates_on_it(tmp_path):
    texts = [text for text in many_texts(200) if not held_out(keys_of([text]), 0.1)[0]][:20]
    for number, side in enumerate((False, True)):
        held = next(
            t for t in many_texts(999) if held_out(keys_of([t]), 0.1)[0] and is_test(keys_of([t]))[0] == side
        )
        path = write_jsonl(tmp_path / f"{number}.jsonl", [*texts, held])
        data = TextFiles(str(path), tokenizer="bytes", context=16, val_fraction=0.1)
        assert texts_of(data, "validation") == {"text": [held]}
        assert data.summary()["test_documents"] == 0
        with pytest.raises(
            BadInput, match=r"^val_fraction: 0.1 of 21 documents leaves none to test on; raise it"
        ):
            data.test_windows()


def test_a_module_of_python_docs_is_on_one_side_with_code_and_prose():
    data = PythonDocs(tokenizer="bytes")
    table, test = data.test
    keys = [
        np.concatenate([table.key[chosen] for chosen in side.values()])
        for _, side in (data.validation, data.test)
    ]
    assert not set(keys[0].tolist()) & set(keys[1].tolist())
    assert all(len(chosen) > 5 for chosen in test.values())


def test_inspect_prints_the_test_side(files, capsys):
    arguments = [
        "--files",
        str(files / "data"),
        "--tokenizer",
        "bytes",
        "--context",
        "32",
        "--val_fraction",
        "0.1",
    ]
    assert main(["inspect", *arguments, "--no_throughput", "--samples", "0"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {line[0]: line[1:] for line in lines if line}
    summary = text_files(files).summary()
    assert rows["test"] == [f"{summary[f'test_{what}']:,}" for what in ("documents", "tokens", "bytes")]


# Streams.


@pytest.fixture
def stream(tmp_path):
    def make(cls, **options):
        return cls(**COMMON | options, path=mirror(tmp_path / cls.__name__, REPOSITORIES[cls]()))

    return make


@pytest.mark.parametrize("cls", CLASSES)
def test_what_is_held_out_of_a_stream_does_not_depend_on_how_much_is_asked_for(cls, stream):
    sides, rows, trained = [], [], set()
    for val_tokens in (300, 600, None):
        data = stream(cls, val_tokens=val_tokens)
        sides.append([all_texts(data, side) for side in ("validation", "test")])
        rows.append(tokens_of(first(data, 100)))
        trained = {text for lane in lane_documents(data, 300) for text in lane}
        assert not trained & held_out_texts(data)
    assert len({len(validation) for validation, _ in sides}) == 3
    for few, more in ((sides[0], sides[1]), (sides[1], sides[2])):
        for side in (0, 1):
            assert set(few[side]) <= set(more[side])
    validation, test = sides[2]
    assert validation
    assert test
    assert not set(validation) & set(test)
    assert rows[0] == rows[1] == rows[2]
    if cls is FineWebEdu:
        keys = keys_of(training_texts(cls))
        assert len(validation) + len(test) == held_out(keys, 0.1).sum()
        assert trained == {
            text for text, held in zip(training_texts(cls), held_out(keys, 0.1), strict=True) if not held
        }
    fingerprints = {stream(cls, val_tokens=val_tokens, seed=3).fingerprint for val_tokens in (300, 1500)}
    assert len(fingerprints) == 1


@pytest.mark.parametrize(("cls", "before"), [(C4, "77618d699bbc0fdd"), (Pile, "949e06864b4addfc")])
def test_streams_with_files_that_validate_train_as_before_there_was_a_test_split(cls, before, stream):
    assert digest(tokens_of(first(stream(cls), 150))) == before


def test_the_validation_split_of_c4_is_halved_by_hash(stream):
    data = stream(C4, val_tokens=None)
    validation, test = (texts_of(data, side)["c4"] for side in ("validation", "test"))
    assert len(validation) + len(test) == 40
    assert is_test(keys_of(test)).all()
    assert not is_test(keys_of(validation)).any()


def test_the_pile_tests_on_its_own_test_split(stream, tmp_path):
    data = stream(Pile)
    assert [file.path for file in data.test_files] == ["test.jsonl.zst"]
    assert data.domains == sorted(SUBSETS)
    windows = data.test_windows()
    batch = windows.batch(0, len(windows))
    assert sorted(set(batch["domain"].tolist())) == [0, 1, 2]
    assert int(batch["n_bytes"].sum()) == data.summary()["test_bytes"]
    for name in SUBSETS:
        assert all(text.startswith("piletest") for text in texts_of(data, "test")[name])
        assert all(text.startswith("pileval") for text in texts_of(data, "validation")[name])
    stored = {path: content for path, content in pile().items() if "test" not in path}
    halved = Pile(**COMMON | {"val_tokens": None}, path=mirror(tmp_path / "without", stored))
    held = [all_texts(halved, side) for side in ("validation", "test")]
    assert is_test(keys_of(held[1])).all()
    assert len(held[0]) + len(held[1]) == 60


def test_test_documents_that_validate_or_have_no_domain_there_are_left_out(tmp_path, monkeypatch):
    def lines(rows):
        return "".join(
            json.dumps({"text": text, "meta": {"pile_set_name": name}}) + "\n" for text, name in rows
        ).encode()

    stored = {
        "train/0.jsonl": lines((text, "a") for text in many_texts(50)),
        "val.jsonl": lines([("both", "a"), ("val", "a"), ("val b", "b")]),
        "test.jsonl": lines([("both", "a"), ("test", "a"), ("elsewhere", "c"), (many_texts(50)[7], "a")]),
    }
    data = Pile(**COMMON, path=mirror(tmp_path / "pile", stored))
    assert data.domains == ["a", "b"]
    assert texts_of(data, "test") == {"a": ["test", many_texts(50)[7]], "b": []}
    (documents,) = lane_documents(data, 200)
    assert set(documents) == set(many_texts(50)) - {many_texts(50)[7]}  # a training document that tests


def test_in_a_plain_folder_test_files_go_by_their_name(tmp_path):
    content = json_lines(many_texts(60))
    names = ["latest.jsonl", "contest-1.jsonl", "books.jsonl", "val.jsonl"]
    tests = [
        "test.jsonl",
        "books-test.jsonl",
        "test_a.jsonl",
        "more/test-0.jsonl",
        "x.test.jsonl",
        "y/test/0.jsonl",
    ]
    folder = mirror(tmp_path / "folder", dict.fromkeys([*names, *tests], content))
    data = Pile(**COMMON | {"domain_field": None}, path=folder)
    assert [file.path for file in data.test_files] == ["test.jsonl"]  # the published name wins
    (tmp_path / "folder" / "test.jsonl").unlink()
    data = Pile(**COMMON | {"domain_field": None}, path=folder)
    assert sorted(file.path for file in data.test_files) == sorted(tests[1:])
    assert [file.path for file in data.val_files] == ["val.jsonl"]
    assert sorted(file.path for file in data.train_files) == sorted(names[:3])


def test_documents_behind_the_pieces_read_for_validation_train(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "ROWS_PER_PIECE", 10)
    monkeypatch.setattr(streamed, "VALIDATION_PIECES", 6)
    parts = [many_texts(200, f"{i}-") for i in range(2)]
    again = next(text for text in parts[0][:30] if held_out(keys_of([text]), 0.3)[0])
    spared = next(text for text in reversed(parts[0][:30]) if held_out(keys_of([text]), 0.3)[0])
    parts[1] += [again, spared]
    folder = mirror(tmp_path / "edu", {f"sample/10BT/{i}.parquet": parquet(parts[i], 50) for i in range(2)})
    data = FineWebEdu(**COMMON | {"val_tokens": None, "val_fraction": 0.3, "lanes": 1}, path=folder)
    (documents,) = lane_documents(data, 900)
    expected = set(parts[0]) | set(parts[1])
    for part in parts:
        expected -= {text for text in part[:30] if held_out(keys_of([text]), 0.3)[0]}
    assert set(documents) == expected  # neither `again` nor `spared`, which are stored twice


def test_held_out_goes_by_file_and_piece():
    keys = np.array([0, 1 << 62, 1 << 63], dtype=np.uint64)
    rule = HeldOut(frozenset({2}), 3, 0.3)
    assert rule.of(2, 2, keys).tolist() == [True, True, False]
    assert rule.of(2, 3, keys).tolist() == rule.of(1, 0, keys).tolist() == [False] * 3


def test_no_more_is_read_than_both_sides_need(stream, tmp_path):
    data = stream(FineWebEdu, val_tokens=50)
    assert 2 <= len(data.validation[0].shards) < 25
    assert data.validation[0] is data.test[0]
    everything = stream(FineWebEdu, val_tokens=None)
    assert len(everything.validation[0].shards) == 25


def test_a_stream_with_too_few_documents_validates_and_says_that_it_cannot_test(tmp_path):
    stored = {
        "en/c4-train.00000-of-00001.json.gz": gzip.compress(json_lines(many_texts(30))),
        "en/c4-validation.00000-of-00001.json.gz": gzip.compress(json_lines(["one held out"])),
    }
    data = C4(**COMMON, path=mirror(tmp_path / "c4", stored))
    assert texts_of(data, "validation") == {"c4": ["one held out"]}
    assert data.summary()["test_documents"] == 0
    assert len(data.validation_keys()) == 1
    with pytest.raises(
        BadInput, match=r"^path: the held-out documents of .* are too few to validate and to test on"
    ):
        data.test_windows()


# Mixtures.


def test_a_mixture_tests_on_all_its_sources(files, stream):
    alone = write(files / "alone.jsonl", json_lines(many_texts(30, "alone")))
    c4_data = stream(C4)
    taken = texts_of(c4_data, "test")["c4"][0]
    validates = write(files / "taken.jsonl", json_lines([taken]))
    sources = {
        "books": text_files(files),
        "c4": c4_data,
        "alone": TextFiles(str(alone), val_fraction=0.0, val_files={"taken": str(validates)}),
    }
    data = Mixture(sources, {"books": 1, "c4": 1, "alone": 1}, **COMMON)
    assert data.domains == ["books", "c4", "alone"]
    windows = data.test_windows()
    batch = windows.batch(0, len(windows))
    assert sorted(set(batch["domain"].tolist())) == [0, 1]
    summary = data.summary()
    assert int(batch["n_bytes"].sum()) == summary["test_bytes"]
    assert (
        summary["domains"]["c4"]["test_documents"] == c4_data.summary()["test_documents"] - 1
    )  # `taken` validates
    assert summary["domains"]["alone"]["test_documents"] == 0
    validation, test = (
        {text for source in sources.values() for text in all_texts(source, side)}
        for side in ("validation", "test")
    )
    assert validation & test == {taken}
    trained = data.training_windows(data.validation_keys())["books"]
    assert not set(trained.table.key[trained.documents].tolist()) & set(data.validation_keys().tolist())
    only = Mixture({"alone": sources["alone"]}, {"alone": 1}, **COMMON)
    with pytest.raises(BadInput, match="sources: their held-out documents are too few"):
        only.test_windows()
