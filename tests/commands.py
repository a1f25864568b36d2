"""Running the installed commands in new processes, as a user would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# The smallest real run: bytes of the standard library, dropout, accumulation of 2, two data workers. Every 3 steps are
# logged and every 5 saved, so that checkpoints lie between logged steps.
TINY = [
    *("--model.net.d_model", "32", "--model.net.n_layers", "2", "--model.net.context", "32"),
    *("--model.net.vocab_size", "257", "--model.net.attention.n_heads", "3", "--model.net.dropout", "0.1"),
    *("--model.net.attention.head_dim", "16", "--data.tokenizer", "bytes", "--data.batch_size", "4"),
    *("--data.val_tokens", "1500", "--data.num_workers", "2", "--cadence.tokens_per_step", "256"),
    *("--cadence.validate_every_tokens", "2560", "--cadence.log_every_steps", "3"),
    *("--checkpoints.every_tokens", "1280", "--trainer.max_steps", "30"),
]


def command(*arguments: str | Path) -> list[str]:
    """The command line of `python -m t6_lightning ...` with this interpreter."""
    return [sys.executable, "-m", "t6_lightning", *map(str, arguments)]


def run(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return what it printed."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=400, **options)


def fit(name: str, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """A tiny training run."""
    return run("fit", *TINY, "--run", name, *arguments, **options)


def in_new_process(code: str, folder: Path) -> str:
    """What Python code prints when it runs in a folder: classes that it defines stay unknown to this process."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one sentence with which a command line is refused."""
    from t6_lightning.__main__ import main

    assert main([str(argument) for argument in arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, errors
    return errors[0]
