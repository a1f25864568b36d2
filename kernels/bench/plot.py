"""A picture of what `python -m kernels.bench decode --table --json FILE` has measured.

python -m kernels.bench.plot FILE PICTURE
"""

import json
import sys
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]

# The main cases: what heads, head_dim and rank are, and which baselines stand beside them.
CASES = {
    (32, 64, 1): ("32 heads, rank 1", "tab:blue"),
    (32, 64, 2): ("32 heads, rank 2", "tab:cyan"),
    (47, 64, 2): ("47 heads, rank 2 (medium T6)", "tab:purple"),
}
BASELINES = {
    "gqa8_s": ("SDPA, 8 KV heads, 32 heads", "tab:orange"),
    "mqa_s": ("SDPA, 1 KV head, 32 heads", "tab:green"),
    "reference_s": ("the paper's kernel, 32 heads, rank 1", "tab:red"),
}
BASELINES_BESIDE = (32, 64, 1)


def points(
    rows: Rows, case: tuple[int, int, int], key: str = "median_s"
) -> list[tuple[int, float, float | None]]:
    """(cached tokens of all rows, seconds, share of the copy bandwidth) of one query token, by tokens.

    Where several batches cache as many tokens, the quickest stands for them.
    """
    found: dict[int, tuple[float, float | None]] = {}
    for row in rows:
        plain = (
            row["queries"] == 1
            and row["layout"] == "padded"
            and row["lengths"] == "even"
            and not (row["pages"] or row.get("further") or row.get("shared_b"))
        )
        if not plain or (row["heads"], row["head_dim"], row["rank"]) != case or not row.get(key):
            continue
        tokens = row["batch"] * row["tokens"]
        share = row["share_of_copy_bandwidth"] if key == "median_s" else None
        if tokens not in found or row[key] < found[tokens][0]:
            found[tokens] = (row[key], share)
    return [(tokens, *found[tokens]) for tokens in sorted(found)]


def draw(result: dict[str, Any], target: Path) -> None:
    """Time and share of the copy bandwidth against cached tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for case, (label, color) in CASES.items():
        tokens, seconds, shares = zip(*points(result["rows"], case), strict=True)
        left.plot(tokens, [1e6 * s for s in seconds], "o-", color=color, label=label, markersize=4)
        right.plot(tokens, [100 * s for s in shares], "o-", color=color, label=label, markersize=4)
    for key, (label, color) in BASELINES.items():
        measured = points(result["rows"], BASELINES_BESIDE, key)
        if measured:
            tokens, seconds, _ = zip(*measured, strict=True)
            left.plot(tokens, [1e6 * s for s in seconds], "s--", color=color, label=label, markersize=3)
    left.set(xscale="log", yscale="log", xlabel="cached tokens, all rows", ylabel="µs, one query token")
    right.set(xscale="log", ylim=(0, 105), xlabel="cached tokens, all rows", ylabel="% of copy bandwidth")
    right.axhline(100, color="grey", linewidth=0.8)
    left.legend(fontsize=8)
    right.legend(fontsize=8, loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(
        f"head_dim 64, {result['dtype']}, {result['device']}, copy {result['copy_bytes_per_second'] / 1e9:,.0f} GB/s",
        fontsize=10,
    )
    figure.savefig(target, dpi=110)
    plt.close(figure)


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("usage: python -m kernels.bench.plot FILE PICTURE", file=sys.stderr)
        return 2
    try:
        result = json.loads(Path(arguments[0]).read_text())
    except (OSError, json.JSONDecodeError) as error:
        print(f"{arguments[0]} cannot be read: {error}", file=sys.stderr)
        return 2
    if not result.get("rows") or "share_of_copy_bandwidth" not in result["rows"][0]:
        print(f"{arguments[0]} holds no table of decode cases", file=sys.stderr)
        return 2
    draw(result, Path(arguments[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
