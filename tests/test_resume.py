"""A run that is killed again and again ends where an uninterrupted one ends, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TINY, command, fit

from t6_lightning.runs import RunFolder


def metrics(home: Path, run: str) -> dict[str, list[tuple[int, float]]]:
    """Every logged value of a run in the tracking store, speeds and memory left out."""
    run_id = RunFolder(run).record["mlflow_run_id"]
    with sqlite3.connect(home / "mlflow.db") as database:
        rows = database.execute(
            "SELECT key, step, value FROM metrics WHERE run_uuid = ? ORDER BY key, step", (run_id,)
        ).fetchall()
    series: dict[str, list[tuple[int, float]]] = {}
    for key, step, value in rows:
        if not key.startswith(("perf/", "decode/")):
            series.setdefault(key, []).append((step, value))
    return series


def weights(run: str) -> dict[str, Any]:
    checkpoint = RunFolder(run).last_checkpoint()
    assert checkpoint is not None
    return torch.load(checkpoint, weights_only=True)


def logged_step(home: Path, run: str) -> int:
    """The last optimizer step that the run has logged; -1 before the first."""
    folder = RunFolder(run)
    if "mlflow_run_id" not in folder.record:
        return -1
    # Not read-only: a kill in the middle of a write leaves a journal, which the next reader rolls back.
    with sqlite3.connect(home / "mlflow.db", timeout=30) as database:
        found = database.execute(
            "SELECT MAX(step) FROM metrics WHERE key = 'train/loss' AND run_uuid = ?",
            (folder.record["mlflow_run_id"],),
        ).fetchone()[0]
    return -1 if found is None else found


def kill_at(home: Path, run: str, step: int, delay: float, *arguments: str) -> None:
    """Start (or go on with) a run and SIGKILL it, workers and all, `delay` seconds after it logged `step`."""
    process = subprocess.Popen(
        command("fit", *TINY, "--run", run, *arguments),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        while logged_step(home, run) < step:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.02)
        time.sleep(delay)
        assert process.poll() is None, "the run ended before it could be killed"
    finally:
        process.kill()
        subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=False)
        process.communicate()


def same_state(home: Path, run: str, reference: str, steps: int) -> None:
    """Equal metrics at equal steps, each once, and equal final weights and optimizer state: to the last bit."""
    assert RunFolder(run).record["status"] == "finished"
    got, expected = metrics(home, run), metrics(home, reference)
    logged = [step for step, _ in got["train/loss"]]
    assert logged == sorted(set(logged))
    assert logged[-1] == steps
    assert got == expected
    a, b = weights(run), weights(reference)
    assert a["global_step"] == b["global_step"] == steps
    for name, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][name]), name
    for index, state in a["optimizer_states"][0]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, b["optimizer_states"][0]["state"][index][name]), (index, name)


@pytest.fixture(scope="module")
def reference(shared_home: Path) -> str:
    """The uninterrupted run."""
    name = "uninterrupted"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("T6_HOME", str(shared_home))
        done = fit(name)
    assert done.returncode == 0, done.stderr
    return name


def kills(home: Path, run: str, number: int, seed: int) -> None:
    """Kill the run `number` times at random steps and moments."""
    rng = random.Random(seed)
    for i in range(number):
        # Each life gets a little further than the one before, at the latest to step 18 of 30.
        step = max(logged_step(home, run), 0) + rng.randint(1, max(1, 18 // number))
        say_last = i % 2 == 1 and RunFolder(run).last_checkpoint() is not None
        kill_at(
            home, run, min(step, 18), rng.uniform(0, 0.15), *(["--ckpt_path", "last"] if say_last else [])
        )


def test_killed_runs_end_bit_for_bit_as_the_uninterrupted_one(home: Path, reference: str) -> None:
    kills(home, "killed", 2, seed=0)
    done = fit("killed")
    assert done.returncode == 0, done.stderr
    same_state(home, "killed", reference, 30)


def test_sigterm_writes_a_checkpoint_and_the_same_command_goes_on(home: Path, reference: str) -> None:
    """It is sent to all processes, the loader's too, as SLURM and systemd do."""
    process = subprocess.Popen(
        command("fit", *TINY, "--run", "signalled"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while logged_step(home, "signalled") < 7:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "stopped by SIGTERM after a checkpoint at step" in errors
    assert RunFolder("signalled").record["status"] == "interrupted"
    done = fit("signalled")
    assert done.returncode == 0, done.stderr
    same_state(home, "signalled", reference, 30)


def test_sigterm_while_data_is_prepared_leaves_nothing_and_the_same_command_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("T6_HOME", str(tmp_path))
    process = subprocess.Popen(
        command("fit", *TINY, "--run", "early"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while not list(tmp_path.glob("tokens/*.lock")):  # held for the second or two that tokenizing takes
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert errors.endswith("stopped by SIGTERM before training began: go on with the same command\n")
    assert {file.suffix for file in tmp_path.rglob("*") if file.is_file()} == {".lock"}
    done = fit("early", "--trainer.max_steps", "2")
    assert done.returncode == 0, done.stderr


def test_a_finished_run_shows_its_result_again_at_once(home: Path, reference: str) -> None:
    done = fit(reference)
    assert done.returncode == 0, done.stderr
    assert "is finished already" in done.stdout
    assert "validation bits per byte" in done.stdout
