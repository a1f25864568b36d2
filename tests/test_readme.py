"""Every command of the README runs, in its order, in one working directory. Training is shrunk, nothing else."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHRUNK = [
    *("--model.net.d_model", "32", "--model.net.n_layers", "1", "--model.net.context", "64"),
    *("--data.batch_size", "2", "--cadence.tokens_per_step", "128", "--data.val_tokens", "500"),
]


def readme_commands() -> list[list[str]]:
    """The lines of the README's bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line.strip()]


def shrunk(command: list[str]) -> list[str]:
    """The same command with a tiny model and few steps, where it trains."""
    if command[:4] != ["python", "-m", "t6_lightning", "fit"] or {"--print_config", "--dry_run"} & set(
        command
    ):
        return command
    steps = [] if "--trainer.max_steps" in command else ["--trainer.max_steps", "2"]
    if "--trainer.max_steps" in command:
        command = [*command[: command.index("--trainer.max_steps") + 1], "3"]
    command = [word.replace("step-00000230", "step-00000003") for word in command]
    return [*command, *SHRUNK, *steps]


def test_the_make_targets_exist() -> None:
    for target in ("fit", "test", "lint", "prove", "clean"):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.timeout(900)
def test_every_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("T6_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    documents = [f"Document {i} counts: " + " ".join(map(str, range(i, i + 60))) for i in range(400)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    (tmp_path / "texts" / "documents.jsonl").write_text(lines)
    (tmp_path / "texts" / "one.txt").write_text("A document by itself.")
    (tmp_path / "sweeps").symlink_to(ROOT / "sweeps")
    commands = readme_commands()
    assert len(commands) >= 12
    for command in commands:
        words = [sys.executable if word == "python" else word for word in shrunk(command)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)
        # No server runs here, and `status` says so.
        expected = 1 if command[2:] == ["mlflow_server", "status"] else 0
        assert done.returncode == expected, (command, done.stdout, done.stderr)
