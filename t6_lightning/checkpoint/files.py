"""Checkpoint files that are whole or not there: written beside, checksummed, renamed."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import torch

from t6_lightning.checkpoint import shards as checkpoint_shards
from t6_lightning.common.errors import BadInput, first_line
from t6_lightning.distributed import ranks

log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; older ones are untouched."""


def _checksum_file(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.name + ".sha256")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class _Hashed:
    """A file that is hashed while it is written, beside the writing: it need not be read again."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.hash = hashlib.sha256()
        self.hasher = ThreadPoolExecutor(1)

    def write(self, data: Any) -> int:
        hashed = self.hasher.submit(self.hash.update, data)
        try:
            return self.stream.write(data)
        finally:
            hashed.result()  # the caller may use the buffer again

    def flush(self) -> None:
        self.stream.flush()


def _write_and_sync(file: Path, write: Callable[[Any], object]) -> str:
    """Write a file to the disk itself; its SHA-256."""
    with file.open("wb") as stream:
        hashed = _Hashed(stream)
        with hashed.hasher:
            write(hashed)
        stream.flush()
        os.fsync(stream.fileno())
        return hashed.hash.hexdigest()


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, file or folder, and its checksum, if there is one. Raises OSError."""
    if checkpoint.is_dir():
        shutil.rmtree(checkpoint)
    for file in (checkpoint, _checksum_file(checkpoint)):
        file.unlink(missing_ok=True)


def save(state: dict[str, Any], checkpoint: Path) -> None:
    """Write `state` to `checkpoint`, and its SHA-256 beside it, so that either is whole or absent.

    Raises:
        CheckpointError: the disk is full or the file cannot be written. Nothing half-written stays behind.
    """
    temporary = checkpoint.with_name(f".{checkpoint.name}.{os.getpid()}")
    temporary_sum = _checksum_file(temporary)
    try:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        digest = _write_and_sync(temporary, lambda stream: torch.save(state, stream))
        _write_and_sync(temporary_sum, lambda stream: stream.write(f"{digest}  {checkpoint.name}\n".encode()))
        if checkpoint.is_dir():
            remove(checkpoint)
        temporary_sum.replace(_checksum_file(checkpoint))
        temporary.replace(checkpoint)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        for file in (temporary, temporary_sum):
            with contextlib.suppress(OSError):
                file.unlink()
        raise _not_written(checkpoint, error) from error


def _not_written(checkpoint: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {checkpoint} could not be written ({error}); earlier checkpoints are untouched: "
        "make room on the disk and run the same command again"
    )


def save_shards(
    rest: dict[str, Any], mine: dict[str, torch.Tensor], checkpoint: Path, rank: int, world: int
) -> None:
    """Write a checkpoint as a folder, each rank its own rows and rank 0 the rest; it is there whole or not at all.

    Every rank must call, on a file system that all share.

    Args:
        rest: what is not spread; needed on rank 0.
        mine: this rank's rows of each spread tensor.
        checkpoint: the folder.
        rank: of this process.
        world: number of ranks.

    Raises:
        CheckpointError: on every rank, when one of them could not write.
    """
    temporary = checkpoint.with_name(f".{checkpoint.name}.partial")
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed process
    ranks.barrier()
    failure: CheckpointError | None = None
    try:
        save(mine, checkpoint_shards.shard_file(temporary, rank, world))
        if rank == 0:
            save(rest, temporary / checkpoint_shards.REST)
    except CheckpointError as error:
        failure = error
    all_written = ranks.largest(float(failure is not None)) == 0
    if rank == 0:
        try:
            if all_written:
                remove(checkpoint)
                temporary.rename(checkpoint)
        except OSError as error:
            failure = _not_written(checkpoint, error)
        shutil.rmtree(temporary, ignore_errors=True)
    if ranks.largest(float(failure is not None)):
        raise failure or CheckpointError(f"checkpoint {checkpoint} could not be written by another rank")


def add_checksum(checkpoint: Path) -> None:
    """Write the SHA-256 of a file that another writer has made, so that `is_whole` can tell."""
    text = f"{_sha256(checkpoint)}  {checkpoint.name}\n".encode()
    _write_and_sync(_checksum_file(checkpoint), lambda stream: stream.write(text))


_verified: set[tuple[str, int, int, int]] = set()
"""Files found whole, by name, inode, size and time of change: a file of gigabytes is read through once only."""


def is_whole(checkpoint: Path) -> bool:
    """Whether the file's checksum, or that of each file of a folder, is the one written with it."""
    if checkpoint.is_dir():
        files = checkpoint_shards.files_of(checkpoint)
        with ThreadPoolExecutor() as readers:
            return bool(files) and all(readers.map(is_whole, files))
    try:
        status = checkpoint.stat()
        seen = (str(checkpoint.absolute()), status.st_ino, status.st_size, status.st_mtime_ns)
        if seen in _verified:
            return True
        whole = _checksum_file(checkpoint).read_text().split()[0] == _sha256(checkpoint)
    except (OSError, IndexError):
        return False
    if whole:
        _verified.add(seen)
    return whole


def _damage(checkpoint: Path) -> str:
    """What `is_whole` found wrong."""
    if checkpoint.is_dir():
        return "a file in it is missing, or its checksum differs from the one written with it"
    return "its checksum differs from the one written with it"


def in_order(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted(folder.glob("step-*.ckpt"))


def of_step(folder: Path, step: int) -> Path:
    """The checkpoint of an optimizer step."""
    return folder / f"step-{step:08d}.ckpt"


def step_of(checkpoint: Path) -> int:
    """The optimizer step that a name from `of_step` says."""
    return int(checkpoint.stem.removeprefix("step-"))


def newest_verified(folder: Path, fits: Callable[[Path], bool] = lambda file: True) -> Path | None:
    """The newest checkpoint of a folder that fits and is whole; damaged ones are named and passed over."""
    for checkpoint in filter(fits, reversed(in_order(folder))):
        if is_whole(checkpoint):
            return checkpoint
        log.warning("checkpoint %s is damaged (%s): trying the one before", checkpoint, _damage(checkpoint))
    return None


def prune(folder: Path, keep: int, also: Sequence[Path] = ()) -> None:
    """Remove all but the newest `keep` checkpoints and those in `also`, and what a killed process left
    half-written or half-removed."""
    kept = {*in_order(folder)[-keep:], *also}
    names = {file.name for checkpoint in kept for file in (checkpoint, _checksum_file(checkpoint))}
    for file in folder.iterdir():
        if file.name.lstrip(".").startswith("step-") and file.name not in names:
            if file.is_dir():
                shutil.rmtree(file, ignore_errors=True)
            else:
                file.unlink(missing_ok=True)


def read(checkpoint: Path, whole: bool = True) -> dict[str, Any]:
    """Read what `save` or any `torch.save` wrote onto the CPU; plain data only (never unpickling code).

    Args:
        checkpoint: a file, or a folder of shards.
        whole: put the shards of a folder together; else they are `checkpoint_shards.Pieces`.

    Raises:
        BadInput: it is damaged, or no file of torch's.
    """
    is_folder = checkpoint.is_dir()
    if is_folder and not checkpoint_shards.files_of(checkpoint):
        raise BadInput(f"{checkpoint} is a folder, and no checkpoint: name one of its checkpoints")
    if (is_folder or _checksum_file(checkpoint).exists()) and not is_whole(checkpoint):
        raise BadInput(f"checkpoint {checkpoint} is damaged: {_damage(checkpoint)}")
    if not is_folder and not zipfile.is_zipfile(checkpoint):
        raise BadInput(f"{checkpoint} cannot be read as a checkpoint: it is no file that torch.save wrote")
    try:
        if is_folder:
            return checkpoint_shards.load(checkpoint, whole)
        return torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # zipfile, pickle and torch errors all mean the same to the user
        raise BadInput(f"{checkpoint} cannot be read as a checkpoint: {first_line(error)}") from error


def load(checkpoint: Path, whole: bool = True) -> dict[str, Any]:
    """Read a checkpoint of a T6Module; see `read`.

    Raises:
        BadInput: it is damaged, or no checkpoint of this program.
    """
    state = read(checkpoint, whole)
    if (
        not isinstance(state, dict)
        or "state_dict" not in state
        or "net" not in state.get("hyper_parameters", {})
    ):
        raise BadInput(
            f"{checkpoint} is not a checkpoint of t6_lightning: it lacks the model's configuration"
        )
    if not state["state_dict"]:
        raise BadInput(f"{checkpoint} holds no weights: it is one file of a checkpoint; name their folder")
    return state
