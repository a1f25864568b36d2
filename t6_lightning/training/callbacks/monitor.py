"""Training metrics: loss, speed, gradient norm, learning rate, memory; and the stop at a loss that is no number."""

from __future__ import annotations

import resource
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.throughput import get_available_flops

from t6_lightning.distributed import ranks
from t6_lightning.runs.tracking import MLflowTracking
from t6_lightning.training.callbacks.cadence import Cadence, stepped
from t6_lightning.training.callbacks.spikes import Diverged, SpikeGuard
from t6_lightning.training.module import T6Module


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _seconds_waited(trainer: pl.Trainer) -> float:
    return trainer.datamodule.seconds_waited  # pyright: ignore[reportAttributeAccessIssue]


class Monitor(pl.Callback):
    """Logs `train/loss`, `perf/*`, `optim/*` and `data/*` every `log_every_steps`, `val/*` at each validation.

    Speed counts training alone: validation, checkpoints and what comes before the first step are left out.
    `perf/data_share` is the share of that time in which this rank waited for the loader's next micro-batch.
    """

    def __init__(self, cadence: Cadence, guard: SpikeGuard, tracking: MLflowTracking) -> None:
        self.cadence = cadence
        self.guard = guard
        self.tracking = tracking
        self.latest: dict[str, float] = {}
        self.sums = torch.zeros(2, dtype=torch.float64)
        """Nats and counted tokens, over all ranks, since the last logged step."""
        self._seconds = 0.0
        self._started: float | None = None
        self._waited = self._waited_before = 0.0

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The losses since the last logged step: a checkpoint may lie between two logged steps."""
        return {"sums": self.sums.cpu()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.sums = state_dict["sums"].clone()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.sums = self.sums.to(pl_module.device)
        self._first_bad_step = torch.full((), -1, device=pl_module.device)
        self._tokens = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._started is None:
            self._start_clock(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, T6Module)
        self._tokens += batch["tokens"].numel() * trainer.world_size
        if not stepped(trainer, batch_idx):
            return
        step = trainer.global_step
        if not self.guard.refused:
            self.sums = self.sums + pl_module.step_sums
            finite = pl_module.step_loss.isfinite() & pl_module.grad_norm.isfinite()
            # Noted on the device, read only where the device is waited for anyway.
            unseen = self._first_bad_step < 0
            self._first_bad_step = torch.where(unseen & ~finite, step, self._first_bad_step)
        if step % self.cadence.log_every_steps == 0 or step in (1, trainer.max_steps):
            self._log(trainer, pl_module)

    def _log(self, trainer: pl.Trainer, module: T6Module) -> None:
        self.check_finite()
        nats, counted = self.sums.tolist()
        self.sums = torch.zeros_like(self.sums)
        self._pause_clock(module)
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        factor = module.schedule.factor(trainer.global_step - 1, trainer.max_steps)
        speed = self._tokens / self._seconds
        self.latest = {
            "train/loss": nats / counted if counted else float("nan"),  # nan: every step was refused
            "perf/tokens_per_second": speed,
            "perf/data_share": self._waited / self._seconds,
            "perf/peak_memory_bytes": ranks.largest(peak_memory_bytes(module.device)),
            "optim/lr": module.optimizer_config.lr * factor,
            "optim/grad_norm": float(module.grad_norm),
            "data/tokens": data.samples * data.context,
        }
        for name, epochs in data.epochs().items():
            self.latest[f"data/epochs/{name}"] = ranks.largest(epochs)
        self.latest |= self.guard.figures()
        half = trainer.precision in ("bf16-mixed", "bf16-true")
        peak = get_available_flops(module.device, torch.bfloat16 if half else torch.float32)
        if peak:
            self.latest["perf/mfu"] = speed * module.config.training_flops() / (peak * trainer.world_size)
        self.tracking.log_metrics(self.latest, step=trainer.global_step)
        self._seconds, self._waited, self._tokens = 0.0, 0.0, 0
        # Not at the next batch's start: it is waited for, too.
        self._start_clock(trainer)

    def check_finite(self) -> None:
        """Stop at a loss or gradient that was not finite.

        Raises:
            Diverged: with the first such step.
        """
        bad = int(self._first_bad_step)
        if bad >= 0:
            raise Diverged(f"the loss or gradient is not finite at step {bad}")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._pause_clock(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            assert isinstance(pl_module, T6Module)
            self.tracking.log_metrics(pl_module.figures, step=trainer.global_step)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        self.check_finite()
        assert isinstance(pl_module, T6Module)
        if not pl_module.weights_are_finite():  # a checkpoint of broken weights is worse than none
            raise Diverged(f"the weights overflowed by step {trainer.global_step}")
        self._pause_clock(pl_module)

    def _start_clock(self, trainer: pl.Trainer) -> None:
        self._started = time.perf_counter()
        self._waited_before = _seconds_waited(trainer)

    def _pause_clock(self, module: pl.LightningModule) -> None:
        """Stop counting until the next training batch starts."""
        if self._started is None:
            return
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        self._seconds += time.perf_counter() - self._started
        self._waited += _seconds_waited(module.trainer) - self._waited_before
        self._started = None
