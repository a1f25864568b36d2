"""The progress line: step, loss, tokens/s and time left; a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from t6_lightning.common.console import console
from t6_lightning.training.callbacks.cadence import stepped
from t6_lightning.training.callbacks.monitor import Monitor
from t6_lightning.training.module import T6Module

SECONDS_BETWEEN_LINES = 15


class TrainingProgress(ProgressBar):
    """Takes Lightning's place for a progress bar; counts optimizer steps."""

    def __init__(self, monitor: Monitor) -> None:
        super().__init__()
        self.monitor = monitor
        self.bar: Progress | None = None
        self._last_line = 0.0

    def disable(self) -> None:
        """Lightning silences ranks other than 0 so."""
        console.quiet = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if console.is_terminal:
            self.bar = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
            )
            self.bar.start()
            self.task = self.bar.add_task("", total=trainer.max_steps, completed=trainer.global_step, text="")
        self._started = time.monotonic()
        self._first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if stepped(trainer, batch_idx):
            self._show(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.bar is not None:
            self.bar.update(self.task, text="validating …")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        assert isinstance(pl_module, T6Module)
        figures = pl_module.figures
        console.print(
            f"step {trainer.global_step}: validation loss {figures['val/loss']:.4f}, "
            f"perplexity {figures['val/perplexity']:.2f}, bits per byte {figures['val/bits_per_byte']:.4f}"
        )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _show(self, trainer: pl.Trainer) -> None:
        latest = self.monitor.latest
        if not latest:
            return
        text = f"loss {latest['train/loss']:.4f}  {latest['perf/tokens_per_second']:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=trainer.global_step, text=text)
            return
        now = time.monotonic()
        if now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            done = trainer.global_step - self._first_step
            left = (now - self._started) / done * (trainer.max_steps - trainer.global_step)
            console.print(f"step {trainer.global_step}/{trainer.max_steps}: {text}, {duration(left)} left")


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
