"""Damaged and missing state files of a run: one sentence, or rebuilt; training never silently starts again."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_runs
from commands import refused
from fuzzing import call
from run_records import metrics
from small_runs import Small

from t6_lightning.common.state import read_state
from t6_lightning.runs.folder import RunFolder, newest_run


@pytest.fixture
def copied(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    """A copy of the finished run, to be damaged."""
    home = small_runs.copy_home(small.home, tmp_path / "home")
    monkeypatch.setenv("T6_HOME", str(home))
    return Small(home, small.text, RunFolder("good").checkpoints / small.checkpoint.name)


def fit_again(small: Small, *arguments: str) -> list[str]:
    return ["fit", *small_runs.arguments(small.text), "--run", "good", *arguments]


def mlflow_runs(home: Path) -> list[str]:
    from t6_lightning.runs.tracking_store import open_client

    client = open_client()
    return [
        run.info.run_id for run in client.search_runs([e.experiment_id for e in client.search_experiments()])
    ]


DAMAGED = {
    "empty": b"",
    "garbage": b"\x00\xff\x80" * 20,
    "a list": b"[1, 2]",
    "an alias": b"a: &a [1]\nb: *a\n",
    "itself": b"a: &a [*a]\n",
    "deep": b"[" * 5000,
    "cut": None,
}


@pytest.mark.parametrize("damage", [*DAMAGED, "missing"])
def test_a_run_without_its_configuration_goes_on_only_when_it_is_told_to(
    copied: Small, small: Small, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    run = RunFolder("good")
    small_runs.interrupt(run)
    content = DAMAGED.get(damage)
    if damage == "missing":
        run.config_file.unlink()
    else:
        run.config_file.write_bytes(run.config_file.read_bytes()[:900] if content is None else content)
    before = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
    for command in (fit_again(copied), ["fit", "--run", "good", "--ckpt_path", "last"]):
        said = refused(capsys, *command)
        assert f"{run.config_file} is " in said
        assert "give --config with what the run was started with, and --ckpt_path last to go on" in said
    assert {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()} == before
    outcome = call(*fit_again(copied, "--config", "quickstart", "--ckpt_path", "last"))
    assert outcome.code == 0, outcome
    assert "the settings of this command are used, and what the run had before is not known" in outcome.err
    assert small_runs.same_weights(copied.checkpoint, small.checkpoint)
    assert run.settings is not None


def test_a_configuration_that_was_changed_by_hand_is_named(
    copied: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    file = RunFolder("good").config_file
    file.write_text(file.read_text().replace("lr: 0.003", "lr: 0.004"))
    assert f"{file} is damaged, or was changed by hand" in refused(capsys, *fit_again(copied))
    # As a file of the user's own it is a configuration like any other.
    own = file.rename(file.parent.parent / "own.yaml")
    assert call("fit", "--config", own, "--run", "other", "--dry_run").code == 0


@pytest.mark.parametrize("damage", ["missing", b"", b"{", b'{"status": 3}', b"\xff"])
def test_a_record_is_rebuilt_and_the_mlflow_run_found_again(
    copied: Small, small: Small, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    run = RunFolder("good")
    before, known = run.record, mlflow_runs(copied.home)
    small_runs.interrupt(run)
    run.record_file.unlink() if damage == "missing" else run.record_file.write_bytes(damage)
    assert newest_run().name == "good"
    outcome = call(*fit_again(copied))
    assert outcome.code == 0, outcome
    if damage != "missing":
        assert f"{run.record_file} is damaged" in caplog.text
    assert run.record["mlflow_run_id"] == before["mlflow_run_id"]
    assert run.record["status"] == "finished"
    assert mlflow_runs(copied.home) == known, "no second run with half the history"
    assert small_runs.same_weights(copied.checkpoint, small.checkpoint)


@pytest.mark.parametrize("damage", ["missing", b"", b'{"val/loss": 1', b'{"val/loss": "1"}', b"[]"])
def test_a_summary_is_made_again(copied: Small, caplog: pytest.LogCaptureFixture, damage: Any) -> None:
    run = RunFolder("good")
    before, weights = small_runs.summary(run), copied.checkpoint.read_bytes()
    run.summary_file.unlink() if damage == "missing" else run.summary_file.write_bytes(damage)
    outcome = call(*fit_again(copied))
    assert outcome.code == 0, outcome
    assert "the run is reported again" in caplog.text
    assert small_runs.summary(run) == before
    assert copied.checkpoint.read_bytes() == weights, "nothing was trained"
    assert "is finished already" in call(*fit_again(copied)).out


def test_one_flipped_bit_in_a_figure_is_not_shown(copied: Small, caplog: pytest.LogCaptureFixture) -> None:
    run = RunFolder("good")
    before = small_runs.summary(run)
    text = run.summary_file.read_text()
    digit = text.index('"val/loss": ') + 12
    run.summary_file.write_text(text[:digit] + chr(ord(text[digit]) ^ 1) + text[digit + 1 :])
    assert call(*fit_again(copied)).code == 0
    assert "its checksum differs" in caplog.text
    assert small_runs.summary(run) == before


def test_files_of_an_earlier_version_are_read(copied: Small) -> None:
    run = RunFolder("good")
    for file in (run.record_file, run.summary_file):
        values = json.loads(file.read_text())
        del values["sha256"]
        file.write_text(json.dumps(values))
    run.config_file.write_text(run.config_file.read_text().partition("\n")[2])
    outcome = call(*fit_again(copied))
    assert outcome.code == 0, outcome
    assert "is finished already" in outcome.out


def test_strange_folders_among_the_runs_are_passed_over(copied: Small) -> None:
    strange = copied.home / "runs" / "a copy (1)"
    strange.mkdir()
    (strange / "config.yaml").write_text("")
    (copied.home / "runs" / "empty").mkdir()
    assert newest_run().name == "good"


# --- before the first checkpoint ---


def test_last_starts_a_run_that_has_no_checkpoint_yet(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("T6_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert "there is no run in" in refused(capsys, "fit", "--ckpt_path", "last")
    last = fit_again(small, "--config", "quickstart", "--ckpt_path", "last")
    # It ends in its first step, before a checkpoint.
    with monkeypatch.context() as patch:
        patch.setattr("t6_lightning.training.module.T6Module.training_step", lambda *_: 1 / 0)
        assert "ZeroDivisionError" in call(*last).crash
    run = RunFolder("good")
    assert run.exists
    assert not run.has_saved
    # With and without its name, and as often as it takes.
    outcome = call("fit", "--ckpt_path", "last")
    assert outcome.code == 0, outcome
    assert run.record["status"] == "finished"
    assert small_runs.same_weights(run.checkpoints / small.checkpoint.name, small.checkpoint)
    for checkpoint in run.checkpoints.glob("*.ckpt"):
        checkpoint.write_bytes(b"")
    assert "none of that run's 2 checkpoints is whole" in refused(capsys, *last)


# --- a full disk ---


def fill(monkeypatch: pytest.MonkeyPatch, at: Callable[[Path], bool]) -> None:
    """Let writing fail for the files that `at` chooses, as on a full disk."""
    from t6_lightning.common import files

    sync = files.sync

    def full(path: Path) -> None:
        if at(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(path)

    monkeypatch.setattr(files, "sync", full)


@pytest.mark.parametrize(
    "name", ["config.yaml", "run.json", "data.json", "sample.txt", "loss.png", "summary.json"]
)
def test_a_full_disk_is_one_sentence_and_the_run_goes_on(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    home = small_runs.copy_home(small.home, tmp_path / "home")
    monkeypatch.setenv("T6_HOME", str(home))
    run = RunFolder("good")
    small_runs.interrupt(run)
    with monkeypatch.context() as patch:
        fill(patch, lambda path: path.name.startswith(f".{name}."))
        outcome = call(*fit_again(small))
    assert outcome.code == 1, outcome
    assert not outcome.crash
    assert "Traceback" not in outcome.err
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert errors[0].startswith(f"error: {run.path / name} could not be written (no space left on device)"), (
        errors
    )
    assert len(errors) == 1
    step = 6 if name in ("sample.txt", "loss.png", "summary.json") else 4
    assert errors[0].endswith(f"; step-{step:08d}.ckpt stands: make room and go on with the same command")
    assert not [file for file in run.path.rglob(".*") if file.name != ".lock"], "nothing half-written stays"
    outcome = call(*fit_again(small))
    assert outcome.code == 0, outcome
    assert small_runs.same_weights(run.checkpoints / small.checkpoint.name, small.checkpoint)


def test_a_sweep_reads_a_damaged_summary_as_a_failure(copied: Small, tmp_path: Path) -> None:
    from sweeps.run import _result

    run = RunFolder("good")
    assert _result(run, 0, tmp_path / "log")[0] == read_state(run.summary_file)
    run.summary_file.write_text("{")
    summary, why = _result(run, 0, tmp_path / "log")
    assert summary == {}
    assert why.startswith(f"{run.summary_file} is damaged")


def test_a_run_that_was_killed_before_its_report_logs_nothing_twice(copied: Small) -> None:
    run = RunFolder("good")
    before = metrics(copied.home, "good")
    run.summary_file.unlink()
    run.update_record(status="running")
    assert call(*fit_again(copied)).code == 0
    assert metrics(copied.home, "good") == before
