"""FineWeb-Edu, C4 and the Pile from a loopback hub: order, validation, resume, ranks and workers."""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import multiprocessing
import os
import random
import re
import shutil
import time
from functools import partial

import pytest
import torch
from data_helpers import many_texts, real_data
from loopback_hub import LoopbackHub
from stream_helpers import (
    SUBSETS,
    as_rank,
    c4,
    consume,
    fineweb_edu,
    first,
    held_out_texts,
    json_lines,
    keys_of,
    lane_documents,
    parquet,
    pile,
    tokens_of,
    training_texts,
)

from datamodules import C4, BadInput, FineWebEdu, Pile, pieces
from datamodules.__main__ import main
from datamodules.base import TokenData
from datamodules.documents import held_out

COMMON = {"tokenizer": "bytes", "context": 64, "batch_size": 4, "val_tokens": 1500}
CLASSES = (FineWebEdu, C4, Pile)


@pytest.fixture(scope="module")
def served():
    with LoopbackHub() as hub:
        hub.add("HuggingFaceFW/fineweb-edu", fineweb_edu())
        hub.add("allenai/c4", c4())
        hub.add("monology/pile-uncopyrighted", pile())
        yield hub


@pytest.fixture(autouse=True)
def hub(served, tmp_path, monkeypatch):
    monkeypatch.setenv("T6_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(pieces, "LINES_BYTES", 4000)
    served.forget()
    return served


def resumed(make, state) -> TokenData:
    data = make()
    data.load_state_dict(json.loads(json.dumps(state)))
    return data


@pytest.mark.parametrize("cls", CLASSES)
def test_an_epoch_holds_every_training_document_once_and_no_other(cls, hub):
    data = cls(**COMMON)
    everything = {"FineWebEdu": "edu", "C4": "c4-", "Pile": "pile"}[cls.__name__]
    held = held_out_texts(data)
    seen: list[str] = []
    for lane in lane_documents(data, 600):
        epoch = list(dict.fromkeys(lane))
        assert epoch == lane[: len(epoch)], "a document came twice before the lane's epoch was over"
        assert set(lane[len(epoch) : 2 * len(epoch)]) <= set(epoch)
        assert lane[len(epoch) : 2 * len(epoch)] != epoch[: len(lane) - len(epoch)]  # shuffled anew
        seen += epoch
    assert len(seen) == len(set(seen)), "two lanes hold the same document"
    n_files = {"FineWebEdu": 5, "C4": 6, "Pile": 4}[cls.__name__]
    per_file = {"FineWebEdu": 60, "C4": 80, "Pile": 90}[cls.__name__]
    # FineWeb-Edu has no files that validate: all pieces of these small ones are read for it.
    spared = sum(held_out(keys_of(training_texts(cls)), 0.1)) if cls is FineWebEdu else 0
    assert len(seen) == n_files * per_file - spared
    assert all(text.startswith(everything) for text in seen)
    assert not held & set(seen)


@pytest.mark.parametrize("cls", CLASSES)
def test_exact_resume_at_many_points(cls):
    whole = first(cls(**COMMON), 66)
    rows = tokens_of(whole)
    running = cls(**COMMON)
    for at in range(60):
        if at % 5 == 0 or at in (1, 2, 3):
            data = resumed(lambda: cls(**COMMON), running.state_dict())
            assert tokens_of(first(data, 6)) == rows[at * 4 : at * 4 + 24], at
        consume(running, whole[at : at + 1])


def test_order_is_a_function_of_seed_and_files_alone():
    rows = tokens_of(first(FineWebEdu(**COMMON), 24))
    assert tokens_of(first(FineWebEdu(**COMMON, num_workers=2), 24)) == rows
    assert tokens_of(first(FineWebEdu(**COMMON | {"batch_size": 12}), 8)) == rows
    assert tokens_of(first(FineWebEdu(**COMMON, seed=1), 24)) != rows
    skipped = FineWebEdu(**COMMON)
    skipped.load_state_dict(skipped.state_dict() | {"samples": 40})  # without marks: found by counting
    assert tokens_of(first(skipped, 4)) == rows[40:56]


def _rank(make, rank, world, store, state, start, steps, answers):
    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(store, world), rank=rank,
                                         world_size=world)  # fmt: skip
    data = as_rank(make(world), rank, world)
    if state is not None:
        data.load_state_dict(state)
    assert data.samples == start
    batches = first(data, steps)
    consume(data, batches)
    answers.put((rank, [(b["sample"].tolist(), b["tokens"].tolist()) for b in batches], data.state_dict()))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("rows", [1, 5, 7, 12])
def test_pieces_of_row_groups_lose_no_document(rows, monkeypatch):
    monkeypatch.setattr(pieces, "ROWS_PER_PIECE", rows)
    data = FineWebEdu(**COMMON | {"lanes": 3})
    # Of the first 128 // 5 pieces of each file a part is held out: of all of them, unless each has one row.
    read = 25 if rows == 1 else 60
    texts = training_texts(FineWebEdu)
    spared = [held_out(keys_of(texts[file : file + read]), 0.1).sum() for file in range(0, 300, 60)]
    lanes = [list(dict.fromkeys(lane)) for lane in lane_documents(data, 700)]
    assert sum(map(len, lanes)) == len(set().union(*lanes)) == 300 - sum(spared)


def run_ranks(make, world, state, start, steps, store):
    """`steps` micro-batches on each of `world` processes: rows in the global order, and rank 0's state."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [
        context.Process(target=_rank, args=(make, rank, world, str(store), state, start, steps, answers))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    by_rank = {}
    for _ in processes:
        rank, *answer = answers.get(timeout=60)
        by_rank[rank] = answer
    for process in processes:
        process.join()
    samples, rows = [], []
    for step in range(steps):
        for rank in range(world):
            samples += by_rank[rank][0][step][0]
            rows += by_rank[rank][0][step][1]
    return samples, rows, by_rank[0][1]


@pytest.mark.parametrize("cls", [FineWebEdu, Pile])
def test_one_two_four_two_ranks_see_the_same_global_batches(cls, tmp_path):
    def make(world):  # the global batch of 16 stays
        return cls(**COMMON | {"batch_size": 16 // world, "num_workers": 2 if world == 2 else 0})

    whole = first(make(1), 20)
    rows, state, at = tokens_of(whole), None, 0
    for i, world in enumerate((1, 2, 4, 2)):
        samples, got, state = run_ranks(make, world, state, at, 5, tmp_path / f"store{i}")
        assert samples == list(range(at, at + 80))
        assert got == rows[at : at + 80]
        at += 80
    lanes = state["lanes"]["0"]
    assert [lane for lane, *_ in lanes] == list(range(len(lanes)))  # each rank told of its own
    (windows,) = make(1).training_windows(make(1).validation_keys()).values()
    assert len(lanes) == len(windows)
    assert all(mark[1] == (at - mark[0] + len(lanes) - 1) // len(lanes) for mark in lanes)


def test_validation_is_fixed_and_each_class_has_its_domains():
    for cls, domains in ((FineWebEdu, ["fineweb-edu"]), (C4, ["c4"]), (Pile, sorted(SUBSETS))):
        one, other = cls(**COMMON), cls(**COMMON | {"seed": 7, "context": 32, "batch_size": 3, "lanes": 2})
        assert one.domains == other.domains == domains
        assert one.fingerprint == other.fingerprint
        table, chosen = one.validation
        for name, documents in chosen.items():
            assert (table.length[documents] + 1).sum() <= 1500
            text = one.tokenizer.decode(table.tokens(documents[0]))
            assert text.startswith({"c4": "c4val", "fineweb-edu": "edu"}.get(name, "pileval"))
        counted = sum(int(batch["n_bytes"].sum()) for batch in one.val_dataloader())
        assert counted == one.summary()["val_bytes"]


def test_a_config_that_no_file_is_of_is_refused(hub, tmp_path):
    (folder := tmp_path / "texts").mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in many_texts(50)))
    for cls, looked_for in ((FineWebEdu, r"data/nope/\*"), (C4, r"multilingual/c4-nope.*")):
        with pytest.raises(BadInput, match=rf"^config: for 'nope' .* has no .* file {looked_for}\."):
            cls("nope", **COMMON).prepare_data()
        with pytest.raises(BadInput, match=rf"^config: for 'nope' {folder} .* has no .* file {looked_for}\."):
            cls("nope", **COMMON, path=str(folder)).prepare_data()
        assert len(cls(**COMMON, path=str(folder)).train_files) == 1


def test_another_config_reads_other_files():
    (documents,) = lane_documents(FineWebEdu("CC-MAIN-2024-10", **COMMON | {"lanes": 1}), 40)
    assert all(text.startswith("crawl-") for text in documents)
    with pytest.raises(BadInput, match=r"fr/c4|multilingual"):
        C4("fr", **COMMON).prepare_data()


def test_a_local_mirror_gives_the_hubs_text_without_the_hub(hub, tmp_path, monkeypatch):
    rows = tokens_of(first(FineWebEdu(**COMMON), 10))
    for path, data in fineweb_edu().items():
        (tmp_path / "mirror" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mirror" / path).write_bytes(data)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert tokens_of(first(FineWebEdu(path=str(tmp_path / "mirror"), **COMMON), 10)) == rows
    with pytest.raises(BadInput, match="path: there is no folder 'nowhere'"):
        FineWebEdu(path="nowhere", **COMMON).prepare_data()


def test_nothing_is_fetched_twice_or_whole(hub):
    texts = [random.Random(i).randbytes(200).hex() for i in range(8000)]  # does not compress well
    big = {f"sample/10BT/{i}.parquet": parquet(texts[i::2], 100) for i in range(2)}
    hub.add("some/big", big)
    options = COMMON | {"val_tokens": 900, "val_fraction": 0.5, "repository": "some/big"}
    data = FineWebEdu(**options)
    whole = first(data, 40)
    assert hub.bytes_sent < sum(map(len, big.values())) / 2
    consume(data, whole[:30])
    hub.forget()
    again = resumed(lambda: FineWebEdu(**options), data.state_dict())
    assert tokens_of(first(again, 10)) == tokens_of(whole[30:])
    assert hub.requests == {}, "with the token cache at hand a restore fetches nothing"


def test_restore_without_the_cache_fetches_footers_and_row_groups_only(hub, tmp_path, monkeypatch):
    hub.add("some/deep", {"sample/10BT/0.parquet": parquet(many_texts(30000, "deep-"), 100)})
    options = COMMON | {"val_tokens": 300, "val_fraction": 0.5, "repository": "some/deep", "lanes": 8}
    data = FineWebEdu(**options)
    whole = first(data, 500)
    consume(data, whole[:480])
    state = data.state_dict()
    assert sum(unit for _, _, _, unit, _, _ in state["lanes"]["0"]) > 10  # many row groups deep
    monkeypatch.setenv("T6_HOME", str(tmp_path / "other machine"))
    again = resumed(lambda: FineWebEdu(**options), state)
    hub.forget()
    began = time.monotonic()
    (batch,) = first(again, 1)
    assert time.monotonic() - began < 2
    assert tokens_of([batch]) == tokens_of(whole[480:481])
    stored = len(hub.repositories["some/deep"].files["sample/10BT/0.parquet"])
    print(f"restore fetched {hub.bytes_sent:,} of {stored:,} bytes in {hub.requests['file']} requests")
    assert hub.bytes_sent < 0.05 * stored


REAL = {
    FineWebEdu: ("HuggingFaceFW/fineweb-edu", "fineweb/train-00000-of-00001.jsonl.zst", "sample/10BT/000.jsonl.zst"),
    C4: ("allenai/c4", "c4/c4-train.00000-of-00001.json.gz", "en/c4-train.00000-of-00001.json.gz"),
    Pile: ("monology/pile-uncopyrighted", "pile/train-00.jsonl.zst", "train/00.jsonl.zst"),
}  # fmt: skip
"""Class -> its repository, a file of the test data, its place in the repository."""


@pytest.mark.parametrize("cls", CLASSES)
def test_real_text_through_the_hub(cls, tmp_path, monkeypatch):
    repository, source, place = REAL[cls]
    stored = real_data(f"text/{source}").read_bytes()
    monkeypatch.setattr(pieces, "LINES_BYTES", 1 << 20)
    with LoopbackHub() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        served.add(repository, {place: stored})
        make = partial(cls, tokenizer="bytes", context=512, batch_size=8, val_tokens=20_000)
        data = make()
        whole = first(data, 60)
        assert data.faults == {}
        assert (len(data.domains) > 5) == (cls is Pile)
        consume(data, whole[:50])
        assert tokens_of(first(resumed(make, data.state_dict()), 10)) == tokens_of(whole[50:])
    (mirror := tmp_path / "mirror" / place).parent.mkdir(parents=True)
    mirror.write_bytes(stored)
    assert tokens_of(first(make(path=str(tmp_path / "mirror")), 60)) == tokens_of(whole)


def test_a_large_row_group_is_read_in_parts(hub, monkeypatch):
    rows = tokens_of(first(FineWebEdu(**COMMON), 10))
    monkeypatch.setenv("T6_HOME", f"{os.environ['T6_HOME']}2")
    monkeypatch.setattr(pieces, "ROW_GROUP_BYTES", 100)
    assert tokens_of(first(FineWebEdu(**COMMON), 10)) == rows
    monkeypatch.setattr(pieces, "HELD_BYTES", 100)
    assert tokens_of(first(FineWebEdu(**COMMON), 10)) == rows


def test_lanes_and_seed_of_the_checkpoint_are_kept(caplog):
    data = FineWebEdu(**COMMON)
    whole = first(data, 20)
    consume(data, whole[:8])
    state = data.state_dict()
    again = resumed(lambda: FineWebEdu(**COMMON | {"lanes": 2, "seed": 3}), state)
    assert tokens_of(first(again, 4)) == tokens_of(whole[8:12])
    assert "keeps the checkpoint's 64 lanes, not 2" in caplog.text
    assert "keeps the checkpoint's seed 0, not 3" in caplog.text
    assert "DATA HAS CHANGED" not in caplog.text


def test_revision_is_pinned_and_a_checkpoints_revision_wins(hub, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    hub.add("some/moving", fineweb_edu(2))
    options = COMMON | {"repository": "some/moving"}
    data = FineWebEdu(**options)
    whole = first(data, 10)
    consume(data, whole[:5])
    state = data.state_dict()
    old = data.store.revision
    assert state["order"]["revision"] == old == hub.repositories["some/moving"].commit()
    assert f"revision main is {old}" in caplog.text
    hub.repositories["some/moving"].files["sample/10BT/999_new.parquet"] = b"not yet"
    assert FineWebEdu(**options).store.revision == old, "pinned on this machine"
    monkeypatch.setenv("T6_HOME", str(tmp_path / "other machine"))
    other = FineWebEdu(**options)
    assert other.store.revision != old
    del hub.repositories["some/moving"].files["sample/10BT/999_new.parquet"]  # as the old commit has it
    other.load_state_dict(state)
    assert other.store.revision == old
    assert tokens_of(first(other, 5)) == tokens_of(whole[5:])
    assert "goes on at the checkpoint's revision" in caplog.text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lanes": 0}, "lanes: 0 is not allowed"),
        ({"val_fraction": 0.0}, "val_fraction: 0.0 is not allowed"),
        ({"cache_gb": 0}, "cache_gb: 0 is not allowed"),
        ({"repository": "nobody"}, "repository: 'nobody' is not allowed; allowed: owner/name"),
    ],
)
def test_bad_settings_are_said(options, says):
    with pytest.raises(BadInput, match=says):
        FineWebEdu(**COMMON | options)


def test_missing_columns_are_said():
    with pytest.raises(
        BadInput, match=r"text_field: .*000_00000.parquet has no column 'body'; present: text"
    ):
        FineWebEdu(**COMMON, text_field="body").prepare_data()
    with pytest.raises(
        BadInput, match=r"domain_field: .*c4-validation.* has no column 'set'; present: text, url"
    ):
        C4(**COMMON, domain_field="set").prepare_data()


def test_command_line(hub, tmp_path, capsys):
    settings = ["--data.tokenizer", "bytes", "--data.context", "64", "--data.val_tokens", "900"]
    assert main(["prepare", "--data", "C4", *settings, "--tokens", "5000"]) == 0
    printed = capsys.readouterr().out
    assert "prepared       the first 5,000 training tokens" in printed
    assert "6 files" in printed
    hub.forget()
    rows = tokens_of(first(C4(tokenizer="bytes", context=64, val_tokens=900), 9))
    assert len(rows) == 72
    assert hub.requests == {}, "what was prepared is at hand"
    config = {"data": {"class_path": "Mixture", "init_args": {
        "sources": {"edu": {"class_path": "FineWebEdu"}, "c4": {"class_path": "C4"}},
        "weights": {"edu": 0.9, "c4": 0.1}, "tokenizer": "bytes", "val_tokens": 500}}}  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(config | {"model": "ignored"}))
    assert main(["inspect", "--config", str(tmp_path / "run.yaml"), "--tokens", "9000"]) == 0
    printed = capsys.readouterr().out
    assert "train edu" in printed
    assert re.search(r"^train c4 .* 10\.0%$", printed, re.MULTILINE)
    assert "pack from the cache" in printed
    for arguments, says in (
        (["--data", "C4", "--data.lans", "3"], "there is no setting 'lans'"),
        (["--data", "Nothing"], "error: --data: "),
        (["--config", str(tmp_path / "none.yaml")], "No such file"),
    ):
        assert main(["prepare", *arguments]) == 2
        assert says in capsys.readouterr().err


def _read_all(make, steps, answers):
    memory = []
    data = make()
    began = time.monotonic()
    for i, _ in enumerate(itertools.islice(data.train_dataloader(), steps)):
        if i % 200 == 0:
            with open("/proc/self/status") as status:
                memory.append(
                    next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024
                )
    answers.put((max(memory) - memory[0], time.monotonic() - began, data.state_dict()))


@pytest.mark.prove
@pytest.mark.timeout(7200)
def test_more_text_than_memory_through_the_hub(hub, tmp_path, monkeypatch):
    """T6_PROVE_BYTES of text (more than a GiB unless said) in 96 files: memory stays, a restore fetches little."""
    n_bytes = int(os.environ.get("T6_PROVE_BYTES", 1_200_000_000))
    monkeypatch.setattr(pieces, "LINES_BYTES", 2 << 20)
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(20_000)]
    texts = [" ".join(rng.choices(words, k=500)) for _ in range(n_bytes // 96 // 3200)]
    files = [parquet([f"{i} {text}" for text in texts], 1000) for i in range(8)]
    hub.add("some/large", {f"sample/10BT/{i:03}.parquet": files[i % 8] for i in range(96)})
    total = sum(len(text) for text in texts) * 96

    def make():
        return FineWebEdu(repository="some/large", tokenizer="bytes", context=1024, batch_size=16)

    make().prepare_data()
    hub.forget()
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    steps = int(total * 0.9) // (16 * 1024)
    process = context.Process(target=_read_all, args=(make, steps, answers))
    process.start()
    grown, seconds, state = answers.get()
    process.join()
    print(
        f"{total:,} bytes of text: {steps * 16384 / seconds / 1e6:.1f} M tokens/s, memory grew by {grown:,} bytes"
    )
    assert grown < 2**30
    whole = tokens_of(first(resumed(make, state), 2))
    shutil.rmtree(tmp_path / "home" / "tokens")
    again = resumed(make, state)
    hub.forget()
    began = time.monotonic()
    assert tokens_of(first(again, 2)) == whole
    seconds = time.monotonic() - began
    print(f"restore without a cache: {hub.bytes_sent:,} bytes in {seconds:.2f} s")


@pytest.mark.parametrize(
    ("config", "train", "validation"),
    [
        ("en", "en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz"),
        ("en-multi", "multilingual/c4-en.tfrecord-00000-of-11264.json.gz",
         "multilingual/c4-en-validation.tfrecord-00000-of-00010.json.gz"),
        ("el-Latn", "multilingual/c4-el-Latn.tfrecord-00000-of-00001.json.gz",
         "multilingual/c4-el-Latn-validation.tfrecord-00000-of-00001.json.gz"),
    ],
)  # fmt: skip
def test_each_configuration_of_c4_finds_its_files(config, train, validation, tmp_path):
    other = [
        "multilingual/c4-el.tfrecord-00000-of-00004.json.gz",
        "realnewslike/c4-train.00000-of-00512.json.gz",
    ]
    for name in (train, validation, *other):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(gzip.compress(json_lines(["text"])))
    data = C4(config, path=str(tmp_path), tokenizer="bytes")
    assert [file.path for file in data.train_files] == [train]
    assert [file.path for file in data.val_files] == [validation]


@pytest.mark.parametrize(
    ("config", "file"),
    [("sample-10BT", "sample/10BT/000.parquet"), ("sample-100BT", "sample/100BT/000.parquet"),
     ("default", "data/CC-MAIN-2024-10/train-0.parquet")],
)  # fmt: skip
def test_each_sample_of_fineweb_edu_finds_its_files(config, file, tmp_path):
    for name in (file, "sample/350BT/000.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(parquet(["text"]))
    data = FineWebEdu(config, path=str(tmp_path), tokenizer="bytes")
    assert [found.path for found in data.train_files] == [file]
