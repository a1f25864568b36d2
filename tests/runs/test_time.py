"""How long a run took: all of its commands, in units that can be read."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from t6_lightning.runs.fit import RunConfig, Start, _seconds, _time_so_far
from t6_lightning.runs.folder import RunFolder
from t6_lightning.training.callbacks.progress import duration


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "0:00"),
        (123, "2:03"),
        (3723, "1:02:03"),
        (86_399, "23:59:59"),
        (86_400, "1 day"),
        (3 * 86_400 + 60, "3 days"),
        (645_532 * 3600, "74 years"),
        (float("inf"), "without end"),
    ],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_the_time_of_a_run_is_that_of_all_its_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("T6_HOME", str(tmp_path))
    run = RunFolder("legs")
    checkpoint = run.checkpoints / "step-00000001.ckpt"
    run.create("")
    checkpoint.touch()

    def command(seconds: float, start: Start) -> RunConfig:
        """One that began so long ago."""
        config = RunConfig(started=time.monotonic() - seconds)
        run.update_record(**_time_so_far(config, run, start))
        return config

    def finish(config: RunConfig) -> float:
        run.update_record(seconds=_seconds(config, run), began=None)
        return run.record["seconds"]

    assert finish(command(100, Start(None))) == pytest.approx(100, abs=5)
    assert finish(command(50, Start(checkpoint))) == pytest.approx(150, abs=5)
    # One that is killed 30 s after it began and 20 s after its last checkpoint.
    command(30, Start(checkpoint))
    os.utime(checkpoint, times=(time.time() - 20,) * 2)
    assert finish(command(7, Start(checkpoint))) == pytest.approx(150 + 10 + 7, abs=5)
    # One that begins again.
    assert finish(command(3, Start(None))) == pytest.approx(3, abs=5)
