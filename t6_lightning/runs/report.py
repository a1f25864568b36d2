"""The end of a run: measured cache, a generated sample, the loss curve, and one short table."""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from rich.table import Table

from datamodules.base import TokenData
from t6_lightning.common.console import console, python
from t6_lightning.common.files import replacing, write_atomically
from t6_lightning.common.state import DamagedState, read_state, write_state
from t6_lightning.model.cache import KVCache
from t6_lightning.model.generate import generate, row_generators
from t6_lightning.model.t6 import T6
from t6_lightning.runs.folder import RunFolder
from t6_lightning.runs.plan import Plan
from t6_lightning.runs.tracking import MLflowTracking
from t6_lightning.training.callbacks.progress import DAY, duration

log = logging.getLogger(__name__)

PROMPT_TOKENS = 32
SAMPLE_SEED = 0


def write_data_summary(data: TokenData, folder: RunFolder) -> Path:
    """Write counts, reference compressions and the fingerprint of the data as data.json."""
    file = folder.path / "data.json"
    write_atomically(file, json.dumps({"fingerprint": data.fingerprint, **data.summary()}, indent=2) + "\n")
    return file


@dataclass(frozen=True)
class Ended:
    """What a run trained.

    Attributes:
        step: optimizer steps.
        tokens: training tokens.
        seconds: of all commands that trained it, each from its beginning.
        faults: kind -> how often it was met in reading, on all ranks.
        half: generation measures in bfloat16, as training computed.
    """

    step: int
    tokens: int
    seconds: float
    faults: Mapping[str, int]
    half: bool


def finish(
    ended: Ended,
    trained: T6,
    figures: Mapping[str, float],
    data: TokenData,
    folder: RunFolder,
    tracking: MLflowTracking | None,
) -> dict[str, Any]:
    """Measure what is measured once, log it with the artifacts, and write summary.json. Rank 0 alone calls it.

    Args:
        ended: what was trained.
        trained: the model.
        figures: `val/*` of the last validation.
        data: what it was trained on.
        folder: where the files go.
        tracking: where figures and files are logged too, if anywhere.
    """
    net = trained.config
    cache, text, speed = sample_text(trained, data, ended.half)
    element_bytes = next(iter(cache.tensors.values())).element_size()
    logical_bytes = cache.logical_bytes / len(cache.lengths)
    mha_elements = net.n_layers * 2 * net.d_model
    once = {
        "kv_cache/bytes_per_token": logical_bytes / cache.capacity,
        "kv_cache/padding_bytes_per_token": cache.padding_bytes / len(cache.lengths) / cache.capacity,
        "kv_cache/predicted_bytes_per_token": net.cache_bytes_per_token(element_bytes),
        "kv_cache/bytes_at_full_context": logical_bytes,
        "kv_cache/predicted_bytes_at_full_context": net.cache_bytes_per_token(element_bytes) * net.context,
        "kv_cache/ratio_to_mha": logical_bytes / cache.capacity / (mha_elements * element_bytes),
        "decode/tokens_per_second": speed,
        "n_parameters": sum(p.numel() for p in trained.parameters()),
    }
    sample_file = folder.path / "sample.txt"
    write_atomically(sample_file, text)
    validations: list[tuple[int, float]] = []
    if tracking is not None:
        tracking.log_metrics(once, step=ended.step)
        histories = {name: tracking.history(name) for name in CURVES}
        validations = tracking.history("val/bits_per_byte")
        title = f"{folder.name}: {net.attention.mechanism}, {net.n_parameters() / 1e6:.2f} M parameters"
        plot = plot_losses(histories, ended.tokens / max(ended.step, 1), title, folder.path / "loss.png")
        for file in (sample_file, plot):
            tracking.log_artifact(file)
    summary_of_data = data.summary()
    kept = (*REFERENCES, "val_lost_share")
    references = {name: summary_of_data[name] for name in kept if summary_of_data.get(name) is not None}
    summary = dict(figures) | once | references | {
        "val/bits_per_byte_before": validations[-2][1] if len(validations) > 1 else None,
        "kv_cache/dtype": str(next(iter(cache.tensors.values())).dtype).removeprefix("torch."),
        "kv_cache/mha_bytes_per_token": mha_elements * element_bytes,
        "data/tokens": ended.tokens,
        "data/fingerprint": data.fingerprint,
        "data/faults": dict(ended.faults),
        "mechanism": net.attention.mechanism,
        "step": ended.step,
        "seconds": round(ended.seconds, 1),
        "checkpoint": str(folder.last_checkpoint()),
        "mlflow_run_id": tracking.version if tracking is not None else None,
    }  # fmt: skip
    write_state(folder.summary_file, summary)
    if tracking is not None:
        tracking.log_artifact(folder.summary_file)
    return summary


REFERENCES = {
    "unigram_bits_per_byte": "unigram model of the same tokens",
    "gzip_bits_per_byte": "gzip -9 of the same text",
    "xz_bits_per_byte": "xz -9 of the same text",
}


_NUMBER = (int, float)
SUMMARY: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("val/loss", "val/perplexity", "val/bits_per_byte", "n_parameters", "seconds"), _NUMBER),
    **dict.fromkeys(("kv_cache/bytes_per_token", "kv_cache/predicted_bytes_per_token"), _NUMBER),
    "val/bits_per_byte_before": (*_NUMBER, NoneType),
    "kv_cache/mha_bytes_per_token": int,
    "kv_cache/dtype": str,
    "data/tokens": int,
    "step": int,
    "checkpoint": str,
}
"""Types of what `print_summary` shows."""


def read_summary(folder: RunFolder) -> dict[str, Any] | None:
    """The summary of a finished run; None where it is missing or damaged, which is said."""
    try:
        return read_state(folder.summary_file, SUMMARY, dict.fromkeys(REFERENCES, _NUMBER))
    except FileNotFoundError:
        log.warning("%s is missing: the run is reported again", folder.summary_file)
    except DamagedState as error:
        log.warning("%s: the run is reported again", error)
    return None


def sample_text(net: T6, data: TokenData, half: bool) -> tuple[KVCache, str, float]:
    """Continue the opening of a validation document of each domain up to the full context.

    Returns:
        the cache that generation used, the text, and the decoded tokens per second.
    """
    net, device = net.eval(), net.embedding.weight.device
    windows = data.validation_windows()
    prompts: dict[int, torch.Tensor] = {}
    for first in range(0, len(windows), data.batch_size):
        if len(prompts) == len(data.domains):
            break
        batch = windows.batch(first, data.batch_size)
        for domain, tokens in zip(batch["domain"].tolist(), batch["tokens"], strict=True):
            prompts.setdefault(domain, tokens[: min(PROMPT_TOKENS, data.context - 1)])
    capacity = data.context
    cache = net.new_cache(len(prompts), capacity, torch.bfloat16 if half else None)
    prompt_BT = torch.stack(list(prompts.values())).to(device)
    generators = row_generators(SAMPLE_SEED, len(prompts), device)
    n_new = capacity - prompt_BT.shape[1] + 1
    tokens = []
    started = 0.0
    # Compiled blocks stay eager here: a cache that grows by a token a step would be compiled anew each time.
    with torch.autocast(device.type, torch.bfloat16, enabled=half), torch.compiler.set_stance("force_eager"):
        for token_B in generate(
            net,
            prompt_BT,
            n_new,
            top_k=50,
            generator=generators,
            cache=cache,
            n_symbols=min(data.tokenizer.vocab_size, net.config.vocab_size),
        ):
            tokens.append(token_B.cpu())
            started = started or time.perf_counter()  # the first token is the prefill's
    speed = len(prompts) * (n_new - 1) / max(time.perf_counter() - started, 1e-9)
    parts = []
    for row, domain in enumerate(prompts):
        prompt = data.tokenizer.decode([t for t in prompt_BT[row].tolist() if t != data.tokenizer.eot])
        text = data.tokenizer.decode([int(t[row]) for t in tokens])
        parts.append(f"=== {data.domains[domain]}: the prompt ends at »»»\n{prompt}»»»{text}\n")
    return cache, "\n".join(parts), speed


CURVES = {"train/loss": ("-", "training"), "val/loss": ("o-", "validation")}
"""Metric -> its line and name in the picture."""


def plot_losses(
    histories: Mapping[str, list[tuple[int, float]]], tokens_per_step: float, title: str, file: Path
) -> Path:
    """Draw (step, value) of the metrics in `CURVES` over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, (style, label) in CURVES.items():
        history = histories[name]
        axes.plot(
            [s * tokens_per_step / 1e6 for s, _ in history], [v for _, v in history], style, label=label
        )
    axes.set_title(title)
    axes.set_xlabel("tokens (millions)")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)
    return file


def print_plan(plan: Plan, matrix_rate: float) -> None:
    """What `--dry_run` shows; `matrix_rate` in FLOP/s."""
    table = Table("this run", "", title="plan", title_justify="left")
    table.add_row("parameters", f"{plan.n_parameters:,}")
    table.add_row("tokens", f"{plan.tokens:,} = {plan.steps:,} steps × {plan.tokens_per_step:,}")
    table.add_row("micro-batches per step and rank", f"{plan.micro_batches}")
    table.add_row("training FLOPs", f"{plan.flops:.3g}")
    table.add_row("memory for weights, gradients, optimizer", f"{plan.state_bytes / 1e6:,.0f} MB")
    table.add_row("disk for checkpoints, at most", f"{plan.disk_bytes / 1e6:,.0f} MB")
    least = duration(plan.least_seconds(matrix_rate))
    table.add_row(
        "time, at least", f"{least} at the {matrix_rate / 1e9:,.0f} GFLOP/s of one matrix product here"
    )
    console.print(table)


def print_summary(folder: RunFolder, summary: dict[str, Any]) -> None:
    """The short table at the end of `fit`, and what to do next."""
    table = Table("result", "", title=f"run {folder.name}", title_justify="left")
    table.add_row("parameters", f"{summary['n_parameters']:,.0f}")
    table.add_row("training tokens", f"{summary['data/tokens']:,} in {summary['step']:,} steps")
    table.add_row("validation loss", f"{summary['val/loss']:.4f} nats per token")
    table.add_row("validation perplexity", f"{summary['val/perplexity']:.2f}")
    now, before = summary["val/bits_per_byte"], summary["val/bits_per_byte_before"]
    trend = "" if before is None else f", {_trend(before - now)} from {before:.4f} at the validation before"
    table.add_row("validation bits per byte", f"{now:.4f}{trend}")
    if lost := summary.get("val_lost_share"):
        table.add_row(
            "  not comparable", f"the tokenizer loses {lost:.2%} of the bytes of the validation text"
        )
    for name, value in summary.items():
        if name.endswith("/bits_per_byte") and name.count("/") == 2:
            table.add_row(f"  {name.split('/')[1]}", f"{value:.4f}")
    for name, label in REFERENCES.items():
        if name in summary:
            table.add_row(f"  {label}", f"{summary[name]:.4f} (the model: {now / summary[name] - 1:+.1%})")
    measured, predicted = summary["kv_cache/bytes_per_token"], summary["kv_cache/predicted_bytes_per_token"]
    mha = summary["kv_cache/mha_bytes_per_token"]
    table.add_row(
        f"KV cache, bytes per token ({summary['kv_cache/dtype']})",
        f"{measured:,.0f} measured, {predicted:,.0f} predicted, {mha:,.0f} MHA ({measured / mha:.3f}×)",
    )
    seconds = summary["seconds"]
    table.add_row("time", f"{seconds:,.0f} s" if seconds < DAY else duration(seconds))
    console.print(table)
    console.print(f"checkpoint   {summary['checkpoint']}", soft_wrap=True)
    console.print(f"see the run  {python()} -m mlflow_server", soft_wrap=True)
    checkpoint = shlex.quote(summary["checkpoint"])
    generate = f"{python()} -m t6_lightning generate --ckpt_path {checkpoint} --prompt 'def main'"
    console.print(f"write text   {generate}", soft_wrap=True)


def _trend(fall: float) -> str:
    return "still falling" if fall > 0 else "no longer falling"


def print_figures(title: str, figures: dict[str, float]) -> None:
    """A plain table of metrics."""
    table = Table("metric", "value", title=title, title_justify="left")
    for name, value in figures.items():
        table.add_row(name, f"{value:.4f}")
    console.print(table)
