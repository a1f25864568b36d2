"""The decode kernel over heads, ranks, lengths and layouts in one run: `python -m kernels.bench decode --table`.

Every time is of CUDA graph replays, per call.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kernels.bench.others import Reference
from kernels.bench.report import environment
from kernels.bench.timing import copy_bandwidth, graph_times, median, quantile
from kernels.decode import decode
from kernels.decode.bench_baselines import Baselines, other_mechanisms
from kernels.decode.bench_cases import Case, cases, factors, tpa_calls

HELP = "the Triton kernel over heads, ranks, lengths and layouts beside SDPA (needs a GPU)"
FOLDERS = ("reference",)


def run(
    device: torch.device,
    *,
    chosen: list[Case] | None = None,
    reference: Path | None = None,
    save: Callable[[dict[str, Any]], object] | None = None,
) -> dict[str, Any]:
    """Times the cases, beside them the paper's kernel from the clone `reference`; seconds and bytes per second.

    `save` takes the result after each row; its "complete" is False until the last one.

    Raises AssertionError when a longer cache, another batch or another capacity compiles a kernel again, and
    ValueError, in one sentence, for a folder without the paper's kernel.
    """
    from kernels.decode import triton as kernel

    paper = None if reference is None else Reference(reference)
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "operation": "decode",
        "dtype": "bfloat16",
        "copy_bytes_per_second": copy_bandwidth(device),
        **environment(device),
        "triton": kernel.triton.__version__,
        "recompilations": _recompilations(device),
        "complete": False,
        "rows": [],
        "others": [],
    }
    save = save or (lambda result: None)
    baselines = Baselines(device, paper)
    for case in chosen or cases():
        times = graph_times(tpa_calls(case, device))
        row = {
            **asdict(case),
            "cache_bytes": case.n_bytes,
            "median_s": median(times),
            "quartiles_s": [quantile(times, 0.25), quantile(times, 0.75)],
            "share_of_copy_bandwidth": case.n_bytes / median(times) / result["copy_bytes_per_second"],
            **baselines.of(case),
        }
        result["rows"].append(row)
        _compare_to_dense(result["rows"])
        save(result)
        print(
            f"{case.heads}, {case.head_dim}, {case.rank}; {case.batch} x {case.tokens:,}, {case.queries}, {case.how}:"
            f" {row['median_s'] * 1e6:.1f} µs, {row['share_of_copy_bandwidth']:.1%}",
            file=sys.stderr,
            flush=True,
        )
    for row in [] if chosen else other_mechanisms(device, result["copy_bytes_per_second"]):
        result["others"].append(row)
        save(result)
    result["complete"] = True
    return result


def _compare_to_dense(rows: list[dict[str, Any]]) -> None:
    """Sets "times_one_dense_query" of each row: its time over that of the same work by one query over dense rows."""
    by_case = {tuple(row[name] for name in Case.__dataclass_fields__): row for row in rows}
    for row in rows:
        twin = {name: row[name] for name in Case.__dataclass_fields__}
        twin |= {"queries": 1, "lengths": "even", "pages": 0}
        candidates = [by_case.get(tuple((twin | {"group": group}).values())) for group in _groups(rows)]
        base = next((found for found in candidates if found is not None and found is not row), None)
        row["times_one_dense_query"] = row["median_s"] / base["median_s"] if base else None


def table(result: dict[str, Any]) -> str:
    """Markdown, one row a case."""
    lines = [
        f"{where(result)}; {result['recompilations']} recompilations",
    ]
    for group in _groups(result["rows"]):
        lines += [
            "",
            f"**{group}**",
            "",
            "| h, d_h, R | B | tokens | T | layout | MB | µs | of copy | plain | GQA-8 | MQA | paper's | to one dense"
            " query |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in result["rows"]:
            if row["group"] != group:
                continue
            how = Case(**{name: row[name] for name in Case.__dataclass_fields__ if name in row}).how
            ratios = [
                f"{row[name] / row['median_s']:.2f}×" if row.get(name) else ""
                for name in ("plain_s", "gqa8_s", "mqa_s", "reference_s")
            ]
            to_one = row["times_one_dense_query"]
            lines.append(
                f"| {row['heads']}, {row['head_dim']}, {row['rank']} | {row['batch']} | {row['tokens']:,} |"
                f" {row['queries']} | {how} | {row['cache_bytes'] / 1e6:.0f} |"
                f" {row['median_s'] * 1e6:.1f} | {row['share_of_copy_bandwidth']:.1%} | {' | '.join(ratios)} |"
                f" {f'{to_one:.2f}×' if to_one else ''} |"
            )
    if result.get("others"):
        lines += [
            "",
            "**other mechanisms**",
            "",
            "| what | B | tokens | MB | µs | of copy |",
            "| --- " * 6 + "|",
        ]
        lines += map(_other_line, result["others"])
    return "\n".join(lines)


def where(result: dict[str, Any]) -> str:
    """Device, versions, commit, date and the copy's bandwidth."""
    return (
        f"{result['device']}, torch {result['torch']}, Triton {result['triton']}, {result['dtype']}, commit"
        f" {result['git_commit'] or 'unknown'}, {result['date']}; copy"
        f" {result['copy_bytes_per_second'] / 1e9:.0f} GB/s"
    )


def _other_line(row: dict[str, Any]) -> str:
    case = f"| {row['what']} | {row['batch']} | {row['tokens']:,} |"
    if "why_not" in row:
        return f"{case} | {row['why_not']} | |"
    share = row["share_of_copy_bandwidth"]
    return f"{case} {row['cache_bytes'] / 1e6:.0f} | {row['median_s'] * 1e6:.1f} | {share:.1%} |"


def _groups(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["group"] for row in rows))


def _recompilations(device: torch.device) -> int:
    """Kernels compiled while lengths, capacity and batch change; must be 0."""
    from kernels.decode import triton as kernel

    def grow(batch: int, capacity: int, lengths: list[int]) -> None:
        case = Case(47, 64, 2, batch, capacity)
        cache = factors(case, device, batch, capacity)
        q = torch.randn(batch, 1, 47, 64, device=device, dtype=torch.bfloat16)
        for length in lengths:
            rows = torch.full((batch,), length, device=device)
            decode(q, *cache, scale=0.125, lengths=rows, backend="triton")

    # The second kernel comes in a few widths, by how many rows share the programs.
    batches = (1, 2, 3, 5, 16, 33, 70, 140, 300)
    for batch in batches:
        grow(batch, 256, [256])
    before = kernel.n_compiled()
    for batch in batches:
        for capacity in (1, 16, 17, 255, 1000):
            grow(batch, capacity, [1, capacity // 2, capacity])
    after = kernel.n_compiled()
    if after != before:
        raise AssertionError(f"{after - before} kernels were compiled again while a sequence grew")
    return after - before
