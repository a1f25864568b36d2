"""What a run logged and saved, for comparing runs to the last bit."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import torch

from t6_lightning.runs.folder import RunFolder


def metrics(home: Path, run: str) -> dict[str, list[tuple[int, float]]]:
    """Every logged value of a run in the tracking store, speeds and memory left out."""
    run_id = RunFolder(run).record["mlflow_run_id"]
    with sqlite3.connect(home / "mlflow.db") as database:
        rows = database.execute(
            "SELECT key, step, value FROM metrics WHERE run_uuid = ? ORDER BY key, step", (run_id,)
        ).fetchall()
    series: dict[str, list[tuple[int, float]]] = {}
    for key, step, value in rows:
        if not key.startswith(("perf/", "decode/")):
            series.setdefault(key, []).append((step, value))
    return series


def weights(run: str) -> dict[str, Any]:
    checkpoint = RunFolder(run).last_checkpoint()
    assert checkpoint is not None
    return torch.load(checkpoint, weights_only=True)


def logged_step(home: Path, run: str) -> int:
    """The last optimizer step that the run has logged; -1 before the first."""
    folder = RunFolder(run)
    if "mlflow_run_id" not in folder.record:
        return -1
    # Not read-only: a kill in the middle of a write leaves a journal, which the next reader rolls back.
    with sqlite3.connect(home / "mlflow.db", timeout=30) as database:
        found = database.execute(
            "SELECT MAX(step) FROM metrics WHERE key = 'train/loss' AND run_uuid = ?",
            (folder.record["mlflow_run_id"],),
        ).fetchone()[0]
    return -1 if found is None else found


def same_state(home: Path, run: str, reference: str, steps: int) -> None:
    """Equal metrics at equal steps, each once, and equal final weights and optimizer state: to the last bit."""
    assert RunFolder(run).record["status"] == "finished"
    got, expected = metrics(home, run), metrics(home, reference)
    logged = [step for step, _ in got["train/loss"]]
    assert logged == sorted(set(logged))
    assert logged[-1] == steps
    assert got == expected
    a, b = weights(run), weights(reference)
    assert a["global_step"] == b["global_step"] == steps
    for name, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][name]), name
    for index, state in a["optimizer_states"][0]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, b["optimizer_states"][0]["state"][index][name]), (index, name)
