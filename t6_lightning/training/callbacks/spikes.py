"""What a loss spike or a gradient that is no number does: stop the run, skip the step, or go back to good weights."""

# No postponed annotations: the command line reads them.
import math
from collections import deque
from typing import Any, Literal

import lightning.pytorch as pl
import torch

from t6_lightning.common.console import console
from t6_lightning.common.errors import require
from t6_lightning.distributed import fsdp2, ranks
from t6_lightning.training.callbacks.cadence import stepped
from t6_lightning.training.callbacks.checkpoints import Checkpoints
from t6_lightning.training.module import T6Module

ACTIONS = ("stop", "skip", "rollback")


class Diverged(RuntimeError):
    """The loss or the gradient stopped being usable."""


class SpikeGuard(pl.Callback):
    """Refuses steps whose loss or gradient is not finite, or whose loss stands out above those before.

    The step count and the data go on in every case: the text of a refused step is not read again. With `skip` and
    `rollback` every step waits for the device once, to read its loss.

    Args:
        action: "stop" ends the run at a loss or gradient that is not finite; "skip" leaves weights and optimizer
            as they were before the step; "rollback" puts back those of the last regular checkpoint too, also after
            a step that made the weights themselves overflow.
        sigmas: a loss this many standard deviations above the mean of the last accepted ones is a spike; null
            looks at finiteness alone.
        window: accepted losses that mean and deviation are taken of; before there are as many, nothing is a spike.
        most_in_a_row: this many refused steps without an accepted one between them end the run.
    """

    checkpoints: Checkpoints

    def __init__(
        self,
        action: Literal["stop", "skip", "rollback"] = "stop",
        sigmas: float | None = 6.0,
        window: int = 100,
        most_in_a_row: int = 10,
    ) -> None:
        require(action in ACTIONS, "spikes.action", action, f"choose one of {', '.join(ACTIONS)}")
        require(sigmas is None or sigmas > 0, "spikes.sigmas", sigmas, "it must be above 0, or null")
        require(window >= 2, "spikes.window", window, "a deviation needs at least 2 losses")
        require(most_in_a_row >= 1, "spikes.most_in_a_row", most_in_a_row, "it must be at least 1")
        self.action = action
        self.sigmas = sigmas
        self.window = window
        self.most_in_a_row = most_in_a_row
        self.refused = False
        """Whether the last step was refused."""
        self._losses: deque[float] = deque(maxlen=window)
        self._skipped: list[int] = []
        self._rollbacks = 0
        self._in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "losses": list(self._losses),
            "skipped": list(self._skipped),
            "rollbacks": self._rollbacks,
            "in_a_row": self._in_a_row,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._losses = deque(state_dict["losses"], maxlen=self.window)
        self._skipped = list(state_dict["skipped"])
        self._rollbacks = state_dict["rollbacks"]
        self._in_a_row = state_dict["in_a_row"]

    def figures(self) -> dict[str, float]:
        """Metrics: how many steps were refused so far, and how often weights were put back."""
        if self.action == "stop":
            return {}
        return {"spikes/skipped_steps": len(self._skipped), "spikes/rollbacks": self._rollbacks}

    @property
    def skipped_steps(self) -> list[int]:
        """Optimizer steps that changed nothing, counted from 1."""
        return list(self._skipped)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, T6Module)
        pl_module.accepts_step = None if self.action == "stop" else self._accepts

    def _accepts(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> bool:
        """Loss and norm are those of all ranks, so that all ranks decide alike."""
        value, norm = float(loss), float(grad_norm)
        self.refused = not (math.isfinite(value) and math.isfinite(norm)) or self._is_spike(value)
        if not self.refused:
            self._losses.append(value)
        return not self.refused

    def _is_spike(self, loss: float) -> bool:
        if self.sigmas is None or len(self._losses) < self.window:
            return False
        mean = math.fsum(self._losses) / self.window
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in self._losses) / (self.window - 1))
        return loss > mean + self.sigmas * deviation

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not stepped(trainer, batch_idx):
            return
        assert isinstance(pl_module, T6Module)
        # A usual loss says nothing of the weights that the step left, and those must not reach a checkpoint.
        overflowed = self.action == "rollback" and not self.refused and not pl_module.weights_are_finite()
        self.refused |= overflowed
        if not self.refused:
            self._in_a_row = 0
            return
        step = trainer.global_step
        self._skipped.append(step)
        self._in_a_row += 1
        if self._in_a_row >= self.most_in_a_row:
            raise Diverged(f"{self._in_a_row} steps in a row were refused, the last of them step {step}")
        figures = f"loss {float(pl_module.step_loss):.4g}, gradient norm {float(pl_module.grad_norm):.4g}"
        is_undone = "made the weights overflow" if overflowed else "was skipped"
        console.print(f"step {step} {is_undone}: {figures}")
        if self.action == "rollback":
            checkpoint = ranks.first(lambda: self.checkpoints.last_regular(step))
            if checkpoint is not None:
                fsdp2.restore_weights(trainer, checkpoint)
                self._rollbacks += 1
                console.print(f"step {step}: weights and optimizer are those of {checkpoint.name} again")
            elif overflowed:
                raise Diverged(
                    f"step {step} made the weights overflow, and there is no checkpoint to go back to"
                )
