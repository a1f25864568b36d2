"""Optimizer and learning-rate schedules as plain values."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from math import cos, pi
from typing import Any, Literal

import torch
from torch import nn

from t6_lightning.common.errors import require
from t6_lightning.distributed import ranks


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW (Loshchilov & Hutter, 2019), fused where the device has it.

    Attributes:
        lr: peak learning rate, which the schedule multiplies.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, times the current learning rate.
        decay: "all" decays every parameter, as the reference does; "matrices" spares norms and the embedding.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay: Literal["all", "matrices"] = "all"

    def __post_init__(self) -> None:
        require(self.lr > 0, "optimizer.lr", self.lr, "it must be above 0")
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "it must be 0 or above")
        require(self.decay in ("all", "matrices"), "optimizer.decay", self.decay, "choose all or matrices")
        require(all(0 <= beta < 1 for beta in self.betas), "optimizer.betas", self.betas, "each is in [0, 1)")

    def build(self, model: nn.Module) -> torch.optim.AdamW:
        """The optimizer over all parameters of `model`, in a decayed and an undecayed group."""
        decayed, spared = [], []
        embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        for parameter in model.parameters():
            is_matrix = parameter.ndim >= 2 and id(parameter) not in embeddings
            (decayed if self.decay == "all" or is_matrix else spared).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": spared, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        optimizer = AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)
        optimizer.register_load_state_dict_post_hook(_copy_moments)
        return optimizer


class AdamW(torch.optim.AdamW):
    """PyTorch's, which updates a rank's own part of spread parameters as plain tensors.

    Elements do not mix, so that the numbers are the same; spread tensors only take the host longer.
    """

    def _init_group(self, group: dict[str, Any], *lists: Any) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = [ranks.local(tensor) for tensor in tensors]
        return has_complex


def _copy_moments(optimizer: torch.optim.Optimizer) -> None:
    """Take moments on the CPU out of the memory that a checkpoint's file is mapped to.

    The first step would write to it, and the system copy it page by page: several times slower.
    """
    for moments in optimizer.state.values():
        for name, value in moments.items():
            if value.device.type == "cpu":
                moments[name] = value.clone()


class Schedule(abc.ABC):
    """Learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

    @abc.abstractmethod
    def factor(self, step: int, max_steps: int) -> float:
        """What the peak learning rate is multiplied by at optimizer step 0, 1, ..., max_steps - 1."""


def _check_warmup(warmup_steps: int, min_factor: float) -> None:
    require(warmup_steps >= 0, "schedule.warmup_steps", warmup_steps, "it must be 0 or above")
    require(0 <= min_factor <= 1, "schedule.min_factor", min_factor, "a share of the peak, 0 to 1")


@dataclass(frozen=True)
class Cosine(Schedule):
    """Linear warm-up, then half a cosine down to the last step (the paper's schedule).

    Attributes:
        warmup_steps: optimizer steps of linear warm-up.
        min_factor: the last learning rate over the peak.
    """

    warmup_steps: int = 100
    min_factor: float = 0.1

    def __post_init__(self) -> None:
        _check_warmup(self.warmup_steps, self.min_factor)

    def factor(self, step: int, max_steps: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        progress = min(1.0, (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps))
        return self.min_factor + (1 - self.min_factor) * 0.5 * (1 + cos(pi * progress))


@dataclass(frozen=True)
class WarmupStableDecay(Schedule):
    """Linear warm-up, a constant stretch, then a linear decay over the last steps (Hu et al., 2024).

    Attributes:
        warmup_steps: optimizer steps of linear warm-up.
        decay_steps: optimizer steps of the linear decay at the end.
        min_factor: the last learning rate over the peak.
    """

    warmup_steps: int = 100
    decay_steps: int = 100
    min_factor: float = 0.0

    def __post_init__(self) -> None:
        _check_warmup(self.warmup_steps, self.min_factor)
        require(self.decay_steps >= 0, "schedule.decay_steps", self.decay_steps, "it must be 0 or above")

    def factor(self, step: int, max_steps: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        left = (max_steps - step) / max(1, self.decay_steps)
        return self.min_factor + (1 - self.min_factor) * min(1.0, max(0.0, left))
