"""params: what presets cost, side by side, or what they would once matched; from formulas, no model is built.

With --init also how Q, K, V, logits and the residual stream spread at initialization, predicted and measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from t6_lightning.cli.parser import Parser, check_files, show_json
from t6_lightning.common.console import console
from t6_lightning.common.errors import BadInput, require
from t6_lightning.model.budget import ALLOWED, CACHE_BYTES, COSTS, Match, match
from t6_lightning.model.config import T6Config
from t6_lightning.presets import load_net, model_presets

UNITS = {
    "parameters": "parameters",
    "cache": "cache bytes per token",
    "flops": "model FLOPs per training token",
}


def short(number: float) -> str:
    """Three digits and a unit: 2.57G."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            value = number / size
            return f"{value:.{max(0, 3 - len(str(int(value))))}f}{unit}"
    return f"{number:.0f}"


def costs(name: str, net: T6Config, context: int | None) -> dict[str, Any]:
    """One model's costs: cache in bf16; *model* FLOPs of a training token (causal half, forward and backward), *dense*
    forward FLOPs, as PyTorch counts them, and FLOPs of a decoded token with `context` tokens cached, of this code's
    algorithm and as appendix A of the paper counts its own.
    """
    decoded = context or net.context
    return {
        "preset": name,
        "mechanism": net.attention.mechanism,
        "n_heads": net.attention.n_heads,
        "n_parameters": net.n_parameters(),
        "cache_elements_per_token_per_layer": net.attention.cache_elements(),
        "cache_bytes_per_token": net.cache_bytes_per_token(CACHE_BYTES),
        "cache_ratio_to_mha": net.cache_ratio_to_mha(),
        "flops_per_token": net.training_flops(),
        "dense_forward_flops_per_token": net.forward_flops(net.context),
        "decode_flops_per_token": net.decode_flops(decoded),
        "decode_flops_per_token_appendix_a": net.appendix_a_flops(decoded),
        "decode_context": decoded,
    }


def matched(name: str, options: argparse.Namespace) -> Match:
    """A preset at the budget of `--to`.

    Raises:
        BadInput: it cannot be met; the sentence begins with the preset.
    """
    try:
        return match(load_net(name), load_net(options.to), options.match, options.allow)
    except BadInput as error:
        raise BadInput(f"{name}: {error}") from error


def spreads(net: T6Config) -> dict[str, Any]:
    """Standard deviations at initialization."""
    from t6_lightning.model import init_report as initial

    stream = initial.stream_net(net)
    # The stream's prediction is for as many layers as it is measured in.
    predicted = initial.predicted(net) | {
        name: value for name, value in initial.predicted(stream).items() if name in initial.STREAM
    }
    return {
        "predicted": predicted,
        "measured": initial.measured(net),
        "stream_layers": stream.n_layers,
        "layers": net.n_layers,
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options, checked together."""
    parser = Parser("params", __doc__ or "")
    parser.add_argument(
        "presets", nargs="*", metavar="PRESET", help="preset names or YAML files (default: all)"
    )
    parser.add_argument("--match", choices=COSTS, help="change each until it costs what --to does")
    parser.add_argument("--to", metavar="PRESET", help="the preset or YAML file to match")
    parser.add_argument(
        "--allow",
        nargs="+",
        choices=ALLOWED,
        metavar="INTEGER",
        help=f"what --match may change: {', '.join(ALLOWED)} (default: heads)",
    )
    parser.add_argument("--context", type=int, help="cached tokens of decoding FLOPs (default: the preset's)")
    parser.add_argument("--init", action="store_true", help="standard deviations at initialization")
    parser.add_json()
    options = parser.parse_args(arguments)
    require(options.context is None or options.context >= 1, "--context", options.context, "at least 1")
    for one, other in (("match", "to"), ("to", "match")):
        if getattr(options, one) and not getattr(options, other):
            raise BadInput(f"--{other} is missing: --match says what to match, and --to the preset to match")
    if options.allow and not options.match:
        raise BadInput("--match is missing: --allow says what it may change")
    options.allow = options.allow or ["heads"]
    options.presets = options.presets or model_presets()
    return options


def new_table(*names: str, columns: Sequence[str]) -> Table:
    """A table without frames, `names` to the left and figures to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(name, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def print_costs(rows: list[dict[str, Any]]) -> None:
    """One table, or two in a narrow terminal."""
    contexts = {row["decode_context"] for row in rows}
    decoded = f"{contexts.pop():,}" if len(contexts) == 1 else "a whole context's"
    console.print(
        "costs: parameters in millions; cache in numbers per token and layer and in bytes (bf16) per token, and over "
        "MHA's of the same width; FLOPs per token of training (causal half, forward and backward), of a dense forward "
        f"pass, and of decoding with {decoded} tokens cached, here and as appendix A of the paper counts its algorithm",
        highlight=False,
    )
    sizes = {
        "\nheads": [str(row["n_heads"]) for row in rows],
        "\nparameters": [f"{row['n_parameters'] / 1e6:,.2f}" for row in rows],
        "cache\nnumbers": [f"{row['cache_elements_per_token_per_layer']:,}" for row in rows],
        "cache\nbytes": [f"{row['cache_bytes_per_token']:,}" for row in rows],
        "of\nMHA": [f"{row['cache_ratio_to_mha']:.3f}" for row in rows],
    }
    flops = {
        "FLOPs\ntraining": [short(row["flops_per_token"]) for row in rows],
        "FLOPs\nforward": [short(row["dense_forward_flops_per_token"]) for row in rows],
        "FLOPs\ndecoding": [short(row["decode_flops_per_token"]) for row in rows],
        "as in\nappendix A": [
            "-"
            if row["decode_flops_per_token_appendix_a"] is None
            else short(row["decode_flops_per_token_appendix_a"])
            for row in rows
        ],
    }

    def table(figures: dict[str, list[str]]) -> Table:
        built = new_table("\npreset", "\nmechanism", columns=list(figures))
        for row, cells in zip(rows, zip(*figures.values(), strict=True), strict=True):
            built.add_row(row["preset"], row["mechanism"], *cells)
        return built

    whole = table(sizes | flops)
    unbounded = console.options.update(width=1000)
    fits = console.measure(whole, options=unbounded).maximum <= console.width
    for part in [whole] if fits else [table(sizes), table(flops)]:
        console.print(part)


def match_sentence(row: dict[str, Any]) -> str:
    """What was changed, and what is left between a matched preset and the target."""
    found = row["match"]
    changes = ", ".join(f"{name} {old} → {new}" for name, (old, new) in found["changed"].items())
    return (
        f"{row['preset']}: {changes or 'nothing changed'}; {UNITS[found['what']]} {found['gap']:+.3%} from "
        f"{found['to']}'s {found['target']:,.0f}"
    )


def print_init(rows: list[dict[str, Any]]) -> None:
    """Two lines a preset, and which streams are of fewer layers."""
    console.print(
        "standard deviations at initialization, for layer inputs of unit RMS; stream: the residual stream before, "
        "half-way through and after the blocks; -: no closed form",
        highlight=False,
    )
    columns = ("\nQ", "\nK", "\nV", "\nlogits", "stream\nbefore", "stream\nmiddle", "stream\nafter")
    table = new_table("\npreset", columns=columns)
    for row in rows:
        table.add_row(row["preset"])
        for kind in ("predicted", "measured"):
            values = ("-" if v is None else f"{v:.4f}" for v in row["init"][kind].values())
            table.add_row(f"  {kind}", *values)
    console.print(table)
    for row in rows:
        measured, all_ = row["init"]["stream_layers"], row["init"]["layers"]
        if measured < all_:
            console.print(f"{row['preset']}: stream of {measured} layers instead of {all_}", highlight=False)


def main(arguments: list[str]) -> int:
    """Print costs of presets or configuration files."""
    options = parse(arguments[1:])
    check_files(options, "json")
    rows = []
    for name in options.presets:
        found = matched(name, options) if options.match else None
        net = found.config if found else load_net(name)
        row = costs(name, net, options.context)
        if found:
            target = COSTS[options.match](load_net(options.to))
            changed = {option: list(values) for option, values in found.changed.items()}
            row["match"] = {
                "what": options.match,
                "to": options.to,
                "target": target,
                "gap": found.gap,
                "changed": changed,
            }
        if options.init:
            row["init"] = spreads(net)
        rows.append(row)
    if options.json:
        show_json(rows, options.json)
        return 0
    print_costs(rows)
    for row in rows if options.match else []:
        console.print(match_sentence(row), highlight=False)
    if options.init:
        print_init(rows)
    return 0
