"""Speed, memory and data of training, as metrics."""

from __future__ import annotations

import resource
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.throughput import get_available_flops

from datamodules.loaders import TrainingLoader
from t6_lightning.distributed import ranks
from t6_lightning.training.callbacks.cadence import stepped
from t6_lightning.training.metrics import log_at_step, logs_step
from t6_lightning.training.module import T6Module


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Monitor(pl.Callback):
    """Logs `perf/*` and `data/*` whenever the Trainer logs (`log_every_n_steps`).

    Speed counts training alone: validation, checkpoints and what comes before the first step are left out.
    `perf/data_share` is the share of that time in which this rank waited for the loader's next micro-batch; it and
    `data/epochs/*` need a loader of `datamodules`. Batches must hold `tokens` (B, T).
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._started: float | None = None
        self._waited = self._waited_before = 0.0
        self._tokens = self._tokens_of_step = 0
        self._tokens_of_run: int | None = 0

    def state_dict(self) -> dict[str, Any]:
        """Tokens of the whole run so far."""
        return {"tokens": self._tokens_of_run}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._tokens_of_run = state_dict.get("tokens")  # version 0.1.0 did not count them

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tokens = self._tokens_of_step = 0
        if self._tokens_of_run is None:
            data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
            self._tokens_of_run = data.train_loader.samples * data.context

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._started is None:
            self._start_clock(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        tokens = batch["tokens"].numel() * trainer.world_size
        self._tokens += tokens
        self._tokens_of_step += tokens
        if not stepped(trainer):
            return
        assert self._tokens_of_run is not None
        # Whole steps only: a checkpoint may be written for the last one while the next has begun.
        self._tokens_of_run += self._tokens_of_step
        self._tokens_of_step = 0
        if logs_step(trainer):
            self._log(trainer, pl_module)

    def _log(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._pause_clock(trainer, module)
        speed = self._tokens / self._seconds
        metrics: dict[str, float] = {
            "perf/tokens_per_second": speed,
            "perf/peak_memory_bytes": ranks.largest(peak_memory_bytes(module.device)),
            "data/tokens": float(self._tokens_of_run or 0),
        }
        loader = _our_loader(trainer)
        if loader is not None:
            metrics["perf/data_share"] = self._waited / self._seconds
            for name, epochs in loader.data.epochs().items():
                metrics[f"data/epochs/{name}"] = ranks.largest(epochs)
        if isinstance(module, T6Module):
            half = trainer.precision in ("bf16-mixed", "bf16-true")
            peak = get_available_flops(module.device, torch.bfloat16 if half else torch.float32)
            if peak:
                metrics["perf/mfu"] = speed * module.config.training_flops() / (peak * trainer.world_size)
        log_at_step(module, metrics)
        self._seconds, self._waited, self._tokens = 0.0, 0.0, 0
        # Not at the next batch's start: it is waited for, too.
        self._start_clock(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._pause_clock(trainer, pl_module)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        self._pause_clock(trainer, pl_module)

    def _start_clock(self, trainer: pl.Trainer) -> None:
        self._started = time.perf_counter()
        self._waited_before = _seconds_waited(trainer)

    def _pause_clock(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Stop counting until the next training batch starts."""
        if self._started is None:
            return
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        self._seconds += time.perf_counter() - self._started
        self._waited += _seconds_waited(trainer) - self._waited_before
        self._started = None


def _our_loader(trainer: pl.Trainer) -> TrainingLoader | None:
    """The training loader where it is one of `datamodules`, which knows its epochs and waiting time; else None."""
    loader = trainer.train_dataloader
    return loader if isinstance(loader, TrainingLoader) else None


def _seconds_waited(trainer: pl.Trainer) -> float:
    loader = _our_loader(trainer)
    return 0.0 if loader is None else loader.seconds_waited
