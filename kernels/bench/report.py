"""Runs a plan and puts its figures into one JSON-ready dictionary, and that into a table."""

import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from kernels.bench.plan import Plan, Row
from kernels.bench.timing import copy_bandwidth, median, quantile, time_in_turn


def run(plan: Plan, *, seconds: float) -> dict[str, Any]:
    """Times every row of the plan in turn. Times in seconds, bandwidth in bytes per second."""
    bandwidth = copy_bandwidth(plan.device, min(seconds, 0.5))
    times = time_in_turn([row.run for row in plan.rows], plan.device, seconds)
    medians = [median(mine) for mine in times]
    baselines: dict[str, tuple[str, float]] = {}
    rows = []
    for row, mine, middle in zip(plan.rows, times, medians, strict=True):
        baseline, baseline_median = baselines.setdefault(row.mode, (row.name, middle))
        rows.append(
            {
                "backend": row.name,
                "mode": row.mode,
                "median_s": middle,
                "quartiles_s": [quantile(mine, 0.25), quantile(mine, 0.75)],
                "repeats": len(mine),
                "ratio": baseline_median / middle,
                "ratio_to": baseline,
                "least_bytes": row.least_bytes,
                "share_of_copy_bandwidth": _share(row, middle, bandwidth),
            }
        )
    return {
        "operation": plan.operation,
        "sizes": plan.sizes,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "copy_bytes_per_second": bandwidth,
        "rows": rows,
        **environment(plan.device),
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Where and when the figures were taken."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "torch": torch.__version__,
        "git_commit": _git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def table(result: dict[str, Any]) -> str:
    """The figures for reading, one line per row."""
    sizes = ", ".join(f"{name} {value}" for name, value in result["sizes"].items())
    lines = [
        f"{result['operation']}: {sizes}, {result['dtype']}",
        f"{result['device']}, torch {result['torch']}, commit {result['git_commit'] or 'unknown'},"
        f" {result['date']}; copy {result['copy_bytes_per_second'] / 1e9:.1f} GB/s",
        "",
        f"{'backend':<24}{'mode':<18}{'median ms':>11}{'quartiles ms':>20}{'ratio':>8}{'of copy':>9}",
    ]
    for row in result["rows"]:
        low, high = (1e3 * value for value in row["quartiles_s"])
        share = row["share_of_copy_bandwidth"]
        lines.append(
            f"{row['backend']:<24}{row['mode']:<18}{1e3 * row['median_s']:>11.3f}"
            f"{f'{low:.3f}-{high:.3f}':>20}{row['ratio']:>8.2f}{'' if share is None else f'{share:.1%}':>9}"
        )
    return "\n".join(lines)


def _share(row: Row, seconds: float, bandwidth: float) -> float | None:
    return None if row.least_bytes is None else row.least_bytes / seconds / bandwidth


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _git_commit() -> str | None:
    """The commit of the checkout this file is in, "-dirty" appended when the tree has changes."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
