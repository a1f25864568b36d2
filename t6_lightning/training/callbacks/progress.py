"""The progress line: step, loss, tokens/s and time left; a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from math import isfinite
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from t6_lightning.common.console import console
from t6_lightning.training.callbacks.cadence import stepped

SECONDS_BETWEEN_LINES = 15

SHOWN = {"train/loss": "loss {:.4f}", "perf/tokens_per_second": "{:,.0f} tokens/s"}
VALIDATED = {
    "val/loss": "validation loss {:.4f}",
    "val/perplexity": "perplexity {:.2f}",
    "val/bits_per_byte": "bits per byte {:.4f}",
}


class TrainingProgress(ProgressBar):
    """Takes the place of Lightning's progress bar; counts optimizer steps, and shows what is logged of them."""

    def __init__(self) -> None:
        super().__init__()
        self.bar: Progress | None = None
        self._last_line = 0.0
        self._is_silent = False

    def disable(self) -> None:
        """Lightning silences ranks other than 0 so, and every rank while it looks for a learning rate."""
        self._is_silent = True

    def enable(self) -> None:
        self._is_silent = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        total = trainer.estimated_stepping_batches
        self._total = None if total == float("inf") else int(total)
        if console.is_terminal and not self._is_silent:
            steps = "step {task.completed:.0f}" + ("/{task.total:.0f}" if self._total else "")
            self.bar = Progress(
                TextColumn(steps),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
            )
            self.bar.start()
            self.task = self.bar.add_task("", total=self._total, completed=trainer.global_step, text="")
        self._started = time.monotonic()
        self._first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if stepped(trainer) and not self._is_silent:
            self._show(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.bar is not None:
            self.bar.update(self.task, text="validating …")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or self._is_silent:
            return
        if figures := _said(VALIDATED, trainer):
            console.print(f"step {trainer.global_step}: {', '.join(figures)}")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _show(self, trainer: pl.Trainer) -> None:
        if self.bar is not None:
            text = "  ".join(_said(SHOWN, trainer))
            self.bar.update(self.task, completed=trainer.global_step, text=text)
            return
        now = time.monotonic()
        if now - self._last_line >= SECONDS_BETWEEN_LINES and (said := _said(SHOWN, trainer)):
            self._last_line = now
            place = f"step {trainer.global_step}"
            if self._total:
                done = trainer.global_step - self._first_step
                left = (now - self._started) / done * (self._total - trainer.global_step)
                place, said = f"{place}/{self._total}", [*said[:-1], f"{said[-1]}, {duration(left)} left"]
            console.print(f"{place}: {'  '.join(said)}")


def _said(formats: dict[str, str], trainer: pl.Trainer) -> list[str]:
    """Those of the metrics that are there, as text. Waits for the device where one of them is still on it."""
    found = trainer.callback_metrics
    return [text.format(float(found[name])) for name, text in formats.items() if name in found]


DAY = 24 * 3600
YEAR = 365.25 * DAY


def duration(seconds: float) -> str:
    """2:03, 1:02:03, 3 days or 74 years."""
    if not isfinite(seconds):
        return "without end"
    for unit, length, least in (("years", YEAR, 2), ("days", DAY, 1)):
        if seconds >= least * length:
            number = round(seconds / length)
            return f"{number:,} {unit if number > 1 else unit[:-1]}"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
