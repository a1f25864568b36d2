"""Runs that several ranks train, stopped and gone on with, against one that a single rank trained in one go."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from commands import TINY
from run_records import metrics, weights

# Float64 without dropout, so that what differs is the order of sums and nothing else. A step is 8 windows.
EXACT = [
    *("--trainer.precision", "64-true", "--model.net.dropout", "0", "--data.num_workers", "0"),
    *("--data.batch_size", "2", "--cadence.log_every_steps", "1", "--trainer.max_steps", "12"),
    *("--cadence.validate_every_tokens", "1536", "--data.val_tokens", "700"),
]


# --- what ranks are made to do; each is pickled and called in every rank before the command ---


def stop_after(step: int, signum: int = signal.SIGTERM) -> None:
    """A signal reaches one rank, the last, while it takes this step."""
    from t6_lightning.training.callbacks.checkpoints import Checkpoints

    after_step = Checkpoints._after_step

    def with_signal(self: Any, trainer: Any) -> None:
        if trainer.global_step == step and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signum)
        after_step(self, trainer)

    Checkpoints._after_step = with_signal


def record_samples(folder: str, stop: int | None = None) -> None:
    """Write down which samples each rank trains on at each step; stop after a step."""
    from t6_lightning.training.module import T6Module

    training_step = T6Module.training_step

    def recorded(self: Any, batch: Any, batch_idx: int) -> Any:
        line = {"step": self.trainer.global_step, "micro": batch_idx, "samples": batch["sample"].tolist()}
        with Path(folder, f"samples-{os.getpid()}-{self.trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line | {"rank": self.trainer.global_rank}) + "\n")
        return training_step(self, batch, batch_idx)

    T6Module.training_step = recorded
    if stop is not None:
        stop_after(stop)


# --- comparing runs ---


def assert_close(home: Path, run: str, reference: str, tolerance: float) -> None:
    """Equal metrics at equal steps, each once, and equal weights and optimizer state, to a relative tolerance."""
    got, expected = metrics(home, run), metrics(home, reference)
    assert got.keys() == expected.keys()
    for name in expected:
        assert [step for step, _ in got[name]] == [step for step, _ in expected[name]], name
        assert [v for _, v in got[name]] == pytest.approx([v for _, v in expected[name]], rel=tolerance), name
    a, b = weights(run), weights(reference)
    assert a["global_step"] == b["global_step"]
    assert a["state_dict"].keys() == b["state_dict"].keys()
    pairs = [(value, b["state_dict"][name]) for name, value in a["state_dict"].items()]
    for index, state in b["optimizer_states"][0]["state"].items():
        pairs += [(a["optimizer_states"][0]["state"][index][name], value) for name, value in state.items()]
    for value, expected_value in pairs:
        torch.testing.assert_close(value, expected_value, rtol=tolerance, atol=tolerance)


def stopped(world: int, name: str, preparation: Callable[[], None], *arguments: str) -> None:
    """Start or go on with a run on `world` ranks that a signal will stop."""
    said = Path(os.environ["T6_HOME"]) / "said" / f"{name}-{world}"
    strategy = ["--trainer.strategy", "ddp"] if world > 1 and "--trainer.strategy" not in arguments else []
    devices = ["--trainer.accelerator", "cpu", "--trainer.devices", str(world), *strategy]
    processes = ranks.start(
        world, said, "fit", *TINY, *EXACT, *devices, "--run", name, *arguments, preparation=preparation
    )
    codes = ranks.finish(processes)
    everything = "\n".join((said / f"rank-{rank}.txt").read_text() for rank in range(world))
    assert codes == [75] * world, everything
    assert everything.count("stopped by SIGTERM after a checkpoint") == 1


def samples(folder: Path) -> list[list[int]]:
    """The samples of each step, in the order of micro-batches and ranks."""
    lines = [json.loads(line) for file in folder.iterdir() for line in file.read_text().splitlines()]
    lines.sort(key=lambda line: (line["step"], line["micro"], line["rank"]))
    steps = sorted({line["step"] for line in lines})
    return [[i for line in lines if line["step"] == step for i in line["samples"]] for step in steps]


def elastic(home: Path, name: str, reference: str, stops: list[int], *arguments: str) -> None:
    """1 -> 2 -> 4 -> 2 ranks, stopped by a signal after each of three steps."""
    folder = home / f"samples-{name}"
    folder.mkdir()
    for world, stop in zip((1, 2, 4), stops, strict=True):
        stopped(world, name, partial(record_samples, str(folder), stop), *arguments)
    ranks.fit(2, name, *EXACT, *arguments, preparation=partial(record_samples, str(folder)))
    assert samples(folder) == samples(home / f"samples-{reference}")
    assert_close(home, name, reference, 1e-10)
