"""bench generate: the time of one further token, whole models side by side, and how near it is to its floor.

The floor is what must be read at least, weights and cached entries, over the copy bandwidth that the same run
measures. Weights and cache hold random numbers: neither training nor a prompt changes the time of a token.
"""

from __future__ import annotations

import argparse
import gc
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from kernels.bench.memory import ERRORS, no_room
from kernels.bench.profiling import where_time_goes
from kernels.bench.report import environment
from kernels.bench.timing import copy_bandwidth, median, quantile
from t6_lightning.cli.cache import DTYPES
from t6_lightning.cli.parser import Parser, check_files, show_json
from t6_lightning.common.console import console
from t6_lightning.common.errors import BadInput, require
from t6_lightning.model.cache import KVCache
from t6_lightning.model.config import T6Config
from t6_lightning.model.generate import Decoder, sample
from t6_lightning.model.t6 import T6
from t6_lightning.presets import load_net

# Before anything is timed: kernels are built, the graph is captured, clocks settle.
WARM_TOKENS = 8
PROFILED_TOKENS = 4


def random_model(config: T6Config, dtype: torch.dtype, device: torch.device) -> T6:
    """A model without a zero weight: zeros can be faster than numbers."""
    with torch.device(device):
        model = T6(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model.requires_grad_(False)


def filled_cache(model: T6, batch: int, tokens: int, capacity: int) -> KVCache:
    """A fixed cache for `capacity` tokens a row that holds `tokens` random ones."""
    cache = model.new_cache(batch, capacity)
    for entries in cache.tensors.values():
        for layer in entries:
            layer.normal_()
    cache.advance(tokens)
    cache.fix()
    return cache


def untimed_tokens(options: argparse.Namespace) -> int:
    """Tokens before the timed ones: to warm up, and to profile."""
    return WARM_TOKENS + (PROFILED_TOKENS if options.profile else 0)


def token_seconds(decoder: Decoder, token_B: torch.Tensor, n_tokens: int) -> list[float]:
    """Seconds of each of `n_tokens` tokens."""
    if not token_B.is_cuda:
        times = []
        for _ in range(n_tokens):
            began = time.perf_counter()
            token_B = decoder.next(token_B)
            times.append(time.perf_counter() - began)
        return times
    events = [torch.cuda.Event(enable_timing=True) for _ in range(n_tokens + 1)]
    events[0].record()
    for event in events[1:]:
        token_B = decoder.next(token_B)
        event.record()
    events[-1].synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]


@torch.inference_mode()
def measure(
    name: str, config: T6Config, bandwidth: float, device: torch.device, options: argparse.Namespace
) -> dict[str, Any]:
    """Time `options.new_tokens` tokens, the last of which has `options.context` tokens in its cache."""
    dtype, batch = DTYPES[options.dtype], options.batch
    before = options.context - options.new_tokens - untimed_tokens(options)
    try:
        model = random_model(config, dtype, device)
        cache = filled_cache(model, batch, before, options.context)
    except ERRORS as error:
        if not no_room(error):
            raise
        raise BadInput(
            f"--context {options.context} --batch {batch}: {name} and its cache cannot be allocated here"
        ) from error
    if options.compile:
        for block in model.blocks:
            block.compile(dynamic=False)
    generator = torch.Generator(device).manual_seed(0)
    token_B = torch.randint(config.vocab_size, (batch,), device=device)
    with model.frozen():
        decoder = Decoder(
            model,
            cache,
            lambda x_BTC: sample(model.logits(x_BTC[:, -1]), 1.0, None, generator),
            generator,
            graph=device.type == "cuda",
        )
        for _ in range(WARM_TOKENS):
            token_B = decoder.next(token_B)
        if options.profile:
            table = where_time_goes(lambda: decoder.next(token_B), PROFILED_TOKENS, device)
            with Path(options.profile).open("a") as file:
                file.write(f"{name}\n{table}\n\n")
        times = token_seconds(decoder, token_B, options.new_tokens)
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    # The tokens that a timed token reads in the mean, itself included.
    mean_tokens = options.context - (options.new_tokens - 1) / 2
    cache_bytes = round(batch * mean_tokens * config.cache_bytes_per_token(dtype.itemsize))
    floor = (weight_bytes + cache_bytes) / bandwidth
    return {
        "preset": name,
        "mechanism": config.attention.mechanism,
        "n_parameters": config.n_parameters(),
        "context": options.context,
        "batch": batch,
        "new_tokens": options.new_tokens,
        "dtype": options.dtype,
        "compiled": options.compile,
        "graph": device.type == "cuda",
        "seconds_per_token": median(times),
        "seconds_per_token_quartiles": [quantile(times, 0.25), quantile(times, 0.75)],
        "tokens_per_second": batch / median(times),
        "cache_logical_bytes": cache.logical_bytes,
        "cache_padding_bytes": cache.padding_bytes,
        "weight_bytes": weight_bytes,
        "floor_seconds": floor,
        "share_of_floor": floor / median(times),
        "copy_bytes_per_second": bandwidth,
        **environment(device),
    }


def main(arguments: list[str]) -> int:
    """Time and print, one line a preset."""
    parser = Parser("bench generate", __doc__ or "")
    parser.add_argument("presets", nargs="+", metavar="PRESET", help="preset names or YAML files")
    parser.add_argument("--context", type=int, default=32768, help="cached tokens of a row (default 32768)")
    parser.add_argument("--batch", type=int, default=16, help="rows (default 16)")
    parser.add_argument("--new_tokens", type=int, default=64, help="tokens to time (default 64)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--compile", action="store_true", help="compile blocks, which `generate` does not")
    parser.add_profile()
    parser.add_json()
    options = parser.parse_args(arguments[1:])
    for name in ("batch", "new_tokens"):
        require(getattr(options, name) >= 1, f"--{name}", getattr(options, name), "it must be at least 1")
    before = untimed_tokens(options)
    least = options.new_tokens + before + 1
    require(
        options.context >= least,
        "--context",
        options.context,
        f"{options.new_tokens} new tokens after {before} to warm up need at least {least}",
    )
    require(
        options.device != "cuda" or torch.cuda.is_available(), "--device", "cuda", "torch sees no CUDA device"
    )
    check_files(options, "profile", "json")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # What is wrong with any of them shows before the first one runs.
    configs = [load_net(name) for name in options.presets]
    bandwidth = copy_bandwidth(device)
    rows = []
    for name, config in zip(options.presets, configs, strict=True):
        # What the preset before has left behind may be most of the memory.
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        rows.append(measure(name, config, bandwidth, device, options))
    if options.json:
        show_json(rows, options.json)
    if options.json != "-":
        show(rows)
    return 0


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    first = rows[0]
    table = Table(
        title=f"one further token, {first['batch']} rows of {first['context']:,} tokens, {first['dtype']},"
        f" {first['device']}, copy {first['copy_bytes_per_second'] / 1e9:,.0f} GB/s",
        title_justify="left",
    )
    table.add_column("preset")
    columns = ("parameters", "ms a token", "quartiles", "tokens/s", "cache MB", "padding", "of floor", "time")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        low, high = row["seconds_per_token_quartiles"]
        table.add_row(
            row["preset"],
            f"{row['n_parameters'] / 1e6:,.1f} M",
            f"{1e3 * row['seconds_per_token']:.3f}",
            f"{1e3 * low:.3f}-{1e3 * high:.3f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['cache_logical_bytes'] / 1e6:,.0f}",
            f"{row['cache_padding_bytes'] / row['cache_logical_bytes']:.1%}",
            f"{row['share_of_floor']:.1%}",
            f"{row['seconds_per_token'] / first['seconds_per_token']:.2f}×",
        )
    console.print(table)
