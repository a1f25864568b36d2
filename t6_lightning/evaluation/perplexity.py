"""Perplexity and bits per byte of a model on files."""

from __future__ import annotations

import numpy as np
import torch
from rich.progress import track

from datamodules.corpus import DocumentTable, lost_share
from datamodules.packing import ValidationWindows
from datamodules.text_files import file_source, find_files
from datamodules.token_cache import cached_shards
from datamodules.tokenizer import Tokenizer
from t6_lightning.common.errors import BadInput
from t6_lightning.model.t6 import T6
from t6_lightning.training.metrics import LanguageModelMetrics


def file_windows(
    patterns: list[str], text_field: str, txt_documents: str, tokenizer: Tokenizer, context: int
) -> tuple[list[str], ValidationWindows]:
    """Each file as a domain of its own, cut into windows that predict every token once.

    Raises:
        BadInput: a file that is missing, damaged or empty.
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
            raise BadInput(f"files: {name} holds no document with text.")
    lost_share(table, np.arange(len(table)))  # it warns
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
