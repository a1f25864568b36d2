"""cache: the key/value cache of presets, allocated and measured beside what the formula predicts."""

from __future__ import annotations

from typing import Any

import torch
from rich.table import Table

from kernels.bench.memory import ERRORS, no_room
from t6_lightning.commands.parser import Parser, check_files, show_json
from t6_lightning.console import console
from t6_lightning.errors import BadInput, require
from t6_lightning.model.cache import KVCache
from t6_lightning.presets import load_net

# torch's allocator gives a GPU's memory out in multiples of this many bytes.
ALLOCATION = 512
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def measure(name: str, context: int | None, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    """Allocate the cache that `generate` would use, on a GPU where there is one, and count its storage.

    measured = logical (the formula, if all is well) + padding that the attention declares; what torch's allocator
    rounds up stands apart, and is none on a CPU.
    """
    net = load_net(name)
    context = context or net.context
    on_gpu = torch.cuda.is_available()
    held = torch.cuda.memory_allocated() if on_gpu else 0
    try:
        cache = KVCache(net.attention, net.n_layers, batch, context, dtype, "cuda" if on_gpu else "cpu")
    except ERRORS as error:
        if not no_room(error):
            raise
        raise BadInput(
            f"--context {context} --batch {batch}: {name}'s cache cannot be allocated here"
        ) from error
    # The row numbers and lengths beside the entries are no part of what is cached.
    beside = sum(-(-8 * batch // ALLOCATION) * ALLOCATION for _ in range(2))
    rounding = torch.cuda.memory_allocated() - held - beside - cache.n_bytes if on_gpu else 0
    predicted = net.cache_bytes_per_token(dtype.itemsize) * context * batch
    return {
        "preset": name,
        "mechanism": net.attention.mechanism,
        "context": context,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "measured_bytes": cache.n_bytes,
        "logical_bytes": cache.logical_bytes,
        "padding_bytes": cache.padding_bytes,
        "allocator_rounding_bytes": rounding,
        "predicted_bytes": predicted,
        "measured_bytes_per_token": cache.n_bytes / (context * batch),
        "ratio_to_mha": cache.logical_bytes
        / (net.n_layers * 2 * net.d_model * dtype.itemsize * context * batch),
    }


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
