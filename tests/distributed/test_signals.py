"""Signals: one way for all of them, ignored ones stay ignored, a second SIGINT leaves at once."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_runs
from fuzzing import call
from small_runs import Small

from t6_lightning.distributed import signals as signals_module
from t6_lightning.distributed.signals import ASKS_TO_STOP, Interrupted, Signals
from t6_lightning.runs.folder import RunFolder


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {signum: signal.getsignal(signum) for signum in ASKS_TO_STOP}
    yield
    assert {signum: signal.getsignal(signum) for signum in ASKS_TO_STOP} == before


@pytest.fixture
def home(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A T6_HOME whose tracking store exists already."""
    monkeypatch.setenv("T6_HOME", str(small_runs.copy_home(small.home, tmp_path / "home")))
    return tmp_path / "home"


def fit(small: Small, *arguments: str) -> list[str]:
    return ["fit", *small_runs.arguments(small.text), "--run", "stopped", *arguments]


def at(monkeypatch: pytest.MonkeyPatch, where: str, *signums: int, apart: float = 0.0) -> None:
    """Send signals to this process the next time that a function is called."""
    owner, _, name = where.rpartition(".")
    import pkgutil

    inside: Any = pkgutil.resolve_name(owner)
    function = getattr(inside, name)

    def with_signal(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(inside, name, function)
        for signum in signums:
            os.kill(os.getpid(), signum)
            time.sleep(apart)
        return function(*args, **options)

    monkeypatch.setattr(inside, name, with_signal)


BEFORE_TRAINING = {
    "building": "t6_lightning.cli.configuration.T6CLI.instantiate_trainer",
    "preparing data": "datamodules.base.TokenData.prepare_data",
    "opening the run": "t6_lightning.runs.tracking.MLflowTracking.start",
    "building the model": "t6_lightning.training.module.T6Module.configure_model",
}
MODULE = "t6_lightning.training.module.T6Module."


@pytest.mark.parametrize("signum", ASKS_TO_STOP)
@pytest.mark.parametrize("moment", BEFORE_TRAINING)
def test_every_signal_before_the_first_step_ends_alike(
    small: Small, home: Path, monkeypatch: pytest.MonkeyPatch, moment: str, signum: signal.Signals
) -> None:
    at(monkeypatch, BEFORE_TRAINING[moment], signum)
    outcome = call(*fit(small))
    assert outcome.code == 75, outcome
    said = f"stopped by {signum.name} before training began: go on with the same command\n"
    assert outcome.err.endswith(said)
    assert not RunFolder("stopped").has_saved


@pytest.mark.parametrize("signum", ASKS_TO_STOP)
def test_every_signal_in_training_writes_a_checkpoint_and_the_same_command_goes_on(
    small: Small, home: Path, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
) -> None:
    at(monkeypatch, MODULE + "training_step", signum)
    outcome = call(*fit(small))
    assert outcome.code == 75, outcome
    assert (
        f"stopped by {signum.name} after a checkpoint at step 1: go on with the same command" in outcome.err
    )
    run = RunFolder("stopped")
    assert run.record["status"] == "interrupted"
    outcome = call(*fit(small))
    assert outcome.code == 0, outcome
    assert small_runs.same_weights(run.checkpoints / small.checkpoint.name, small.checkpoint)


def test_two_sigints_at_the_same_time_are_one(
    small: Small, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal sends it to all processes, and torchrun passes it on to its own."""
    at(monkeypatch, MODULE + "training_step", signal.SIGINT, signal.SIGINT)
    assert "stopped by SIGINT after a checkpoint at step 1" in call(*fit(small)).err


def test_a_second_sigint_leaves_at_once_and_the_last_checkpoint_survives(
    small: Small, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []

    def leave(code: int) -> None:
        left.append(code)
        raise SystemExit(code)

    monkeypatch.setattr("t6_lightning.__main__.os._exit", leave)
    monkeypatch.setattr(signals_module, "SECONDS_APART", 0.05)
    at(monkeypatch, MODULE + "on_validation_epoch_start", signal.SIGINT, signal.SIGINT, apart=0.1)
    outcome = call(*fit(small))
    assert outcome.code == 130, outcome
    assert left == [130]
    assert outcome.err.endswith("stopped at once by a second SIGINT: the last checkpoint stands\n")
    assert "Traceback" not in outcome.err
    run = RunFolder("stopped")
    assert [file.name for file in run.checkpoints.glob("step-*.ckpt")] == ["step-00000002.ckpt"]
    assert run.record["status"] == "interrupted"
    outcome = call(*fit(small))
    assert outcome.code == 0, outcome
    assert small_runs.same_weights(run.checkpoints / small.checkpoint.name, small.checkpoint)


def test_a_second_sigint_is_raised_also_where_the_first_one_is_only_noted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(signals_module, "SECONDS_APART", 0.01)
    signals = Signals()
    with signals.taken():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.02)
        with pytest.raises(Interrupted) as caught:
            os.kill(os.getpid(), signal.SIGINT)
    assert caught.value.at_once


def test_signals_that_were_ignored_stay_ignored(
    small: Small, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `nohup` starts a process, and a shell what it runs in the background."""
    ignored = (signal.SIGHUP, signal.SIGINT)
    before = [signal.signal(signum, signal.SIG_IGN) for signum in ignored]
    try:
        at(monkeypatch, MODULE + "training_step", *ignored)
        outcome = call(*fit(small))
        assert outcome.code == 0, outcome
        assert [signal.getsignal(signum) for signum in ignored] == [signal.SIG_IGN] * 2
    finally:
        for signum, handler in zip(ignored, before, strict=True):
            signal.signal(signum, handler)


def test_a_signal_is_raised_where_work_may_be_left_and_noted_elsewhere() -> None:
    signals = Signals()
    with signals.taken():
        with signals.raised_at_once():
            with signals.raised_at_once():
                pass
            with pytest.raises(Interrupted, match="SIGHUP"):
                os.kill(os.getpid(), signal.SIGHUP)
        assert signals.noted == signal.SIGHUP
        with pytest.raises(Interrupted, match="SIGHUP"), signals.raised_at_once():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.noted == signal.SIGTERM


CHILD = """
import os, signal, sys, time
from t6_lightning.distributed.signals import signals
report = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
with signals.taken():
    print("ready", flush=True)
    end = time.monotonic() + 20
    while not signals.noted and time.monotonic() < end:
        time.sleep(0.01)
    print("a line for a terminal that is gone", flush=True)
    os.write(report, signal.Signals(signals.noted).name.encode())
"""


def test_output_to_a_terminal_that_was_closed_ends_nothing(tmp_path: Path) -> None:
    """A closed ssh connection hangs the terminal up: SIGHUP comes, and every write to it fails from then on."""
    report = tmp_path / "report"
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", CHILD, str(report)])
    said = b""
    while b"ready" not in said:
        said += os.read(terminal, 1000)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert report.read_text() == "SIGHUP"


def test_a_new_process_heeds_a_signal_from_its_start_on(home: Path, small: Small) -> None:
    """While Lightning is imported, which takes seconds."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "t6_lightning", *fit(small)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        if "torch._C" in line or line.rstrip().endswith("| numpy"):
            process.send_signal(signal.SIGHUP)
            break
    reader = threading.Thread(target=lambda: lines.extend(process.stderr or ()))
    reader.start()
    assert process.wait(120) == 75
    reader.join()
    assert lines[-1] == "stopped by SIGHUP before training began: go on with the same command\n"
    assert not RunFolder("stopped").path.exists()
