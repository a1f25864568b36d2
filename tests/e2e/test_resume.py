"""A run that is killed again and again ends where an uninterrupted one ends, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commands import TINY, command, fit
from run_records import logged_step, same_state

from t6_lightning.runs.folder import RunFolder


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
