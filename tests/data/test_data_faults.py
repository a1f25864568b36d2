"""What a hub can do wrong: every batch stays the same, each fault is counted, and an end is said plainly."""

from __future__ import annotations

import gzip
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import zstandard
from data_helpers import many_texts
from huggingface_hub import constants
from loopback_hub import FAULTS, LoopbackHub
from stream_helpers import c4, consume, fineweb_edu, first, json_lines, pile, tokens_of

from datamodules import C4, BadInput, FineWebEdu, Pile, base, pieces, stores
from datamodules.__main__ import main
from datamodules.met import Met
from datamodules.pieces import Pieces
from datamodules.stores import Folder
from t6_lightning.common.errors import SourceUnavailable

COMMON = {"tokenizer": "bytes", "context": 64, "batch_size": 4, "val_tokens": 1500}


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("T6_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(pieces, "LINES_BYTES", 4000)
    monkeypatch.setattr(pieces, "FETCHED_AT_ONCE", (1000, 4000))
    monkeypatch.setattr(stores, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(stores, "LONGEST_PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    stores.faults.clear()
    stores.damage.clear()
    with LoopbackHub() as served:
        served.stall_seconds = 0.6
        served.add("HuggingFaceFW/fineweb-edu", fineweb_edu())
        served.add("allenai/c4", c4())
        served.add("monology/pile-uncopyrighted", pile())
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        yield served
    stores.faults.clear()
    stores.damage.clear()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cls", [FineWebEdu, C4, Pile])
def test_faults_change_no_batch(cls, workers, hub, tmp_path, monkeypatch, caplog):
    whole = tokens_of(first(cls(**COMMON), 25))
    monkeypatch.setenv("T6_HOME", str(tmp_path / "another home"))
    hub.fault_rate = 0.4
    data = cls(**COMMON, num_workers=workers)
    batches = first(data, 25)
    assert tokens_of(batches) == whole
    consume(data, batches)
    met = sum(hub.requests[fault] for fault in FAULTS)
    assert met > 5
    assert 0 < sum(data.faults.values()) <= met
    if not workers:
        assert all(caplog.text.count(f": {kind} (") == 1 for kind in stores.faults)


@pytest.mark.parametrize("kind", FAULTS)
def test_each_kind_of_fault_is_told_apart(kind, hub):
    names = {"drop": "dropped", "short": "cut short", "stall": "stalls"}
    data = FineWebEdu(**COMMON)
    data.prepare_data()
    hub.fault_rate, hub.fault_kinds = 0.5, (kind,)
    first(data, 10)
    (counted,) = stores.faults
    assert names.get(kind, f"HTTP {kind}") in counted
    # What the hub began is done again; a request in the background may still be under way.
    assert 0 <= hub.requests[kind] - stores.faults[counted] <= 4


def test_what_came_before_a_drop_is_not_fetched_again(hub):
    hub.fault_rate, hub.fault_kinds = 0.5, ("drop", "short")
    store = FineWebEdu(**COMMON).store
    (file, *_) = store.files(["sample/10BT/*"])
    data = store.read(file, 0, file.size)
    assert data == hub.repositories["HuggingFaceFW/fineweb-edu"].files[file.path]
    assert hub.sent[file.path] == file.size


def test_a_hub_that_stays_away_ends_with_a_sentence_and_nothing_is_lost(hub):
    whole = tokens_of(first(FineWebEdu(**COMMON), 80))
    for workers in (0, 2):
        data = FineWebEdu(**COMMON, num_workers=workers, patience=1)
        data.prepare_data()
        loader = iter(data.train_dataloader())
        for _ in range(4):
            next(loader)
        shutil.rmtree(f"{os.environ['T6_HOME']}/tokens/pieces")
        hub.down = True
        began = time.monotonic()
        with pytest.raises(SourceUnavailable) as raised:
            list(loader)
        assert time.monotonic() - began < 10
        said = str(raised.value)
        assert said.startswith(f"{hub.endpoint} has not given HuggingFaceFW/fineweb-edu/sample/10BT/")
        assert (
            "for 1 s (last: the hub answers HTTP 503); nothing is lost: the same command goes on where it stopped"
            in said
        )
        assert "\n" not in said
        hub.down = False
        again = FineWebEdu(**COMMON)
        again.load_state_dict(json.loads(json.dumps(data.state_dict())))
        assert 16 < again.samples < 300
        assert tokens_of(first(again, 5)) == whole[again.samples : again.samples + 20]


REFUSALS = {
    "gated": ({"gated": True}, None, r"repository: 'some/set' is gated: its terms must be .* HF_TOKEN is not set"),
    "private": ({"token": "secret"}, None, r"has no data set 'some/set', or it is private and HF_TOKEN holds no token"),
    "bad token": ({}, "hf_bad", r"HF_TOKEN: http://.* refuses the token"),
    "other token": ({"token": "secret"}, "hf_other", "has no data set 'some/set', or it is private"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_said_plainly_at_once(case, hub, monkeypatch):
    options, token, says = REFUSALS[case]
    hub.add("some/set", fineweb_edu(), **options)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(BadInput, match=says) as raised:
        FineWebEdu(**COMMON, repository="some/set").prepare_data()
    assert not isinstance(raised.value, SourceUnavailable)
    assert token is None or token not in str(raised.value)


def test_missing_things_are_said(hub, monkeypatch):
    with pytest.raises(BadInput, match="has no data set 'no/where'"):
        FineWebEdu(**COMMON, repository="no/where").prepare_data()
    with pytest.raises(BadInput, match="revision: 'allenai/c4' has none of that name"):
        C4(**COMMON, revision="v9").prepare_data()
    with pytest.raises(BadInput, match=r"has no parquet or JSON-lines file sample/1BT/\*"):
        FineWebEdu("sample-1BT", **COMMON).prepare_data()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match="HF_HUB_OFFLINE forbids to ask the hub"):
        C4(**COMMON).prepare_data()


def test_a_folder_without_text_is_refused_for_what_it_holds(tmp_path):
    for name in ("00.jsonl", "01.parquet", "notes.md"):
        (tmp_path / name).touch()
    said = f"path: {tmp_path} holds no text to train on: 2 parquet or JSON-lines files, of which 2 are empty"
    with pytest.raises(BadInput, match=said):
        FineWebEdu(**COMMON, path=str(tmp_path)).prepare_data()


def test_the_token_is_sent_and_never_written(hub, tmp_path, monkeypatch, caplog):
    hub.add("some/private", fineweb_edu(), token="sesame42")
    monkeypatch.setenv("HF_TOKEN", "hf_sesame42")
    caplog.set_level(logging.DEBUG)
    hub.fault_rate, hub.fault_kinds = 0.2, ("503", "drop")
    data = FineWebEdu(**COMMON, repository="some/private")
    first(data, 5)
    assert "hf_sesame42" in hub.tokens
    assert "sesame42" not in caplog.text + str(data.state_dict()) + str(data.summary())
    for path in (tmp_path / "home").rglob("*"):
        assert not path.is_file() or b"sesame42" not in path.read_bytes()


def test_a_password_in_the_hubs_address_is_never_said(hub, monkeypatch, caplog):
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint.replace("//", "//me:sesame42@"))
    hub.add("some/gated", fineweb_edu(), gated=True)
    hub.down = True
    with pytest.raises(SourceUnavailable, match="has not given") as away:
        FineWebEdu(**COMMON, patience=0.1).prepare_data()
    hub.down = False
    with pytest.raises(BadInput, match="is gated") as gated:
        FineWebEdu(**COMMON, repository="some/gated").prepare_data()
    assert "sesame42" not in f"{away.value} {gated.value} {caplog.text}"


def test_preparation_that_the_hub_cuts_off_can_be_run_again(hub, capsys):
    hub.down = True
    command = ["prepare", "--data", "C4", "--data.tokenizer", "bytes", "--data.patience", "0.1"]
    assert main(command) == 75
    assert "the same command goes on where it stopped" in capsys.readouterr().err
    hub.down = False
    assert main([*command, "--data.val_tokens", "900"]) == 0


def test_offline_with_everything_at_hand(hub, monkeypatch):
    rows = tokens_of(first(Pile(**COMMON), 10))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.forget()
    assert tokens_of(first(Pile(**COMMON), 10)) == rows
    assert hub.requests == {}


# Damage that trying again does not cure.


def texts_of(folder, **options):
    store = Folder(str(folder))
    found = Pieces(store, store.files(["*.jsonl*", "*.parquet"]), None, "text", None, "text", **options)
    texts = []
    for file in range(len(found.files)):
        piece = 0
        while (documents := found.documents(file, piece)) is not None:
            texts += [document.text for document in documents]
            piece += 1
    return texts


def test_malformed_rows_are_left_out_counted_and_logged_once(tmp_path, caplog):
    lines = json_lines(many_texts(300)).splitlines()
    lines[7], lines[11], lines[200] = b'{"text": "cut of', b"[1, 2]", b'{"text": 5}'
    lines[20], lines[30] = b'{"text": "caf\xe9"}', b'{"text": "\\ud83d"}'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines)))
    expected = [text for i, text in enumerate(many_texts(300)) if i not in (7, 11, 20, 30, 200)]
    assert texts_of(tmp_path) == expected
    counted = Counter(kind for (kind, _), times in stores.damage.items() for _ in range(times))
    assert counted["a malformed row is left out"] == 3
    assert counted["a row with half of a surrogate pair is left out"] == 1
    assert caplog.text.count("a malformed row is left out") == 1
    assert "a.jsonl.gz, piece 0: a malformed row" in caplog.text


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_file_that_is_cut_for_good_gives_what_is_whole(suffix, tmp_path, caplog):
    texts = [f"{i} {hash(str(i))}" for i in range(5000)]
    compress = gzip.compress if suffix == "gz" else zstandard.ZstdCompressor().compress
    stored = compress(json_lines(texts))
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(stored[: len(stored) * 2 // 3])
    got = texts_of(tmp_path)
    assert len(got) > 500
    assert got == texts[: len(got)]
    assert "the file is cut off; what is whole in it is read" in caplog.text


def damaged_mirror(folder):
    """C4-like files with every kind of damage; returns what a reading of all of them should count."""
    folder.mkdir()
    lines = json_lines(many_texts(300)).splitlines()
    lines[7], lines[11], lines[200], lines[201] = b'{"text": "cut of', b"[1, 2]", b'{"text": 5}', b"null"
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    stored = gzip.compress(json_lines([f"{i} {hash(str(i))}" for i in range(1000)]))
    (folder / "b.jsonl.gz").write_bytes(stored[: len(stored) * 2 // 3])
    (folder / "c.jsonl.gz").write_bytes(stored[: len(stored) // 2])
    (folder / "d.jsonl").write_bytes(json_lines(many_texts(300, "whole ")))
    return {
        "a malformed row is left out": 3 + 2,  # the last line of each file that is cut
        "a row without text in its text column is left out": 1,
        "the file is cut off; what is whole in it is read": 2,
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_is_told_by_every_run_also_from_the_cache(workers, tmp_path, caplog):
    expected = damaged_mirror(tmp_path / "mirror")
    options = COMMON | {"batch_size": 2, "context": 512}  # each worker has its own two of the four lanes
    for val_tokens in (None, None, 500, 500):  # all is read in preparation, or some of it later
        stores.damage.clear()
        caplog.clear()
        options["val_tokens"] = val_tokens
        data = C4(**options, path=str(tmp_path / "mirror"), num_workers=workers)
        first(data, 300)
        assert data.faults == expected
        first(data, 20)  # nothing is counted twice
        assert data.faults == expected
        if not workers:
            assert all(caplog.text.count(f": {kind} (") == 1 for kind in expected)


def test_damage_that_several_processes_read_counts_once(tmp_path):
    expected = damaged_mirror(tmp_path / "mirror")
    # One lane for two workers: each reads all of it.
    data = C4(**COMMON | {"context": 512}, lanes=1, path=str(tmp_path / "mirror"), num_workers=2)
    first(data, 100)
    assert data.faults == expected


def test_damage_that_several_ranks_read_counts_once(tmp_path, monkeypatch):
    expected = damaged_mirror(tmp_path / "mirror")
    data = C4(**COMMON | {"val_tokens": None}, path=str(tmp_path / "mirror"))
    data.train_dataloader()
    data.met.add(Met(Counter({"the hub stalls": 2})))
    ours = pickle.dumps(data.met)
    monkeypatch.setattr(base, "of_all_ranks", lambda met: [met, pickle.loads(ours), Met()])
    assert data.faults_of_all_ranks() == expected | {"the hub stalls": 4}
    assert data.faults == expected | {"the hub stalls": 2}


def test_each_data_module_tells_its_own_damage(tmp_path):
    expected = damaged_mirror(tmp_path / "mirror")
    for _ in range(2):
        data = C4(**COMMON | {"val_tokens": None}, path=str(tmp_path / "mirror"))
        data.train_dataloader()
        assert data.faults == expected


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_where_all_is_damaged_the_damage_is_said(tmp_path, tokenizer):
    stored = zstandard.ZstdCompressor().compress(json_lines(many_texts(50)))
    (mirror := tmp_path / "mirror").mkdir()
    for name in ("a", "b"):
        (mirror / f"{name}.jsonl.zst").write_bytes(stored[: len(stored) // 2])
    for _ in range(2):
        with pytest.raises(BadInput) as raised:
            C4(**COMMON | {"tokenizer": tokenizer}, path=str(mirror)).prepare_data()
        assert str(raised.value) == (
            f"path: no document could be read from {mirror}: "
            "the file is cut off; what is whole in it is read (2 x)."
        )


def test_several_compressed_members_are_one_file(tmp_path):
    one, two = json_lines(["one"]), json_lines(["two", "three"])
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(one) + gzip.compress(two))
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "b.jsonl.zst").write_bytes(compress(one) + compress(two))
    assert texts_of(tmp_path) == ["one", "two", "three"] * 2


def test_pieces_cut_lines_anywhere_and_lose_none(tmp_path, monkeypatch):
    texts = ["x" * n for n in (1, 5000, 30, 9000, 2, 3, 20_000, 4)] + many_texts(100)
    for ending in ("\n", ""):
        (tmp_path / "a.jsonl").write_bytes(json_lines(texts).rstrip(b"\n") + ending.encode())
        for size in (37, 1000, 4096, 10**6):
            monkeypatch.setattr(pieces, "LINES_BYTES", size)
            assert texts_of(tmp_path) == texts


def test_a_damaged_parquet_file_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 this is none")
    with pytest.raises(BadInput, match=r"a\.parquet: .*"):
        texts_of(tmp_path)


def test_logging_stays_one_line_a_kind(hub, caplog):
    caplog.set_level(logging.WARNING)
    hub.fault_rate, hub.fault_kinds = 0.6, ("503",)
    first(FineWebEdu(**COMMON), 10)
    assert stores.faults["the hub answers HTTP 503"] > 3
    assert len([record for record in caplog.records if "503" in record.getMessage()]) == 1


def test_threads_that_meet_a_fault_at_once_count_each_and_log_one(caplog, monkeypatch):
    # A thread is let go of between looking a kind up and counting it, as the interpreter may at any time.
    monkeypatch.setattr(stores, "faults", _Slow())
    monkeypatch.setattr(stores, "damage", _Slow())
    with ThreadPoolExecutor(8) as pool:
        for i in range(16):
            pool.submit(stores.count_fault, "the hub stalls", f"file {i}")
            pool.submit(stores.count_damage, "a malformed row is left out", "file 0, piece 0", 1)
    assert stores.faults == {"the hub stalls": 16}
    assert stores.damage == {("a malformed row is left out", "file 0, piece 0"): 16}
    for kind in ("the hub stalls", "a malformed row is left out"):
        assert caplog.text.count(f": {kind} (") == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_process_forked_while_a_fault_is_counted_can_count(monkeypatch):
    monkeypatch.setattr(stores, "faults", _Slow())
    with ThreadPoolExecutor(4) as pool:
        counted = [pool.submit(stores.count_fault, "the hub stalls", "file") for _ in range(20)]
        context = multiprocessing.get_context("fork")
        for _ in range(4):
            child = context.Process(target=stores.count_fault, args=("the hub stalls", "file"))
            child.start()
            child.join(timeout=20)
            assert child.exitcode == 0
        assert [each.result() for each in counted] == [None] * 20


class _Slow(Counter):
    """Hands the processor to another thread at every look."""

    def __getitem__(self, key):
        found = super().__getitem__(key)
        time.sleep(0.005)
        return found
