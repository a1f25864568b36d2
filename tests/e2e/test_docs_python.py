"""The pages for users of Python do what they say."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from t6_lightning.cli.trainer_settings import INSTEAD

DOCS = Path(__file__).parents[2] / "docs"


def scripts() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / "from-python.md").read_text(), flags=re.S)


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=300
    )


def metrics(folder: Path) -> dict[tuple[int, str], str]:
    """(step, name) -> value of what was logged, in every leg of the run; speeds and memory left out."""
    found: dict[tuple[int, str], str] = {}
    for file in sorted(folder.glob("exact/lightning_logs/version_*/metrics.csv")):
        with file.open() as stream:
            for row in csv.DictReader(stream):
                for name, value in row.items():
                    if value and name != "step" and not name.startswith("perf/"):
                        found[int(row["step"]), name] = value
    return found


def test_the_first_scripts_run(home: Path, tmp_path: Path) -> None:
    ten_lines, own_data, _ = scripts()
    done = run(ten_lines + own_data, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "t6.ckpt").exists()


def test_the_script_of_promises_ends_alike_however_it_is_stopped(home: Path, tmp_path: Path) -> None:
    *_, promises = scripts()
    assert len([line for line in promises.splitlines() if line.strip()]) <= 25
    through, stopped = tmp_path / "through", tmp_path / "stopped"
    for folder in (through, stopped):
        folder.mkdir()
    done = run(promises, through)
    assert done.returncode == 0, done.stderr
    for signum, steps in ((signal.SIGTERM, 5), (signal.SIGKILL, 15)):
        process = subprocess.Popen(
            [sys.executable, "-c", promises], cwd=stopped, stderr=subprocess.PIPE, text=True, env=os.environ
        )
        while not any(int(file.stem[5:]) >= steps for file in stopped.glob("exact/step-*.ckpt")):
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.02)
        process.send_signal(signum)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == (1 if signum == signal.SIGTERM else -signum)
        assert "stopped by SIGTERM: run this script again" in errors or signum == signal.SIGKILL
    done = run(promises, stopped)
    assert done.returncode == 0, done.stderr
    expected, got = metrics(through), metrics(stopped)
    assert {step for step, name in expected if name == "train/loss"} == {5, 10, 15, 20, 25, 30, 35, 40}
    # What a kill came before was never written; what follows the checkpoint is written again.
    assert {place: value for place, value in expected.items() if place in got} == got
    assert {place for place in expected if place[0] > 20} <= set(got)


@pytest.mark.parametrize("flag", INSTEAD)
def test_every_refused_flag_is_on_the_page(flag: str) -> None:
    assert f"`{flag}`" in (DOCS / "trainer-flags.md").read_text()
