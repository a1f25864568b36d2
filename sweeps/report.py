"""The answer of a sweep as a Markdown table: means, spreads and paired comparisons."""

from statistics import fmean
from typing import Any

from sweeps.definition import Sweep
from sweeps.plan import Costs, share_of_target
from sweeps.statistics import ALPHA, MIN_PAIRS, Comparison, compare_with_best, mean_and_spread
from sweeps.study import OBJECTIVE

Rows = list[dict[str, Any]]


def markdown(sweep: Sweep, rows: Rows, cell_costs: Costs, failed: dict[tuple[str, int], str]) -> str:
    """The whole report; cells without a finished trial keep their line, with dashes."""
    by_cell = {
        cell.name: {row["seed"]: row for row in rows if row["cell"] == cell.name} for cell in sweep.cells
    }
    comparisons = compare_with_best(
        {cell: {seed: row[OBJECTIVE] for seed, row in found.items()} for cell, found in by_cell.items()}
    )
    winner = comparisons[0].best if comparisons and all(c.significant for c in comparisons) else None
    tokens = next(iter(cell_costs.values()))["tokens"]
    lines = [
        f"# {sweep.name}",
        "",
        f"**Hypothesis.** {_one_line(sweep.hypothesis)}",
        "",
        f"**Budget.** {sweep.config}, {sweep.max_steps:,} steps = {tokens:,} tokens a trial; "
        f"seeds {', '.join(map(str, sweep.seeds))}.",
        "",
        f"**Stopping rule.** {_one_line(sweep.stopping_rule)}",
        "",
        f"{len(rows)} of {len(sweep.trials)} trials finished.",
        "",
        "| cell | heads | parameters | of target | KV bytes/token | seeds | bits/byte ± sd | perplexity |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *(
            _line(sweep, cell, cell_costs[cell], list(found.values()), bold=cell == winner)
            for cell, found in by_cell.items()
        ),
        "",
        *_verdict(comparisons, winner),
    ]
    if failed:
        lines += ["", "Failed trials:", ""]
        lines += [f"- {cell}, seed {seed}: {sentence}" for (cell, seed), sentence in failed.items()]
    return "\n".join(lines) + "\n"


def _line(sweep: Sweep, cell: str, cost: dict[str, int], found: Rows, bold: bool) -> str:
    fixed = [
        cell,
        str(cost["n_heads"]),
        f"{cost['n_parameters']:,}",
        share_of_target(cost["n_parameters"], sweep),
    ]
    if not found:
        return f"| {' | '.join(fixed)} | – | 0 | – | – |"
    mean, spread = mean_and_spread([row[OBJECTIVE] for row in found])
    bits = f"{mean:.4f}" + (f" ± {spread:.4f}" if spread is not None else "")
    measured = [
        f"{fmean(row['kv_cache/bytes_per_token'] for row in found):,.0f} ({found[0]['kv_cache/dtype']})",
        str(len(found)),
        f"**{bits}**" if bold else bits,
        f"{fmean(row['val/perplexity'] for row in found):.2f}",
    ]
    return f"| {' | '.join(fixed + measured)} |"


def _verdict(comparisons: list[Comparison], winner: str | None) -> list[str]:
    if not comparisons:
        return ["Nothing to compare yet: fewer than two cells have a finished trial."]
    best = comparisons[0].best
    lines = [
        f"Paired differences to {best}, the cell of lowest mean (bits per byte, two-sided paired t-test):",
        "",
    ]
    for comparison in comparisons:
        p = "not tested" if comparison.p is None else f"p = {comparison.p:.3g}"
        lines.append(f"- {comparison.other}: {comparison.mean:+.4f} over {comparison.n_pairs} seeds, {p}")
    if winner:
        verdict = f"{winner} is in bold: it is better than every other cell at the {ALPHA:.0%} level."
    elif any(comparison.p is None for comparison in comparisons):
        fewest = min(comparison.n_pairs for comparison in comparisons)
        verdict = f"No cell is in bold: {fewest} paired seeds show nothing, it takes {MIN_PAIRS} or more."
    else:
        verdict = (
            f"No cell is in bold: {best} does not differ from every other cell at the {ALPHA:.0%} level."
        )
    return [*lines, "", verdict]


def _one_line(text: str) -> str:
    return " ".join(text.split())
