"""When checkpoints are written, which are kept, and what a signal does."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import CheckpointIO

from t6_lightning.checkpoint import files as checkpoint_files
from t6_lightning.checkpoint.files import CheckpointError, step_of
from t6_lightning.common.errors import require
from t6_lightning.distributed import ranks
from t6_lightning.distributed.signals import Interrupted, signals
from t6_lightning.runs.folder import RunFolder
from t6_lightning.training.callbacks.cadence import Cadence, stepped


class CutOff(Exception):
    """The training data cannot be reached any more; all ranks stop together, after a checkpoint.

    What happened, on the ranks where it did.
    """


class Snapshot:
    """A copy of a state on the CPU that training does not change, in memory that the next copy uses again.

    New memory costs several times the copying: the system hands it out page by page.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], torch.Tensor] = {}
        self._from_gpu = False

    def take(self, state: dict[str, Any]) -> dict[str, Any]:
        """Copy containers and tensors; what an earlier call returned is written over."""
        copied = self._copy(state, ())
        if self._from_gpu:
            torch.cuda.synchronize()
        return copied

    def _copy(self, value: Any, key: tuple[Any, ...]) -> Any:
        if isinstance(value, torch.Tensor):
            buffer = self._buffers.get(key)
            if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                self._buffers[key] = buffer
            self._from_gpu |= value.is_cuda
            return buffer.copy_(value.detach(), non_blocking=value.is_cuda)
        if isinstance(value, dict):
            return {name: self._copy(element, (*key, name)) for name, element in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._copy(element, (*key, i)) for i, element in enumerate(value))
        return value


class VerifiedCheckpointIO(CheckpointIO):
    """Lightning's way to `checkpoint_files`: whole and checksummed, or not there.

    With `asynchronous`, a copy in memory is taken and written by a thread while training goes on.
    """

    def __init__(self, asynchronous: bool) -> None:
        self.asynchronous = asynchronous
        self._snapshot = Snapshot()
        self._writer: threading.Thread | None = None
        self._failure: CheckpointError | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        self.wait()
        if not self.asynchronous:
            self._write(checkpoint, path)
            return
        # No daemon: a program that ends otherwise than by a kill ends with the file written.
        self._writer = threading.Thread(target=self._write, args=(self._snapshot.take(checkpoint), path))
        self._writer.start()

    def _write(self, checkpoint: dict[str, Any], path: Path) -> None:
        try:
            checkpoint_files.save(checkpoint, path)
        except CheckpointError as error:
            self._failure = error

    def wait(self) -> None:
        """Wait until the last checkpoint is written or has failed."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def finish(self) -> None:
        """Wait for rank 0, which writes, and raise on every rank what went wrong there.

        Raises:
            CheckpointError: the last checkpoint could not be written.
            FirstRankFailed: the same, on the other ranks.
        """
        ranks.first(self._finish)

    def _finish(self) -> None:
        self.wait()
        if self._failure is not None:
            raise self._failure

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
        asynchronous: training goes on while a copy of the state is written; it takes that much memory more.
        sharded: with the strategy fsdp2, every rank writes its own part, and a checkpoint is a folder.
    """

    run_folder: RunFolder
    cadence: Cadence
    io: VerifiedCheckpointIO

    def __init__(
        self,
        every_tokens: int = 1_000_000,
        keep: int = 2,
        asynchronous: bool = True,
        sharded: bool = False,
    ) -> None:
        require(every_tokens >= 1, "checkpoints.every_tokens", every_tokens, "it must be at least 1")
        require(keep >= 1, "checkpoints.keep", keep, "at least one checkpoint must stay")
        self.every_tokens = every_tokens
        self.keep = keep
        self.asynchronous = asynchronous
        self.sharded = sharded
        self._samples: int | None = None
        """Samples trained up to the last step of this process; None before its first."""
        self._handler_of_sigint: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Lightning's handlers would take the place of ours, and send to the other ranks from within a handler.
        trainer._signal_connector.register_signal_handlers = lambda: None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning asks rank 0 for signals before every micro-batch, and waits for the device to do so; here all
        # ranks are asked, once a step.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        data.repeats_when_cut_off = data.streamed
        data.asked_to_stop = lambda: signals.noted != 0
        self._handler_of_sigint = signal.signal(signal.SIGINT, signals.note)
        if signum := ranks.signalled():
            raise Interrupted(signum)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._let_go_of_sigint()

    def _let_go_of_sigint(self) -> None:
        if self._handler_of_sigint is not None:
            signal.signal(signal.SIGINT, self._handler_of_sigint)
            self._handler_of_sigint = None

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if not data.streamed or not ranks.largest(data.cut_off is not None):
            return
        # Weights are still those of the last step; the data goes back there.
        checkpoint = checkpoint_files.of_step(self.run_folder.checkpoints, trainer.global_step)
        if self._samples is not None and not ranks.first(lambda: checkpoint_files.is_whole(checkpoint)):
            data.samples = self._samples
            self._settle(trainer)
            trainer.save_checkpoint(checkpoint)
            self._settle(trainer)
        raise CutOff(data.cut_off or "")

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
        # A signal reaches ranks at different moments, or one of them alone: all stop after the same step.
        signum = ranks.signalled()
        if is_last or signum or self._is_regular(step):
            self._settle(trainer)
            trainer.save_checkpoint(checkpoint_files.of_step(self.run_folder.checkpoints, step))
            if is_last or signum or not self.asynchronous:
                self._settle(trainer)
        if signum and not is_last:
            raise Interrupted(signum, step)
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        self._samples = data.samples

    def _is_regular(self, step: int) -> bool:
        return step % self.cadence.steps(self.every_tokens) == 0

    def _settle(self, trainer: pl.Trainer) -> None:
        """Wait for the checkpoint that is being written, and remove what it makes superfluous.

        The newest regular one stays too: to go back to, it must be there with or without a signal.
        """
        self.io.finish()
        if not trainer.is_global_zero:
            return
        folder = self.run_folder.checkpoints
        regular = [file for file in checkpoint_files.in_order(folder) if self._is_regular(step_of(file))]
        checkpoint_files.prune(folder, self.keep, also=regular[-1:])

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._let_go_of_sigint()  # teardown comes after what ended well alone
        self.io.wait()

    def last_regular(self, before: int) -> Path | None:
        """The newest good checkpoint of a step below `before` that no signal caused, or None.

        Those that a signal caused do not count: a run that was never interrupted has none.
        """
        self.io.wait()
        return checkpoint_files.newest_verified(
            self.run_folder.checkpoints,
            lambda file: step_of(file) < before and self._is_regular(step_of(file)),
        )
