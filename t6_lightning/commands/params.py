"""params: what presets cost, side by side; from formulas, no model is built."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from t6_lightning.commands.parser import Parser, show_json
from t6_lightning.console import console
from t6_lightning.presets import load_net

CACHE_BYTES = 2  # bf16


def costs(name: str) -> dict[str, Any]:
    """One preset's costs: cache in bf16, FLOPs of a training token (causal half, forward and backward)."""
    net = load_net(name)
    return {
        "preset": name,
        "mechanism": net.attention.mechanism,
        "n_heads": net.attention.n_heads,
        "n_parameters": net.n_parameters(),
        "cache_elements_per_token_per_layer": net.attention.cache_elements(),
        "cache_bytes_per_token": net.cache_bytes_per_token(CACHE_BYTES),
        "cache_ratio_to_mha": net.cache_ratio_to_mha(),
        "flops_per_token": net.training_flops(),
    }


def main(arguments: list[str]) -> int:
    """Print costs of presets or configuration files."""
    parser = Parser("params", __doc__ or "")
    parser.add_argument("presets", nargs="+", metavar="PRESET", help="preset names or YAML files")
    parser.add_json()
    options = parser.parse_args(arguments[1:])
    rows = [costs(name) for name in options.presets]
    if options.json:
        show_json(rows, options.json)
        return 0
    table = Table(
        title="costs (cache in bf16; FLOPs per training token at full context)", title_justify="left"
    )
    for column in ("preset", "mechanism"):
        table.add_column(column)
    for column in (
        "heads",
        "parameters",
        "cache elements\ntoken · layer",
        "cache bytes\ntoken",
        "of MHA",
        "FLOPs\ntoken",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["preset"],
            row["mechanism"],
            str(row["n_heads"]),
            f"{row['n_parameters']:,}",
            f"{row['cache_elements_per_token_per_layer']:,}",
            f"{row['cache_bytes_per_token']:,}",
            f"{row['cache_ratio_to_mha']:.3f}",
            f"{row['flops_per_token']:.3g}",
        )
    console.print(table)
    return 0
