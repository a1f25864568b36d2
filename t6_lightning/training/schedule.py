"""Learning-rate schedules as plain values, and the scheduler that follows one."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from t6_lightning.common.errors import require


class Schedule(abc.ABC):
    """Learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

    @abc.abstractmethod
    def factor(self, step: int, max_steps: float) -> float:
        """What the peak learning rate is multiplied by at optimizer step 0, 1, ..., max_steps - 1.

        Args:
            step: optimizer steps taken so far.
            max_steps: optimizer steps of the whole run; infinite where nothing limits it.
        """


def _check_warmup(warmup_steps: int, min_factor: float) -> None:
    require(warmup_steps >= 0, "schedule.warmup_steps", warmup_steps, "it must be 0 or above")
    require(0 <= min_factor <= 1, "schedule.min_factor", min_factor, "a share of the peak, 0 to 1")


@dataclass(frozen=True)
class Cosine(Schedule):
    """Linear warm-up, then half a cosine down to the last step (the paper's schedule).

    Attributes:
        warmup_steps: optimizer steps of linear warm-up.
        min_factor: the last learning rate over the peak.
        warmup_from_zero: step t = 0, 1, ... of n warm-up steps takes t/n of the peak, as the released trainer does,
            whose first step so changes no weight; otherwise (t+1)/(n+1).
    """

    warmup_steps: int = 100
    min_factor: float = 0.1
    warmup_from_zero: bool = False

    def __post_init__(self) -> None:
        _check_warmup(self.warmup_steps, self.min_factor)

    def factor(self, step: int, max_steps: float) -> float:
        if step < self.warmup_steps:
            first = 0 if self.warmup_from_zero else 1
            return (step + first) / (self.warmup_steps + first)
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

    def factor(self, step: int, max_steps: float) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        left = (max_steps - step) / max(1, self.decay_steps)
        return self.min_factor + (1 - self.min_factor) * min(1.0, max(0.0, left))


class FollowSchedule(LRScheduler):
    """Learning rate = peak · factor, of the optimizer step and the present settings alone.

    Its state is empty: a checkpoint brings neither an old peak nor an old horizon back, and one without a
    scheduler (of version 0.1.0) needs none. After a restore, `refresh` sets the rates.

    Args:
        optimizer: what the rates are for.
        schedule: the factor.
        peak: the peak learning rate, asked at every step.
        step: optimizer steps taken so far.
        total: optimizer steps of the run; None while that is not known yet, when rates stay as they are.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        peak: Callable[[], float],
        step: Callable[[], int],
        total: Callable[[], float | None],
    ) -> None:
        self.schedule, self.peak, self.taken, self.total = schedule, peak, step, total
        super().__init__(optimizer)

    def get_lr(self) -> list[float | torch.Tensor]:
        total = self.total()
        if total is None:
            return [group["lr"] for group in self.optimizer.param_groups]
        rate = self.peak() * self.schedule.factor(self.taken(), total)
        return [rate for _ in self.optimizer.param_groups]

    def refresh(self) -> None:
        """Set the rates of the next optimizer step."""
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.refresh()
