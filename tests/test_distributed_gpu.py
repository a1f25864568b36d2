"""On two GPUs: DDP and FSDP2 train what one device trains, and how much faster. `pytest -m gpu -s`."""

from __future__ import annotations

import statistics
import subprocess
from pathlib import Path

import pytest
import torch
from commands import command
from test_resume import metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

STRATEGIES = {"one": (1, "auto"), "ddp": (2, "ddp"), "fsdp2": (2, "fsdp2")}


def train(home: Path, name: str, devices: int, strategy: str, *arguments: str) -> dict[int, dict[str, float]]:
    """Metrics by step of a run on so many GPUs."""
    done = subprocess.run(
        command(
            *("fit", "--run", name, "--trainer.accelerator", "cuda", "--trainer.devices", str(devices)),
            *("--trainer.strategy", strategy, *arguments),
        ),
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr
    steps: dict[int, dict[str, float]] = {}
    for key, series in metrics(home, name).items():
        for step, value in series:
            steps.setdefault(step, {})[key] = value
    return steps


def test_strategies_have_the_losses_of_one_device(home: Path) -> None:
    """Float32 with TF32 off, 30 steps of the quickstart model: losses to 1e-3, checkpoints in shards as well."""
    short = ["--trainer.max_steps", "30", "--cadence.log_every_steps", "1", "--trainer.precision", "32-true"]
    short += ["--data.val_tokens", "20000", "--data.batch_size", "4"]
    expected = train(home, "gpu-one", 1, "auto", *short)
    for name in ("ddp", "fsdp2"):
        devices, strategy = STRATEGIES[name]
        shards = ["--checkpoints.sharded", "true"] if name == "fsdp2" else []
        got = train(home, f"gpu-{name}", devices, strategy, *short, *shards)
        worst = max(abs(got[step]["train/loss"] - expected[step]["train/loss"]) for step in expected)
        print(f"{name}: training losses of 30 steps differ by at most {worst:.2e}")
        assert worst < 1e-3
        assert got[30]["val/loss"] == pytest.approx(expected[30]["val/loss"], abs=1e-3)


def test_two_gpus_train_the_medium_model_nearly_twice_as_fast(home: Path) -> None:
    """25 steps of paper/medium-tpa, compiled; the median of the logged speeds after the first 10 steps."""
    speeds: dict[str, float] = {}
    for name, (devices, strategy) in STRATEGIES.items():
        train(
            *(home, f"medium-{name}", devices, strategy, "--config", "paper/medium-tpa"),
            *("--model.compile", "true", "--trainer.max_steps", "25", "--data.val_tokens", "20000"),
            *("--cadence.log_every_steps", "5", "--cadence.tokens_per_step", "524288"),
        )
        speeds[name] = statistics.median(tokens_per_second(home, f"medium-{name}")[2:])
        print(f"{name}: {speeds[name]:,.0f} tokens/s, {speeds[name] / speeds['one']:.2f} times one GPU")
    assert speeds["ddp"] / speeds["one"] >= 1.85


def tokens_per_second(home: Path, run: str) -> list[float]:
    """The logged speeds of a run, which `metrics` leaves out."""
    import sqlite3

    from t6_lightning.runs import RunFolder

    with sqlite3.connect(home / "mlflow.db") as database:
        rows = database.execute(
            "SELECT value FROM metrics WHERE run_uuid = ? AND key = 'perf/tokens_per_second' ORDER BY step",
            (RunFolder(run).record["mlflow_run_id"],),
        ).fetchall()
    return [value for (value,) in rows]
