"""Checkpoints are whole or not there, also when a thread writes them while training goes on."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from t6_lightning.checkpoint import files as checkpoint_files
from t6_lightning.checkpoint.files import CheckpointError
from t6_lightning.common.errors import BadInput
from t6_lightning.checkpoint.io import VerifiedCheckpointIO


def some_state(elements: int = 1000) -> dict[str, Any]:
    """What a checkpoint holds, in small."""
    weights = {f"net.{i}": torch.randn(elements) for i in range(3)}
    moments = {i: {"step": torch.tensor(1.0), "exp_avg": torch.randn(elements)} for i in range(3)}
    optimizer = {"state": moments, "param_groups": [{"params": [0, 1, 2], "betas": (0.9, 0.95)}]}
    return {
        "state_dict": weights,
        "optimizer_states": [optimizer],
        "hyper_parameters": {"net": {}},
        "global_step": 1,
    }


def test_the_checksum_taken_while_writing_is_that_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "step-00000001.ckpt"
    checkpoint_files.save(some_state(), file)
    written = file.with_name(file.name + ".sha256").read_text()
    assert written == f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n"


def test_a_file_that_changes_after_it_was_found_whole_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "step-00000001.ckpt"
    checkpoint_files.save(some_state(), file)
    assert checkpoint_files.is_whole(file)
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert not checkpoint_files.is_whole(file)
    file.write_bytes(content)
    assert checkpoint_files.is_whole(file)


def test_what_is_written_in_the_background_is_the_state_when_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, may_write = checkpoint_files.save, threading.Event()

    def slowly(state: dict[str, Any], file: Path) -> None:
        assert may_write.wait(60)
        save(state, file)

    monkeypatch.setattr(checkpoint_files, "save", slowly)
    io, state, file = VerifiedCheckpointIO(asynchronous=True), some_state(), tmp_path / "step-00000001.ckpt"
    expected = {name: value.clone() for name, value in state["state_dict"].items()}
    io.save_checkpoint(state, file)
    assert not file.exists(), "training goes on before the file is there"
    for value in state["state_dict"].values():
        value.add_(1)
    state["optimizer_states"][0]["state"][0]["exp_avg"].zero_()
    may_write.set()
    io.finish()
    read = checkpoint_files.load(file)
    assert all(torch.equal(read["state_dict"][name], value) for name, value in expected.items())
    assert read["optimizer_states"][0]["state"][0]["exp_avg"].abs().sum() > 0
    assert read["optimizer_states"][0]["param_groups"] == state["optimizer_states"][0]["param_groups"]
    io.save_checkpoint(state, tmp_path / "step-00000002.ckpt")
    io.finish()
    read = checkpoint_files.load(tmp_path / "step-00000002.ckpt")
    assert all(torch.equal(read["state_dict"][name], value + 1) for name, value in expected.items())


PLAIN = {"hyper_parameters": {"net": {}}, "global_step": 1, "optimizer_states": []}


def test_a_checkpoint_takes_the_place_of_one_of_the_other_form(tmp_path: Path) -> None:
    """A folder of shards that of a file, and the other way round: whole, and nothing of the old one is left."""
    checkpoint = checkpoint_files.of_step(tmp_path, 1)
    for value in (1.0, 2.0):
        checkpoint_files.save({**PLAIN, "state_dict": {"w": torch.tensor([value])}}, checkpoint)
        assert checkpoint.is_file()
        assert float(checkpoint_files.load(checkpoint)["state_dict"]["w"]) == value
        rows = {"weight/w": torch.tensor([-value])}
        checkpoint_files.save_shards({**PLAIN, "state_dict": {}}, rows, checkpoint, 0, 1)
        assert checkpoint.is_dir()
        assert float(checkpoint_files.load(checkpoint)["state_dict"]["w"]) == -value
        assert list(tmp_path.iterdir()) == [checkpoint]


def test_parts_of_checkpoints_and_folders_of_them_are_none(tmp_path: Path) -> None:
    checkpoint = checkpoint_files.of_step(tmp_path, 1)
    rows = {"weight/w": torch.ones(1)}
    checkpoint_files.save_shards({**PLAIN, "state_dict": {}}, rows, checkpoint, 0, 1)
    for part, said in (
        (checkpoint / "rest.pt", "holds no weights: it is one file of a checkpoint; name their folder"),
        (tmp_path, "is a folder, and no checkpoint: name one of its checkpoints"),
    ):
        with pytest.raises(BadInput, match=re.escape(f"{part} {said}")):
            checkpoint_files.load(part)
    next(checkpoint.glob("shard-*.pt")).write_bytes(b"cut")
    with pytest.raises(BadInput, match="is damaged: a file in it is missing, or its checksum differs"):
        checkpoint_files.load(checkpoint)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failed_write_is_raised_when_it_is_waited_for(tmp_path: Path, asynchronous: bool) -> None:
    io = VerifiedCheckpointIO(asynchronous)
    (tmp_path / "file").write_text("where a folder should be")
    with pytest.raises(CheckpointError, match="could not be written"):
        io.save_checkpoint(some_state(), tmp_path / "file" / "step-00000001.ckpt")
        io.finish()


@pytest.mark.prove
def test_what_a_checkpoint_costs(tmp_path: Path) -> None:
    """1.2 GB of state, extrapolated to the 4.25 GB of the medium model (353.99 M parameters, 12 bytes each)."""
    state = some_state(50_000_000)
    n_bytes = 6 * 4 * 50_000_000
    scale = 353.99e6 * 12 / n_bytes
    figures = {}
    for asynchronous in (False, True):
        io = VerifiedCheckpointIO(asynchronous)
        for _ in range(2):  # the second checkpoint is what every later one is
            started = time.perf_counter()
            io.save_checkpoint(state, tmp_path / "step-00000001.ckpt")
            stall = time.perf_counter() - started
            io.finish()
            figures[asynchronous] = stall, time.perf_counter() - started
    started = time.perf_counter()
    assert checkpoint_files.is_whole(tmp_path / "step-00000001.ckpt")
    verified = time.perf_counter() - started
    for asynchronous, (stall, whole) in figures.items():
        print(
            f"asynchronous {asynchronous}: training waits {stall:.2f} s for {n_bytes / 1e9:.1f} GB "
            f"({stall * scale:.1f} s for medium, {stall * scale / 600:.2%} of 10 minutes), "
            f"on disk after {whole:.2f} s ({n_bytes / whole / 1e9:.2f} GB/s)"
        )
    print(f"verified in {verified:.2f} s ({n_bytes / verified / 1e9:.2f} GB/s)")
    assert figures[True][0] * scale < 6, "1 % of 10 minutes"
