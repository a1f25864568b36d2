"""What the kernels are meant to reach on one H100, beside what a folder of results says they do.

python -m kernels.bench.targets FOLDER
"""

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Results = dict[str, Any]
"""Name of a result file without `.json` -> what it holds; files that are not there are left out."""
Measure = Callable[[Results], list[float]]

# Result file -> the name under which its rows stand; "" where the file is a list of them.
ROWS = {"decode": "rows", "train": "models", "generate": "", "cache": ""}
SOURCES = tuple(ROWS)
# The paper's public code on one H100 80GB HBM3, medium models, 16 windows of 1,024 tokens: measured elsewhere.
REFERENCE_TOKENS_PER_SECOND = 96_300
REFERENCE_MHA_GIB = 29.9
MLA, LATENT = "MLA of 512 + 64, FlashInfer", 65_536


@dataclass(frozen=True)
class Target:
    """`measure` gives the figures that must all be at least (`at_most`: at most) `goal`; none where nothing ran."""

    what: str
    goal: float
    measure: Measure
    unit: str = "×"
    at_most: bool = False

    def reached(self, results: Results) -> list[float]:
        """The figures of this target. Empty where its results are missing, hold no more than zeros, or no numbers."""
        try:
            return [value for value in self.measure(results) if is_number(value)]
        except (KeyError, StopIteration, TypeError, ArithmeticError):
            return []

    def line(self, results: Results) -> str:
        """One row of the table."""
        figures = self.reached(results)
        goal = f"{'≤' if self.at_most else '≥'} {self.said(self.goal)}"
        if not figures:
            return f"| {self.what} | {goal} | not measured | |"
        good = [value <= self.goal if self.at_most else value >= self.goal for value in figures]
        low, high = (self.said(value, unless=self.goal) for value in (min(figures), max(figures)))
        span = low if low == high else f"{low} to {high}"
        verdict = (
            "reached"
            if all(good)
            else f"missed, {sum(good)} of {len(good)} reach it"
            if any(good)
            else "missed"
        )
        return f"| {self.what} | {goal} | {span} | {verdict} |"

    def said(self, value: float, unless: float | None = None) -> str:
        """With one digit more where rounding would make it `unless`."""
        more = unless is not None and value != unless and self.said(value) == self.said(unless)
        if self.unit == "%":
            return f"{100 * value:.{1 + more}f} %"
        if self.unit == "µs":
            return f"{1e6 * value:.{1 + more}f} µs"
        if self.unit == "×":
            return f"{value:.{2 + more}f}×"
        return f"{value:,.{1 + more}f} {self.unit}".replace(".0 ", " ").strip()


def is_number(value: object) -> bool:
    """Whether a value of a result file is one to count with: not NaN either, nor past what a float holds."""
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def _rows(results: Results, **like: Any) -> list[Row]:
    """Rows of the decode table that are as said; even rows of whole factors unless said otherwise."""
    plain = {"queries": 1, "lengths": "even", "pages": 0, "further": 0, "shared_b": False, "layout": "padded"}
    wanted = plain | like
    usual = {"further": 0, "shared_b": False}
    return [
        row
        for row in results["decode"]["rows"]
        if all(
            (usual | row)[name] in (value if isinstance(value, tuple) else (value,))
            for name, value in wanted.items()
        )
    ]


def _shares(**like: Any) -> Measure:
    return lambda results: [row["share_of_copy_bandwidth"] for row in _rows(results, **like)]


def _times(over: str, **like: Any) -> Measure:
    """How many times as long as ours another takes."""
    return lambda results: [row[over] / row["median_s"] for row in _rows(results, **like) if row.get(over)]


def _mla(batch: int, rank: int) -> Measure:
    def measure(results: Results) -> list[float]:
        theirs = [row for row in results["decode"]["others"] if (row["what"], row["batch"]) == (MLA, batch)]
        ours = _rows(results, heads=32, head_dim=64, rank=rank, batch=batch, tokens=LATENT)
        return [
            row["median_s"] / mine["median_s"] for row in theirs if "median_s" in row for mine in ours[:1]
        ]

    return measure


def _to_one(**like: Any) -> Measure:
    return lambda results: [
        row["times_one_dense_query"] for row in _rows(results, **like) if row["times_one_dense_query"]
    ]


def _paper(most_bytes: float = float("inf"), **like: Any) -> Measure:
    def measure(results: Results) -> list[float]:
        rows = [row for row in _rows(results, **like) if row["cache_bytes"] < most_bytes]
        return [row["reference_s"] / row["median_s"] for row in rows if row.get("reference_s")]

    return measure


def _model(results: Results, source: str, name: str) -> Row:
    models = results[source] if source == "generate" else results[source]["models"]
    return next(model for model in models if model["preset"] == name)


def _tokens_per_second(divisor: float = 1.0) -> Measure:
    return lambda results: [_model(results, "train", "paper/medium-tpa")["tokens_per_second"] / divisor]


def _slower(rivals: Iterable[str]) -> Measure:
    """How many times as long as a token of T6 one of each rival takes."""

    def measure(results: Results) -> list[float]:
        mine = _model(results, "generate", "paper/medium-tpa")["seconds_per_token"]
        return [_model(results, "generate", rival)["seconds_per_token"] / mine for rival in rivals]

    return measure


def _padding(results: Results) -> list[float]:
    return [row["padding_bytes"] / row["logical_bytes"] for row in results["cache"]]


def _off_formula(results: Results) -> list[float]:
    return [abs(row["logical_bytes"] / row["predicted_bytes"] - 1) for row in results["cache"]]


WHOLE: dict[str, Any] = {"group": "256 MB and more"}
ONE: dict[str, Any] = {"heads": 32, "head_dim": 64, "batch": 16}
EVERY_LAYOUT: dict[str, Any] = {"layout": ("padded", "split", "record")}
TARGETS = [
    Target("decode, cache of 256 MB and more, ranks 1, 2, 4: share of copy", 0.95, _shares(**WHOLE), "%"),
    Target("the same, head_dim 128", 0.95, _shares(**WHOLE, head_dim=128), "%"),
    Target("34, 47, 61, 78 heads, rank 2, padded", 0.90, _shares(group="odd head counts"), "%"),
    Target("cache of 16 to 256 MB", 0.75, _shares(group="16 to 256 MB"), "%"),
    Target(
        "one row, 4,096 tokens",
        6e-6,
        lambda r: [row["median_s"] for row in _rows(r, batch=1, tokens=4096, group="one row, 4,096 tokens")],
        "µs",
        at_most=True,
    ),
    Target("kernels compiled again", 0, lambda r: [r["decode"]["recompilations"]], "", at_most=True),
    Target("SDPA with 8 KV heads, rank 1", 4.8, _times("gqa8_s", **ONE, rank=1, tokens=65_536)),
    Target("the same, rank 2", 2.4, _times("gqa8_s", **ONE, rank=2, tokens=32_768)),
    Target("FlashInfer's MLA, 16 rows of 65,536 tokens, rank 1", 2.8, _mla(16, 1)),
    Target("the same, rank 2", 1.45, _mla(16, 2)),
    Target("the same, one row, rank 1", 4.0, _mla(1, 1)),
    Target("4 query tokens over one", 1.15, _to_one(group="query tokens", queries=4), at_most=True),
    Target(
        "ragged and paged over dense",
        1.05,
        _to_one(group="ragged and paged", lengths=("even", "ragged"), pages=(0, 64)),
        at_most=True,
    ),
    Target("the paper's kernel, everywhere", 1.0, _paper(**EVERY_LAYOUT)),
    Target("– rank 1, 32 heads, 16 × 65,536 tokens", 1.15, _paper(**ONE, rank=1, tokens=65_536)),
    Target("– 262,144 tokens", 1.3, _paper(**ONE, rank=1, tokens=262_144)),
    Target("– 48 heads, head_dim 64, rank 1", 1.5, _paper(**WHOLE, heads=48, head_dim=64, rank=1)),
    Target("– head_dim 128, rank 1", 1.5, _paper(**WHOLE, head_dim=128, rank=1)),
    Target("– rank 2, head_dim 64", 6.0, _paper(**WHOLE, rank=2, head_dim=64)),
    Target("– rank 2, head_dim 128", 9.5, _paper(**WHOLE, rank=2, head_dim=128)),
    Target("– below 10 MB", 2.0, _paper(1e7)),
    Target("training, medium T6", 145_000, _tokens_per_second(), "tokens/s"),
    Target("– over the paper's public code", 1.5, _tokens_per_second(REFERENCE_TOKENS_PER_SECOND)),
    Target(
        "– peak memory, the public code's MHA",
        REFERENCE_MHA_GIB,
        lambda r: [_model(r, "train", "paper/medium-tpa")["peak_memory_bytes"] / 2**30],
        "GiB",
        at_most=True,
    ),
    Target(
        "generation, medium T6: share of the floor",
        0.80,
        lambda r: [_model(r, "generate", "paper/medium-tpa")["share_of_floor"]],
        "%",
    ),
    Target(
        "– MHA and MLA of as many parameters",
        1.0,
        _slower(("paper/medium-mha", "paper/medium-mla-as-released")),
    ),
    Target("– GQA of as large a cache", 1.0, _slower(("matched/medium-gqa-at-medium-tpa-cache",))),
    Target("cache bytes, apart from padding: off the formula", 0, _off_formula, "%", at_most=True),
    Target("declared padding of the cache", 0.05, _padding, "%", at_most=True),
]


def read(folder: Path) -> Results:
    """The result files of a folder. Raises ValueError, in one sentence, where there is none or one is none."""
    results = {}
    for name in SOURCES:
        file = folder / f"{name}.json"
        if file.is_file():
            try:
                results[name] = json.loads(file.read_text())
            except ValueError as error:
                raise ValueError(f"{file} is no JSON: {error}") from None
            except OSError as error:
                raise ValueError(f"{file} cannot be read: {error.strerror}") from None
            rows = results[name]
            if ROWS[name]:
                rows = rows.get(ROWS[name]) if isinstance(rows, dict) else None
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                where = f"under {ROWS[name]!r}" if ROWS[name] else "as a list"
                raise ValueError(f"{file} holds no results of {name!r}, whose rows stand {where}")
    if not results:
        names = ", ".join(f"{name}.json" for name in SOURCES)
        raise ValueError(f"{folder} has none of {names}: python -m kernels.bench.suite {folder} makes them")
    return results


def table(results: Results) -> str:
    """Markdown, one row a target. Where others are named, the figure is their time over ours."""
    lines = ["| what | goal | measured | |", "| --- | --- | --- | --- |"]
    return "\n".join([*lines, *(target.line(results) for target in TARGETS)])


def main(argv: list[str]) -> int:
    usage = "usage: python -m kernels.bench.targets FOLDER"
    if argv in (["-h"], ["--help"]):
        print(f"{usage}\n\n{(__doc__ or '').splitlines()[0]}")
        return 0
    if len(argv) != 1:
        print(usage, file=sys.stderr)
        return 2
    try:
        print(table(read(Path(argv[0]))))
    except ValueError as error:
        print(f"python -m kernels.bench.targets: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
