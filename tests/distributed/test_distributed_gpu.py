"""On two GPUs: DDP and FSDP2 train what one device trains. `pytest -m gpu -s`; bench_training.py says how fast."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from commands import command
from run_records import metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

SHORT = [
    *("--trainer.max_steps", "30", "--cadence.log_every_steps", "1", "--trainer.precision", "32-true"),
    *("--data.val_tokens", "20000", "--data.batch_size", "4"),
]


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


@pytest.fixture(scope="module")
def one_device(shared_home: Path) -> dict[int, dict[str, float]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("T6_HOME", str(shared_home))
        return train(shared_home, "gpu-one", 1, "auto", *SHORT)


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_strategies_have_the_losses_of_one_device(
    home: Path, strategy: str, one_device: dict[int, dict[str, float]]
) -> None:
    """Float32 with TF32 off, 30 steps of the quickstart model: losses to 1e-3, checkpoints in shards as well."""
    shards = ["--checkpoints.sharded", "true"] if strategy == "fsdp2" else []
    got = train(home, f"gpu-{strategy}", 2, strategy, *SHORT, *shards)
    worst = max(abs(got[step]["train/loss"] - one_device[step]["train/loss"]) for step in one_device)
    print(f"{strategy}: training losses of 30 steps differ by at most {worst:.2e}")
    assert worst < 1e-3
    assert got[30]["val/loss"] == pytest.approx(one_device[30]["val/loss"], abs=1e-3)
