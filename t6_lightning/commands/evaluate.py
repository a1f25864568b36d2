"""evaluate: perplexity and bits per byte of a checkpoint on given files."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from rich.progress import track
from rich.table import Table

from datamodules.corpus import DocumentTable
from datamodules.errors import BadData
from datamodules.packing import ValidationWindows
from datamodules.text_files import file_source, find_files
from datamodules.token_cache import cached_shards
from datamodules.tokenizer import Tokenizer
from t6_lightning.commands.parser import Parser, check_files, show_json
from t6_lightning.console import console
from t6_lightning.errors import require
from t6_lightning.load import load_model
from t6_lightning.metrics import LanguageModelMetrics
from t6_lightning.model.t6 import T6
from t6_lightning.runs import resolve_checkpoint


def file_windows(
    patterns: list[str], text_field: str, txt_documents: str, tokenizer: Tokenizer, context: int
) -> tuple[list[str], ValidationWindows]:
    """Each file as a domain of its own, cut into windows that predict every token once.

    Raises:
        BadData: a file that is missing, damaged or empty.
    """
    files = find_files(patterns)
    names = [file.name if [f.name for f in files].count(file.name) == 1 else str(file) for file in files]
    sources = [
        file_source(file, text_field, None, name, txt_documents)  # pyright: ignore[reportArgumentType]
        for file, name in zip(files, names, strict=True)
    ]
    shards = cached_shards(sources, tokenizer)
    table = DocumentTable(shards, names)
    documents = {name: np.flatnonzero(table.domain == i) for i, name in enumerate(names)}
    for name, chosen in documents.items():
        if not len(chosen):
            raise BadData(f"files: {name} holds no document with text.")
    return names, ValidationWindows(table, documents, tokenizer, context)


@torch.inference_mode()
def evaluate_windows(
    model: T6, windows: ValidationWindows, names: list[str], batch_size: int, confine_to_documents: bool
) -> LanguageModelMetrics:
    """Token losses of all windows, in bf16 on a GPU and confined to documents as in training, summed per file."""
    device = model.embedding.weight.device
    metrics = LanguageModelMetrics(names).to(device)
    for first in track(range(0, len(windows), batch_size), "evaluating", transient=True):
        batch = {name: value.to(device) for name, value in windows.batch(first, batch_size).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            documents = batch["documents"] if confine_to_documents else None
            losses = model.token_losses(batch["tokens"], batch["targets"], documents)
        metrics.update(losses, batch["targets"], batch["n_bytes"], batch["domain"])
    return metrics


def main(arguments: list[str]) -> int:
    """Print perplexity and bits per byte of each file and of all."""
    parser = Parser("evaluate", __doc__ or "")
    parser.add_argument("--ckpt_path", required=True, help="checkpoint file, or `last`")
    parser.add_argument("--run", help="run that `last` refers to (default: the newest)")
    parser.add_argument(
        "--files", nargs="+", required=True, help="paths, globs or folders: .jsonl .txt .parquet"
    )
    parser.add_argument("--text_field", default="text", help="column that holds the text")
    parser.add_argument("--txt_documents", choices=["file", "line", "paragraph"], default="file")
    parser.add_argument("--context", type=int, help="tokens per window (default: the training context)")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_json()
    options = parser.parse_args(arguments[1:])
    check_files(options, "json")
    require(options.batch_size >= 1, "--batch_size", options.batch_size, "it must be at least 1")
    require(
        options.context is None or options.context >= 1, "--context", options.context, "it must be at least 1"
    )
    find_files(options.files)
    checkpoint = resolve_checkpoint(options.ckpt_path, options.run)
    trained = load_model(checkpoint)
    context = options.context or trained.model.config.context
    names, windows = file_windows(
        options.files, options.text_field, options.txt_documents, trained.tokenizer, context
    )
    metrics = evaluate_windows(
        trained.model, windows, names, options.batch_size, trained.confine_to_documents
    )
    figures = metrics.per_domain()
    if options.json:
        result: dict[str, Any] = {"checkpoint": str(checkpoint), "context": context, "files": figures}
        show_json(result, options.json)
        return 0
    table = Table(title=f"{checkpoint.name}, windows of {context} tokens", title_justify="left")
    table.add_column("file")
    for column in ("tokens", "bytes", "loss (nats)", "perplexity", "bits per byte"):
        table.add_column(column, justify="right")
    for name, row in figures.items():
        table.add_row(
            name,
            f"{row['tokens']:,.0f}",
            f"{row['bytes']:,.0f}",
            f"{row['loss']:.4f}",
            f"{row['perplexity']:.2f}",
            f"{row['bits_per_byte']:.4f}",
        )
    console.print(table)
    return 0
