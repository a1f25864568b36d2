"""What a run will cost, said before anything is spent."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

from t6_lightning.common.errors import BadInput
from t6_lightning.common.home import t6_home
from t6_lightning.model.config import T6Config

BYTES_PER_PARAMETER = 12  # float32 weight and AdamW's two moments: what a checkpoint holds


@dataclass(frozen=True)
class Plan:
    """Costs of a run.

    Attributes:
        n_parameters: of the model.
        steps, tokens_per_step, micro_batches: optimizer steps, tokens of each, micro-batches per rank of each.
        flops: model FLOPs of all training tokens.
        state_bytes: weights, gradients and optimizer in float32 on each device.
        disk_bytes: checkpoints at their most: those kept, and the one being written.
    """

    n_parameters: int
    steps: int
    tokens_per_step: int
    micro_batches: int
    flops: float
    state_bytes: int
    disk_bytes: int

    @classmethod
    def of(cls, net: T6Config, steps: int, tokens_per_step: int, micro_batches: int, keep: int) -> Plan:
        """The costs of training `net` for `steps` steps, keeping `keep` checkpoints."""
        parameters = net.n_parameters()
        return cls(
            n_parameters=parameters,
            steps=steps,
            tokens_per_step=tokens_per_step,
            micro_batches=micro_batches,
            flops=net.training_flops() * steps * tokens_per_step,
            state_bytes=parameters * (BYTES_PER_PARAMETER + 4),
            disk_bytes=disk_bytes(parameters, keep),
        )

    @property
    def tokens(self) -> int:
        """All training tokens."""
        return self.steps * self.tokens_per_step

    def least_seconds(self, matrix_rate: float) -> float:
        """Time of all FLOPs at `matrix_rate` FLOP/s: real training takes longer."""
        return self.flops / matrix_rate

    def sentence(self) -> str:
        """One line to print before a run."""
        return (
            f"{self.n_parameters:,} parameters, {self.steps:,} steps of {self.tokens_per_step:,} tokens "
            f"({self.micro_batches} micro-batches each), checkpoints need up to {self.disk_bytes / 1e6:,.0f} MB of disk"
        )


def disk_bytes(n_parameters: int, keep: int) -> int:
    """Bytes of checkpoints at their most: `keep` of them, and the one being written."""
    return n_parameters * BYTES_PER_PARAMETER * (keep + 1)


def check_disk(n_bytes: int) -> None:
    """Refuse a run whose checkpoints, of `n_bytes` in all, cannot fit.

    Raises:
        BadInput: T6_HOME cannot be written to, or less disk is free.
    """
    folder: Path = t6_home()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        raise BadInput(f"T6_HOME={str(t6_home())!r} is not possible: {folder} cannot be written to")
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise BadInput(
            f"checkpoints need {_in_words(n_bytes)} and {t6_home()} has {_in_words(free)} free: "
            "make room, set T6_HOME elsewhere, or lower checkpoints.keep"
        )


def _in_words(n_bytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes} bytes"


def measure_matrix_rate(device: torch.device, dtype: torch.dtype, width: int, tokens: int = 4096) -> float:
    """FLOP/s of a product (tokens, width) × (width, 4 · width) on this device, the best of 10; `width` at most 4096."""
    width = min(width, 4096)  # as fast as wider ones, and fits into any memory
    left = torch.randn(tokens, width, device=device, dtype=dtype)
    right = torch.randn(width, 4 * width, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(10):
        started = perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, perf_counter() - started)
    return 2 * tokens * width * 4 * width / best
