"""bench train: tokens per second, memory and MFU of training steps of presets, side by side.

A step is forward, backward and fused AdamW on random tokens, through the same module, compiled blocks and precision as
`fit`; data, logging and clipping are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import time
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops

from kernels.bench.memory import ERRORS, no_room
from kernels.bench.profiling import where_time_goes
from t6_lightning.cli.params import new_table
from t6_lightning.cli.parser import Parser, check_files, show_json
from t6_lightning.common.console import console
from t6_lightning.common.errors import BadInput, require
from t6_lightning.model.backend import check_backend
from t6_lightning.model.config import BACKENDS, T6Config
from t6_lightning.presets import load_net
from t6_lightning.runs.environment import describe
from t6_lightning.training import recompute
from t6_lightning.training.module import T6Module
from t6_lightning.training.optim import AdamWConfig

PROFILED_STEPS = 2


class Training:
    """One model and its optimizer on a device, a step at a time."""

    def __init__(self, net: T6Config, device: torch.device, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.device, self.batch_size, self.context = device, options.batch, options.context or net.context
        with device:
            self.module = T6Module(net, AdamWConfig(), compile=not options.eager, recompute=options.recompute)
            self.module.configure_model()
            tokens = torch.randint(net.vocab_size, (self.batch_size, self.context + 1))
        self.module.to(device)
        self.batch = {"tokens": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}
        self.optimizer = self.module.optimizer_config.build(self.module)
        self.half = device.type == "cuda"

    def step(self) -> None:
        """One optimizer step."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            loss = self.module.training_step(self.batch, 0)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def seconds(self, steps: int) -> list[float]:
        """Of each step; on a GPU between events, so that the host may run ahead as in training."""
        if self.device.type != "cuda":
            times = []
            for _ in range(steps):
                began = time.perf_counter()
                self.step()
                times.append(time.perf_counter() - began)
            return times
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        events[0].record()
        for event in events[1:]:
            self.step()
            event.record()
        torch.cuda.synchronize()
        return [one.elapsed_time(other) / 1e3 for one, other in pairwise(events)]


def model_of(name: str, options: argparse.Namespace) -> T6Config:
    """A preset's model with what the options change."""
    changes = {field: getattr(options, field) for field in ("attention_backend", "attention_saves")}
    return dataclasses.replace(load_net(name), **{field: value for field, value in changes.items() if value})


def measure(name: str, net: T6Config, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one preset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    training = Training(net, device, options)
    began = time.perf_counter()
    training.step()
    training.seconds(options.warmup)
    warmup_seconds = time.perf_counter() - began
    times = training.seconds(options.steps)
    low, middle, high = quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    tokens = training.batch_size * training.context
    flops = net.training_flops(training.context)
    peak = get_available_flops(device, torch.bfloat16 if training.half else torch.float32)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    if options.profile:
        with Path(options.profile).open("a") as file:
            file.write(f"{name}\n{where_time_goes(training.step, PROFILED_STEPS, device)}\n\n")
    return {
        "preset": name,
        "mechanism": net.attention.mechanism,
        "n_parameters": net.n_parameters(),
        "batch": training.batch_size,
        "context": training.context,
        "tokens_per_second": tokens / middle,
        "tokens_per_second_quartiles": [tokens / high, tokens / low],
        "step_s": middle,
        "step_s_quartiles": [low, high],
        "step_s_range": [min(times), max(times)],
        "steps": len(times),
        "first_steps_s": warmup_seconds,
        "peak_memory_bytes": memory,
        "flops_per_token": flops,
        "flops_per_second": flops * tokens / middle,
        "mfu": flops * tokens / middle / peak if peak else None,
        "compiled": not options.eager,
        "precision": "bf16 autocast" if training.half else "float32",
        "recompute": options.recompute,
        "attention_backend": net.attention_backend,
        "attention_saves": net.attention_saves,
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options, checked together."""
    parser = Parser("bench train", __doc__ or "")
    parser.add_argument("presets", nargs="+", metavar="PRESET", help="preset names or YAML files")
    parser.add_argument("--batch", type=int, default=16, help="windows of a step (default 16)")
    parser.add_argument("--context", type=int, help="tokens of a window (default: the preset's)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps (default 20)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them (default 5)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument(
        "--eager", action="store_true", help="do not compile blocks (default on a CPU, as in fit)"
    )
    parser.add_argument("--recompute", choices=recompute.CHOICES, default="none", help="as model.recompute")
    parser.add_argument("--attention_backend", choices=BACKENDS, help="instead of the presets'")
    parser.add_argument("--attention_saves", choices=("qkv", "factors"), help="instead of the presets'")
    parser.add_profile()
    parser.add_json()
    options = parser.parse_args(arguments[1:])
    for option, least in (("batch", 1), ("context", 1), ("steps", 1), ("warmup", 0)):
        value = getattr(options, option)
        require(value is None or value >= least, f"--{option}", value, f"it must be at least {least}")
    check_files(options, "profile", "json")
    there = torch.cuda.is_available()
    require(options.device != "cuda" or there, "--device", "cuda", "torch sees no CUDA device")
    options.device = options.device or ("cuda" if there else "cpu")
    options.eager = options.eager or options.device == "cpu"
    return options


def main(arguments: list[str]) -> int:
    """Time presets one after the other."""
    options = parse(arguments)
    device = torch.device(options.device)
    nets = [model_of(name, options) for name in options.presets]
    for net in nets:  # what is wrong with any of them shows before the first one runs
        check_backend(net, device)
    rows = []
    for name, net in zip(options.presets, nets, strict=True):
        try:
            rows.append(measure(name, net, device, options))
        except ERRORS as error:
            if not no_room(error):
                raise
            context = options.context or net.context
            raise BadInput(
                f"--batch {options.batch} --context {context}: a step of {name} does not fit into memory here"
            ) from error
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    result = {"models": rows, "environment": describe()}
    if options.json:
        show_json(result, options.json)
        if options.json == "-":
            return 0
    table = new_table(
        "preset", columns=["tokens/s", "quartiles", "ms", "TFLOP/s", "MFU", "peak GiB", "parameters"]
    )
    for row in rows:
        slow, fast = row["tokens_per_second_quartiles"]
        table.add_row(
            row["preset"],
            f"{row['tokens_per_second']:,.0f}",
            f"{slow:,.0f} - {fast:,.0f}",
            f"{1e3 * row['step_s']:.2f}",
            f"{row['flops_per_second'] / 1e12:.1f}",
            "-" if row["mfu"] is None else f"{row['mfu']:.1%}",
            "-" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 2**30:.2f}",
            f"{row['n_parameters'] / 1e6:.2f} M",
        )
    console.print(table)
    return 0
