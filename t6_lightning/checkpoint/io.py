"""Lightning's way to `checkpoint.files`: whole and checksummed, written while training goes on."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO

from t6_lightning.checkpoint import files
from t6_lightning.common.errors import BadInput, first_line
from t6_lightning.distributed import ranks


@contextmanager
def restoring(checkpoint: Path | None) -> Iterator[None]:
    """For a Trainer's calls with a checkpoint: what fails while its values are given to their owners is its fault.

    Raises:
        BadInput: naming the checkpoint.
    """
    try:
        yield
    except (BadInput, OSError):
        raise
    except Exception as error:
        names = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
        # Lightning gives a loader its state later than all others theirs.
        if "load_state_dict" not in names and not any("restore" in name for name in names):
            raise
        raise BadInput(f"checkpoint {checkpoint} cannot be restored: {first_line(error)[:200]}") from error


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
    """A plugin for any Trainer and for stock checkpoint callbacks: files are whole and checksummed, or not there.

    What goes wrong in writing is raised by the call that writes, or with `asynchronous` by the next call, at the latest
    at the end of training; `Checkpoints` asks after every optimizer step.

    Args:
        asynchronous: take a copy of the state in memory, and let a thread write it while training goes on.
    """

    def __init__(self, asynchronous: bool = False) -> None:
        self.asynchronous = asynchronous
        self._snapshot = Snapshot()
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            CheckpointError: this one, or with `asynchronous` the one before, could not be written.
        """
        self.wait()
        self.raise_failure()
        if not self.asynchronous:
            files.save(checkpoint, Path(path))
            return
        # No daemon: a program that ends otherwise than by a kill ends with the file written.
        arguments = (self._snapshot.take(checkpoint), Path(path))
        self._writer = threading.Thread(target=self._write, args=arguments)
        self._writer.start()

    def _write(self, checkpoint: dict[str, Any], path: Path) -> None:
        try:
            files.save(checkpoint, path)
        except BaseException as error:  # whatever it is, the run must hear of it
            self._failure = error

    def wait(self) -> None:
        """Wait until the last checkpoint is written or has failed."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def raise_failure(self) -> None:
        """Raise what the writing thread met, once; does not wait for it."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    @property
    def has_failed(self) -> bool:
        """Whether a failure is waiting to be raised."""
        return self._failure is not None

    def finish(self) -> None:
        """Wait for rank 0, which writes, and raise on every rank what went wrong there.

        Raises:
            CheckpointError: the last checkpoint could not be written.
            FirstRankFailed: the same, on the other ranks.
        """
        ranks.first(self._finish)

    def _finish(self) -> None:
        self.wait()
        self.raise_failure()

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint onto the CPU; plain data only. Raises BadInput for one that is damaged."""
        self.wait()  # it may be the one that is being written
        return files.read(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint, file or folder, with its checksum."""
        self.wait()
        files.remove(Path(path))

    def teardown(self) -> None:
        self._finish()
