"""cache: the key/value cache of presets, allocated and measured beside what the formula predicts."""

from __future__ import annotations

from rich.table import Table

from t6_lightning.cli.parser import Parser, check_files, show_json
from t6_lightning.common.console import console
from t6_lightning.common.errors import require
from t6_lightning.evaluation.cache import DTYPES, measure


def main(arguments: list[str]) -> int:
    """Print measured and predicted cache sizes."""
    parser = Parser("cache", __doc__ or "")
    parser.add_argument("presets", nargs="+", metavar="PRESET", help="preset names or YAML files")
    parser.add_argument(
        "--context", type=int, nargs="+", help="tokens per row (default: the preset's context)"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="rows (default 1)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_json()
    options = parser.parse_args(arguments[1:])
    check_files(options, "json")
    for option in ("context", "batch"):
        for value in getattr(options, option) or ():
            require(value >= 1, f"--{option}", value, "it must be at least 1")
    rows = [
        measure(name, context, batch, DTYPES[options.dtype])
        for name in options.presets
        for context in options.context or [None]
        for batch in options.batch
    ]
    if options.json:
        show_json(rows, options.json)
        return 0
    table = Table(title=f"key/value cache of all layers, {options.dtype}", title_justify="left")
    table.add_column("preset")
    columns = (
        "context",
        "batch",
        "measured bytes",
        "padding",
        "logical bytes",
        "predicted",
        "a token",
        "of MHA",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["preset"],
            f"{row['context']:,}",
            str(row["batch"]),
            f"{row['measured_bytes']:,}",
            f"{row['padding_bytes']:,}",
            f"{row['logical_bytes']:,}",
            f"{row['predicted_bytes']:,}",
            f"{row['measured_bytes_per_token']:,.0f}",
            f"{row['ratio_to_mha']:.3f}",
        )
    console.print(table)
    return 0
