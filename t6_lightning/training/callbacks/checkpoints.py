"""When checkpoints are written, which are kept, and what a signal does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.model_helpers import is_overridden

from t6_lightning.checkpoint import content, files
from t6_lightning.checkpoint.files import step_of
from t6_lightning.checkpoint.io import VerifiedCheckpointIO
from t6_lightning.common.errors import BadInput, require
from t6_lightning.distributed import ranks
from t6_lightning.distributed.signals import Interrupted, signals
from t6_lightning.training.callbacks.cadence import stepped, validation_follows

WRITING_FAILED = 1000
"""Above every signal's number: what rank 0 tells the others when a checkpoint could not be written."""


class CutOff(Exception):
    """The training data cannot be reached any more; all ranks stop together, after a checkpoint.

    The message says what happened, on the ranks where it did.
    """


class Checkpoints(Checkpoint):
    """Writes a checkpoint every so many tokens, after the last step, and on SIGINT, SIGTERM, SIGHUP or
    SIGUSR1.

    Files are `step-00000100.ckpt` beside their checksum. With the plugin `VerifiedCheckpointIO` they are written
    while training goes on and are whole or not there. A signal ends training after the present step with
    `Interrupted`, once a checkpoint is written; with several ranks all of them stop after the same step.

    Args:
        every_tokens: training tokens between checkpoints.
        keep: newest checkpoints kept; older ones are removed once a newer one is safely written.
        folder: where they go, or what says so when training begins; None: `checkpoints` in the Trainer's
            default_root_dir.
    """

    def __init__(
        self,
        every_tokens: int = 1_000_000,
        keep: int = 2,
        folder: str | Path | Callable[[], Path] | None = None,
    ) -> None:
        require(every_tokens >= 1, "checkpoints.every_tokens", every_tokens, "it must be at least 1")
        require(keep >= 1, "checkpoints.keep", keep, "at least one checkpoint must stay")
        self.every_tokens = every_tokens
        self.keep = keep
        self._asked_folder = folder
        self._folder: Path | None = None
        self._io: VerifiedCheckpointIO | None = None
        self._tokens_per_step = 0
        self._samples: int | None = None
        """Samples trained up to the last step of this process; None before its first."""
        self._handlers: dict[int, Any] = {}
        self._ended = False
        self._interruption: Interrupted | None = None
        self._resumed_step: int | None = None
        """Of the checkpoint that was read; None when it has been compared."""

    def state_dict(self) -> dict[str, Any]:
        """Whether training ended with this checkpoint's step."""
        return {"ended": self._ended}

    @property
    def folder(self) -> Path:
        """Where the checkpoints are, from `setup` on."""
        assert self._folder is not None, "known from setup on"
        return self._folder

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        asked = self._asked_folder
        if asked is None:
            asked = Path(trainer.default_root_dir) / "checkpoints"
        self._folder = asked() if callable(asked) else Path(asked)
        io = trainer.strategy.checkpoint_io
        self._io = io if isinstance(io, VerifiedCheckpointIO) else None
        # Lightning's handlers would take the place of ours, and send to the other ranks from within a handler.
        trainer._signal_connector.register_signal_handlers = lambda: None

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse states of other types than their owners', before these take them over. Raises BadInput."""
        if trainer.state.fn != "fit":
            return
        callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        present: dict[str, Any] = {
            "callbacks": {callback.state_key: callback.state_dict() for callback in callbacks},
            "loops": {"fit_loop": trainer.fit_loop.state_dict()},
        }
        if reason := content.other_form(checkpoint, present, "it"):
            raise BadInput(f"the checkpoint cannot be gone on from: {reason}")
        self._resumed_step = checkpoint["global_step"]

    def _check_resumed(self, trainer: pl.Trainer) -> None:
        """Refuse what only its owners can tell, after they took it over. Raises BadInput."""
        saved, self._resumed_step = self._resumed_step, None
        if saved is None:
            return
        counted = trainer.global_step
        reason = None if counted == saved else f"it is of step {saved}, and its loops have counted {counted}"
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                reason = reason or content.other_form(group, optimizer.defaults, "its optimizer")
        if reason:
            raise BadInput(f"the checkpoint cannot be gone on from: {reason}")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning asks rank 0 for signals before every micro-batch, and waits for the device to do so; here all
        # ranks are asked, once a step.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        data = _streamed_data(trainer)
        if data is not None:
            data.hold_when_cut_off(lambda: signals.noted != 0)
        self._check_resumed(trainer)
        self._take_signals()
        if signum := ranks.signalled():
            raise Interrupted(signum)

    def _take_signals(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._handlers = signals.handle()

    def _let_go_of_signals(self) -> None:
        signals.restore(self._handlers)
        if self._handlers and signals.note not in self._handlers.values():
            signals.noted = 0  # of this training; nobody else asks
        self._handlers = {}

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._let_go_of_signals()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._interruption is not None:  # not before Lightning has logged the step that was saved
            interruption, self._interruption = self._interruption, None
            raise interruption

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        data = _streamed_data(trainer)
        if data is None:
            return
        loader = data.train_loader
        if not ranks.largest(loader.cut_off is not None):
            return
        # Weights are still those of the last step; the data goes back there.
        checkpoint = files.of_step(self.folder, trainer.global_step)
        if self._samples is not None and not ranks.first(lambda: files.is_whole(checkpoint)):
            loader.rewind(self._samples)
            self._settle(trainer)
            self._save(trainer, checkpoint)
            self._settle(trainer)
        raise CutOff(loader.cut_off or "")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._tokens_per_step:
            if not (isinstance(batch, dict) and "tokens" in batch):
                raise BadInput(
                    "Checkpoints counts tokens: it needs batches with `tokens`; use ModelCheckpoint"
                )
            micro_batch = batch["tokens"].numel() * trainer.world_size
            self._tokens_per_step = micro_batch * trainer.accumulate_grad_batches
        # A step that is about to be validated is saved after its validation, so that a restart loses neither.
        if stepped(trainer) and not validation_follows(trainer):
            _log_now(trainer, pl_module)
            self._after_step(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and stepped(trainer):
            self._after_step(trainer)

    def _after_step(self, trainer: pl.Trainer) -> None:
        step = trainer.global_step
        is_last = self._ended = _is_last_step(trainer)
        # A signal reaches ranks at different moments, or one of them alone: all stop after the same step.
        has_failed = self._io is not None and self._io.has_failed
        asked = int(ranks.largest(max(signals.noted, WRITING_FAILED * has_failed)))
        signum = asked if asked < WRITING_FAILED else 0
        if is_last or asked or self._is_regular(step):
            self._settle(trainer)  # raises where writing failed
            self._save(trainer, files.of_step(self.folder, step))
            if is_last or signum or self._io is None or not self._io.asynchronous:
                self._settle(trainer)
        if signum and not is_last:
            self._interruption = Interrupted(signum, step)
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        self._samples = getattr(getattr(data, "train_loader", None), "samples", None)

    def _save(self, trainer: pl.Trainer, checkpoint: Path) -> None:
        trainer.save_checkpoint(checkpoint)
        if self._io is None and trainer.is_global_zero:
            files.add_checksum(checkpoint)

    def _is_regular(self, step: int) -> bool:
        return step % max(1, round(self.every_tokens / self._tokens_per_step)) == 0

    def _settle(self, trainer: pl.Trainer) -> None:
        """Wait for the checkpoint that is being written, and remove what it makes superfluous.

        The newest regular one stays too: to go back to, it must be there with or without a signal.
        """
        if self._io is not None:
            self._io.finish()
        if not trainer.is_global_zero or not self.folder.is_dir():
            return
        regular = [file for file in files.in_order(self.folder) if self._is_regular(step_of(file))]
        files.prune(self.folder, self.keep, also=regular[-1:])

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._let_go_of_signals()  # teardown comes after what ended well alone
        if self._io is not None and not (isinstance(exception, Interrupted) and exception.at_once):
            self._io.wait()

    def last_regular(self, before: int) -> Path | None:
        """The newest good checkpoint of a step below `before` that no signal caused, or None.

        Those that a signal caused do not count: a run that was never interrupted has none.
        """
        if self._io is not None:
            self._io.wait()
        return files.newest_verified(
            self.folder,
            lambda file: step_of(file) < before and self._is_regular(step_of(file)),
        )


def _log_now(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Let Lightning hand the step's metrics to the loggers before a checkpoint of it is written, not after.

    A process that is killed between the two would go on after a step that was never logged. Modules that log in their
    own `on_train_batch_end`, which comes after all callbacks, are logged when Lightning does it.
    """
    if is_overridden("on_train_batch_end", module):
        return
    connector: Any = trainer._logger_connector
    connector.update_train_step_metrics()

    def once() -> None:
        del connector.update_train_step_metrics  # of this object: Lightning's own call has been made already

    connector.update_train_step_metrics = once


def _streamed_data(trainer: pl.Trainer) -> Any:
    """The data module of a streamed corpus, which may be cut off; None for any other data."""
    data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
    return data if getattr(data, "streamed", False) else None


def _is_last_step(trainer: pl.Trainer) -> bool:
    """Whether training ends with the optimizer step just taken."""
    loop = trainer.fit_loop
    if trainer.global_step == trainer.max_steps or (trainer.should_stop and loop._can_stop_early):
        return True
    epochs = trainer.current_epoch + 1
    ends_epoch = loop.epoch_loop._num_ready_batches_reached()
    return ends_epoch and trainer.max_epochs not in (None, -1) and epochs >= (trainer.max_epochs or 0)
