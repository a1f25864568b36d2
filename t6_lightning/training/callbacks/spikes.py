"""What a loss spike or a non-finite gradient does: stop the run, skip the step, or go back to good weights."""

# No postponed annotations: the command line reads them.
import math
from collections import deque
from typing import Any, Literal

import lightning.pytorch as pl
import torch

from t6_lightning.common.console import console
from t6_lightning.common.errors import BadInput, require
from t6_lightning.distributed import fsdp2, ranks
from t6_lightning.training.callbacks.cadence import stepped
from t6_lightning.training.callbacks.checkpoints import Checkpoints
from t6_lightning.training.metrics import log_at_step, logs_step
from t6_lightning.training.module import T6Module

ACTIONS = ("stop", "skip", "rollback")


class Diverged(RuntimeError):
    """The loss or the gradient stopped being usable."""


class SpikeGuard(pl.Callback):
    """Refuses steps whose loss or gradient is not finite, or whose loss stands out above those before.

    Trains a T6Module, which asks it before each step (`StepJudge`). No checkpoint of weights that are not finite is
    written.

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
        self._first_bad_step = torch.tensor(-1)
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

    @property
    def skipped_steps(self) -> list[int]:
        """Optimizer steps that changed nothing, counted from 1."""
        return list(self._skipped)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(pl_module, T6Module):
            raise BadInput(
                f"SpikeGuard is not possible with {type(pl_module).__name__}: it guards a T6Module"
            )
        if self.action == "rollback":
            _checkpoints(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first_bad_step = self._first_bad_step.to(pl_module.device)

    def accepts_step(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> bool:
        """Loss and norm are those of all ranks, so that all ranks decide alike."""
        if self.action == "stop":
            return True
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
        if not stepped(trainer):
            return
        assert isinstance(pl_module, T6Module)
        if not self.refused:
            finite = pl_module.step_loss.isfinite() & pl_module.grad_norm.isfinite()
            # Noted on the device, read only where the device is waited for anyway.
            unseen = self._first_bad_step < 0
            self._first_bad_step = torch.where(unseen & ~finite, trainer.global_step, self._first_bad_step)
        if self.action != "stop":
            self._judge_weights(trainer, pl_module)
        if logs_step(trainer):
            self.check_finite()
            if self.action != "stop":
                figures = {"spikes/skipped_steps": len(self._skipped), "spikes/rollbacks": self._rollbacks}
                log_at_step(pl_module, figures)

    def check_finite(self) -> None:
        """Stop at a loss or gradient that was not finite. Waits for the device.

        Raises:
            Diverged: with the first such step.
        """
        bad = int(self._first_bad_step)
        if bad >= 0:
            raise Diverged(f"the loss or gradient is not finite at step {bad}")

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        assert isinstance(pl_module, T6Module)
        self.check_finite()
        if not pl_module.weights_are_finite():  # a checkpoint of broken weights is worse than none
            raise Diverged(f"the weights overflowed by step {trainer.global_step}")

    def _judge_weights(self, trainer: pl.Trainer, module: T6Module) -> None:
        """Note a step that was refused or made the weights overflow, and go back to a checkpoint where asked."""
        # A usual loss says nothing of the weights that the step left, and those must not reach a checkpoint.
        overflowed = self.action == "rollback" and not self.refused and not module.weights_are_finite()
        self.refused |= overflowed
        if not self.refused:
            self._in_a_row = 0
            return
        step = trainer.global_step
        self._skipped.append(step)
        self._in_a_row += 1
        if self._in_a_row >= self.most_in_a_row:
            raise Diverged(f"{self._in_a_row} steps in a row were refused, the last of them step {step}")
        figures = f"loss {float(module.step_loss):.4g}, gradient norm {float(module.grad_norm):.4g}"
        is_undone = "made the weights overflow" if overflowed else "was skipped"
        console.print(f"step {step} {is_undone}: {figures}")
        if self.action == "rollback":
            checkpoint = ranks.first(lambda: _checkpoints(trainer).last_regular(step))
            if checkpoint is not None:
                fsdp2.restore_weights(trainer, checkpoint)
                self._rollbacks += 1
                console.print(f"step {step}: weights and optimizer are those of {checkpoint.name} again")
            elif overflowed:
                raise Diverged(
                    f"step {step} made the weights overflow, and there is no checkpoint to go back to"
                )


def _checkpoints(trainer: pl.Trainer) -> Checkpoints:
    """The callback whose checkpoints are gone back to.

    Raises:
        BadInput: the Trainer has none.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, Checkpoints):
            return callback
    raise BadInput(
        "spikes.action='rollback' is not possible: it goes back to what the callback Checkpoints saves"
    )
