"""A first start, in a T6_HOME with nothing but a tracking store, stopped at any moment: the same command goes on."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import ranks
import small_runs
from run_records import metrics
from small_runs import Small

from t6_lightning.runs.folder import RunFolder

WAYS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)


def start(text: Path, said: Path) -> multiprocessing.process.BaseProcess:
    """`fit` in a process of its own, which need not import what this one has."""
    arguments = [
        *("fit", *small_runs.arguments(text, steps=10), "--run", "first", "--data.tokenizer", "bpe"),
        *("--model.net.vocab_size", "320", "--data.vocab_size", "320", "--data.num_workers", "1"),
    ]
    return ranks.start_alone(said, *arguments)


def empty_home(small: Small, folder: Path) -> Path:
    """A T6_HOME with a tracking store."""
    folder.mkdir()
    shutil.copy(small.home / "mlflow.db", folder)
    return folder


def stop_at_random_moments(
    small: Small, folder: Path, monkeypatch: pytest.MonkeyPatch, n: int, seed: int
) -> None:
    rng, text = random.Random(seed), small_runs.write_text(folder / "text.txt", lines=3000)
    home = empty_home(small, folder / "uninterrupted")
    monkeypatch.setenv("T6_HOME", str(home))
    assert ranks.finish([ranks.start_alone(folder / "said.txt", "help")]) == [0]  # imports come once, before
    begin = time.monotonic()
    assert ranks.finish([start(text, folder / "said.txt")]) == [0], (folder / "said.txt").read_text()
    seconds = time.monotonic() - begin
    expected = metrics(home, "first")
    last = RunFolder("first").checkpoints / "step-00000010.ckpt"
    stopped: dict[str, int] = {}
    for number in range(n):
        other = empty_home(small, folder / str(number))
        monkeypatch.setenv("T6_HOME", str(other))
        way, moment = WAYS[number % len(WAYS)], rng.uniform(0, seconds)
        process = start(text, folder / "said.txt")
        time.sleep(moment)
        if process.pid is not None and process.is_alive():
            os.kill(process.pid, way)
        (code,) = ranks.finish([process])
        said = (folder / "said.txt").read_text() if (folder / "said.txt").exists() else ""
        case = f"{way.name} after {moment:.2f} of {seconds:.2f} s: exit {code}\n{said}"
        # Below 0: the signal came before there was a handler, or no process can heed it.
        assert code in (75, 0, -way), case
        assert "Traceback" not in said, case
        steps = [file.stem for file in RunFolder("first").checkpoints.glob("*.ckpt")]
        stage = (
            "before a run" if not RunFolder("first").exists else "in training" if steps else "before a step"
        )
        stage = "after the end" if code == 0 else stage
        stopped[stage] = stopped.get(stage, 0) + 1
        assert ranks.finish([start(text, folder / "said.txt")]) == [0], (
            case + (folder / "said.txt").read_text()
        )
        assert small_runs.same_weights(RunFolder("first").checkpoints / last.name, last), case
        assert metrics(other, "first") == expected, case
        shutil.rmtree(other)
    print(f"\n{n} stops of a first start of {seconds:.1f} s, then the same command to equal bits: {stopped}")


def test_a_first_start_that_is_stopped_goes_on_to_equal_bits(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at_random_moments(small, tmp_path, monkeypatch, 3, seed=3)


@pytest.mark.prove
@pytest.mark.timeout(3600)
def test_30_stops_of_a_first_start(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at_random_moments(small, tmp_path, monkeypatch, 30, seed=0)
