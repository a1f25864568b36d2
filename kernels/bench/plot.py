"""A picture of what `python -m kernels.bench decode --table --json FILE` has measured.

python -m kernels.bench.plot FILE PICTURE
"""

import json
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

from kernels.bench import files
from kernels.bench.targets import is_number

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
NUMBERS = (
    *("heads", "head_dim", "rank", "batch", "tokens", "queries", "pages"),
    *("median_s", "share_of_copy_bandwidth"),
)
OF_A_ROW = {*NUMBERS, "layout", "lengths"}
OF_A_TABLE = {"rows", "dtype", "device", "copy_bytes_per_second"}


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


def read(file: Path) -> dict[str, Any]:
    """A result of `decode --table`. Raises ValueError, in one sentence, for any other file."""
    try:
        result = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    rows = result["rows"] if isinstance(result, dict) and result.keys() >= OF_A_TABLE else None
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and row.keys() >= OF_A_ROW for row in rows
    ):
        raise ValueError(f"{file} holds no table of decode cases")
    found = [("copy_bytes_per_second", result["copy_bytes_per_second"])]
    for i, row in enumerate(rows):
        measured = [name for name in BASELINES if row.get(name) is not None]
        found += [(f"rows[{i}].{name}", row[name]) for name in (*NUMBERS, *measured)]
    for name, value in found:
        if not is_number(value):
            raise ValueError(f"{file}: {name} must be a number, got {value!r}")
    if not any(points(rows, case) for case in CASES):
        wanted = "; ".join(", ".join(map(str, case)) for case in CASES)
        raise ValueError(f"{file} holds none of the cases that are drawn (heads, head_dim, rank: {wanted})")
    return result


def draw(result: dict[str, Any], kind: str) -> bytes:
    """Time and share of the copy bandwidth against cached tokens, as a file of this kind ("png")."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for case, (label, color) in CASES.items():
        measured = points(result["rows"], case)
        if not measured:
            continue
        tokens, seconds, shares = zip(*measured, strict=True)
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
    picture = BytesIO()
    figure.savefig(picture, dpi=110, format=kind)
    plt.close(figure)
    return picture.getvalue()


def kind_of(picture: str) -> str:
    """Which kind of file a name asks for. Raises ValueError, in one sentence, for what cannot be written."""
    from matplotlib.backend_bases import FigureCanvasBase

    kind = Path(picture).suffix.removeprefix(".")
    kinds = sorted(FigureCanvasBase.filetypes.keys() - {"pgf"})  # which needs LaTeX
    if kind not in kinds:
        raise ValueError(f"{picture!r} is no name of a picture; allowed endings: .{', .'.join(kinds)}")
    why_not = files.why_not_writable(picture)
    if why_not:
        raise ValueError(f"{picture!r}: {why_not}")
    return kind


def main(arguments: list[str]) -> int:
    usage = "usage: python -m kernels.bench.plot FILE PICTURE"
    if arguments in (["-h"], ["--help"]):
        print(f"{usage}\n\n{(__doc__ or '').splitlines()[0]}")
        return 0
    if len(arguments) != 2:
        print(usage, file=sys.stderr)
        return 2
    file, picture = arguments
    try:
        result = read(Path(file))
        kind = kind_of(picture)
        files.write(picture, draw(result, kind))
    except ValueError as error:
        print(f"python -m kernels.bench.plot: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
