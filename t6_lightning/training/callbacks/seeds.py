"""Randomness as a pure function of (seed, step, micro-batch, rank): nothing to save, nothing to lose."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch


class StepSeeds(pl.Callback):
    """Seeds Python, NumPy and torch before every micro-batch.

    A run killed anywhere therefore draws the same dropout masks again, whatever validation, sampling or
    another callback drew in between, and no generator state has to travel in checkpoints.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        micro_batch = batch_idx % trainer.accumulate_grad_batches
        key = [self.seed, trainer.global_step, micro_batch, trainer.global_rank]
        words = np.random.SeedSequence(key).generate_state(3)
        torch.manual_seed(int(words[0]) << 32 | int(words[1]))
        np.random.seed(words[2])
        random.seed(int(words[2]))
