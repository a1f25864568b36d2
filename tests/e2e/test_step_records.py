"""Learning rate, samples and tokens of each step of one run are those of step_records.txt, on any processor.

The run reads its small corpus three times, so the order of samples at the end of the data is pinned too.
`python tests/e2e/test_step_records.py` writes the file again, for a change that should alter them.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from record_steps import RECORD_STEPS, STEPS, lines_of, settings, windows_at_most, write_corpus

FILE = Path(__file__).with_name("step_records.txt")
HEADER = "# step, learning rate (float.hex), sha256[:16] of the tokens, sample ids; see test_step_records.py"


def records(folder: Path) -> list[str]:
    """Train below `folder`, and one line per step. T6_HOME and RECORD_STEPS are the caller's to set."""
    from t6_lightning.__main__ import main

    # What is recorded depends neither on the processor nor on the model: a smaller one takes less time.
    smaller = ["--model.net.n_layers", "1", "--data.num_workers", "0"]
    corpus = write_corpus(folder / "corpus")
    assert main(["fit", "--run", "step-records", *settings(world=1), *corpus, *smaller]) == 0
    _, steps, _ = lines_of(Path(os.environ[RECORD_STEPS]), rank=0)
    lines = []
    for step in steps:
        samples = [str(sample) for micro_batch in step["samples"] for sample in micro_batch]
        lines.append(f"{step['step']} {step['lr']} {step['tokens']} {' '.join(samples)}")
    return lines


def test_steps_are_the_recorded_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T6_HOME", str(tmp_path / "home"))
    monkeypatch.setenv(RECORD_STEPS, str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    expected = FILE.read_text().splitlines()
    assert expected[0] == HEADER
    assert [HEADER, *records(tmp_path)] == expected
    assert len(expected) == 1 + STEPS
    last = int(expected[-1].split()[-1])
    assert last > 2 * windows_at_most(tmp_path / "corpus"), "the end of the data is crossed"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"T6_HOME": f"{folder}/home", RECORD_STEPS: folder}
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        lines = records(Path(folder))
    FILE.write_text("\n".join([HEADER, *lines]) + "\n")


if __name__ == "__main__":
    main()
