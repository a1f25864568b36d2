"""Runs of about a second in this process: few steps of a tiny model on a text made here, without loader workers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from t6_lightning.runs.folder import RunFolder

STEPS = 6


class Small(NamedTuple):
    """A finished run "good": its T6_HOME, its text and its last checkpoint."""

    home: Path
    text: Path
    checkpoint: Path


def write_text(file: Path, lines: int = 400) -> Path:
    """`lines` documents of about 37 bytes each."""
    written = (f"Line {i} says that {i} times {i % 7} is {i * (i % 7)}.\n" for i in range(lines))
    file.write_text("".join(written))
    return file


def arguments(text: Path, steps: int = STEPS) -> list[str]:
    """Of `fit`: `steps` steps, a checkpoint after every second, a validation after the third."""
    return [
        *("--model.net.d_model", "16", "--model.net.n_layers", "1", "--model.net.context", "32"),
        *("--model.net.vocab_size", "257", "--model.net.attention.n_heads", "2"),
        *("--model.net.attention.head_dim", "8", "--model.net.dropout", "0.1", "--data", "TextFiles"),
        *("--data.files", str(text), "--data.txt_documents", "line", "--data.tokenizer", "bytes"),
        *("--data.batch_size", "2", "--data.val_fraction", "0.1", "--data.val_tokens", "640"),
        *("--data.num_workers", "0", "--cadence.tokens_per_step", "128"),
        *("--cadence.validate_every_tokens", "384", "--cadence.log_every_steps", "1"),
        *("--checkpoints.every_tokens", "256", "--trainer.max_steps", str(steps)),
    ]


def interrupt(run: RunFolder, step: int = 4) -> None:
    """Let a finished run look as if it had been killed after the checkpoint of `step`."""
    for file in run.checkpoints.iterdir():
        if not file.name.startswith(f"step-{step:08d}."):
            file.unlink()
    run.summary_file.unlink()
    run.update_record(status="running")


def state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds."""
    return torch.load(checkpoint, weights_only=True)


def same_weights(checkpoint: Path, other: Path) -> bool:
    """Whether weights and moments are equal to the last bit."""
    one, two = state(checkpoint), state(other)
    moments = [
        [values[name] for values in s["optimizer_states"][0]["state"].values() for name in values]
        for s in (one, two)
    ]
    pairs = [*zip(one["state_dict"].values(), two["state_dict"].values(), strict=True)]
    return all(torch.equal(a, b) for a, b in [*pairs, *zip(*moments, strict=True)])


def copy_home(home: Path, target: Path) -> Path:
    """A copy of a T6_HOME, in place of what is at `target`."""
    shutil.rmtree(target, ignore_errors=True)
    return shutil.copytree(home, target)


def summary(run: RunFolder) -> dict[str, Any]:
    """What a run ended with, without its times."""
    values = json.loads(run.summary_file.read_text())
    return {name: value for name, value in values.items() if name.startswith(("val/", "data/tokens", "step"))}
