"""The training losses of a sweep's cells in one plot, read back from MLflow."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from sweeps.definition import Sweep

Curve = list[tuple[int, float]]


def draw(sweep: Sweep, rows: list[dict[str, Any]], file: Path) -> bool:
    """Write the plot to `file`; False when there is nothing to draw, or the tracking store is gone.

    A cell's curve is the mean over its finished seeds; cells are listed from the lowest last loss to the highest.
    """
    from mlflow.exceptions import MlflowException

    try:
        curves = _curves(sweep, rows)
    except MlflowException as error:
        print(f"no loss curves: {str(error).splitlines()[0]}", file=sys.stderr)
        return False
    if not curves:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = plt.colormaps["tab10"].colors  # pyright: ignore[reportAttributeAccessIssue]
    styles = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 4)), (0, (8, 3)), (0, (3, 1, 1, 3)))
    figure, axes = plt.subplots(figsize=(11, 2.5 + 0.2 * max(12, len(curves))), layout="constrained")
    for i, (cell, curve) in enumerate(sorted(curves.items(), key=lambda item: item[1][-1][1])):
        steps, losses = zip(*curve, strict=True)
        look = {"color": colours[i % 10], "linestyle": styles[i // 10 % len(styles)], "linewidth": 1.2}
        axes.plot(steps, losses, label=f"{losses[-1]:.3f}  {cell}", **look)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (nats per token)")
    seeds = ", ".join(map(str, sweep.seeds))
    axes.set_title(f"{sweep.name}: {len(curves)} cells, seeds {seeds}")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), title="last loss, cell", fontsize="small")
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return True


def _curves(sweep: Sweep, rows: list[dict[str, Any]]) -> dict[str, Curve]:
    """Mean training loss over seeds at each step that all seeds of a cell logged."""
    from t6_lightning.runs.tracking_store import open_client

    client = open_client()
    by_cell: dict[str, list[dict[int, float]]] = {}
    for row in rows:
        points = client.get_metric_history(row["mlflow_run_id"], "train/loss")
        by_cell.setdefault(row["cell"], []).append({point.step: point.value for point in points})
    curves = {}
    for cell in sweep.cells:
        runs = by_cell.get(cell.name, [])
        steps = sorted(set.intersection(*map(set, runs))) if runs else []
        if steps:
            curves[cell.name] = [(step, fmean(run[step] for run in runs)) for step in steps]
    return curves
