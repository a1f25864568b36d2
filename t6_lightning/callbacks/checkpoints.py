"""When checkpoints are written, which are kept, and what a signal does."""

from __future__ import annotations

import signal
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import CheckpointIO

from t6_lightning import checkpoint_files
from t6_lightning.callbacks.cadence import Cadence, stepped
from t6_lightning.errors import require
from t6_lightning.runs import RunFolder


class Interrupted(Exception):
    """A signal stopped the run after a checkpoint was written."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class VerifiedCheckpointIO(CheckpointIO):
    """Lightning's way to `checkpoint_files`: whole and checksummed, or not there."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        checkpoint_files.save(checkpoint, path)

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return checkpoint_files.load(path)

    def remove_checkpoint(self, path: Any) -> None:
        path.unlink(missing_ok=True)


class Checkpoints(Checkpoint):
    """Writes a checkpoint every so many tokens, after the last step, and on SIGTERM, SIGINT or SIGUSR1.

    Args:
        every_tokens: training tokens between checkpoints.
        keep: newest checkpoints kept; older ones are removed once a newer one is safely written.
    """

    run_folder: RunFolder
    cadence: Cadence

    def __init__(self, every_tokens: int = 1_000_000, keep: int = 2) -> None:
        require(every_tokens >= 1, "checkpoints.every_tokens", every_tokens, "it must be at least 1")
        require(keep >= 1, "checkpoints.keep", keep, "at least one checkpoint must stay")
        self.every_tokens = every_tokens
        self.keep = keep
        self._signum: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # After Lightning's own handlers, which would end the run without a checkpoint.
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._previous[signum] = signal.signal(signum, self._note_signal)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        while self._previous:
            signum, handler = self._previous.popitem()
            signal.signal(signum, handler)

    def _note_signal(self, signum: int, frame: Any) -> None:
        if self._signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: leave at once, the last checkpoint stands
        self._signum = signum

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # A step that is about to be validated is saved after its validation, so that a restart loses neither.
        if stepped(trainer, batch_idx) and not self.cadence.validation_due(trainer):
            self._after_step(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._after_step(trainer)

    def _after_step(self, trainer: pl.Trainer) -> None:
        step = trainer.global_step
        is_last = step == trainer.max_steps
        if is_last or self._signum is not None or step % self.cadence.steps(self.every_tokens) == 0:
            trainer.save_checkpoint(self.run_folder.checkpoints / f"step-{step:08d}.ckpt")
            if trainer.is_global_zero:
                checkpoint_files.prune(self.run_folder.checkpoints, self.keep)
        if self._signum is not None and not is_last:
            raise Interrupted(self._signum)
