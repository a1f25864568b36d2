"""Checkpoint files that are whole or not there: written beside, checksummed, renamed."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from t6_lightning.errors import BadInput

log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; older ones are untouched."""


def _checksum_file(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.name + ".sha256")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_and_sync(file: Path, write: Callable[[Any], object]) -> None:
    with file.open("wb") as stream:
        write(stream)
        stream.flush()
        os.fsync(stream.fileno())


def save(state: dict[str, Any], checkpoint: Path) -> None:
    """Write `state` to `checkpoint`, and its SHA-256 beside it, so that either is whole or absent.

    Raises:
        CheckpointError: the disk is full or the file cannot be written. Nothing half-written stays behind.
    """
    temporary = checkpoint.with_name(f".{checkpoint.name}.{os.getpid()}")
    temporary_sum = _checksum_file(temporary)
    try:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        _write_and_sync(temporary, lambda stream: torch.save(state, stream))
        checksum = f"{_sha256(temporary)}  {checkpoint.name}\n".encode()
        _write_and_sync(temporary_sum, lambda stream: stream.write(checksum))
        temporary_sum.replace(_checksum_file(checkpoint))
        temporary.replace(checkpoint)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        for file in (temporary, temporary_sum):
            with contextlib.suppress(OSError):
                file.unlink()
        raise CheckpointError(
            f"checkpoint {checkpoint} could not be written ({error}); earlier checkpoints are untouched: "
            "make room on the disk and run the same command again"
        ) from error


def is_whole(checkpoint: Path) -> bool:
    """Whether the file's checksum is the one written with it."""
    try:
        return _checksum_file(checkpoint).read_text().split()[0] == _sha256(checkpoint)
    except (OSError, IndexError):
        return False


def in_order(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted(folder.glob("step-*.ckpt"))


def newest_verified(folder: Path) -> Path | None:
    """The newest checkpoint of a folder that is whole; damaged ones are named and passed over."""
    for checkpoint in reversed(in_order(folder)):
        if is_whole(checkpoint):
            return checkpoint
        log.warning("checkpoint %s is damaged (its checksum differs): trying the one before", checkpoint)
    return None


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what a killed process left half-written or half-removed."""
    kept = in_order(folder)[-keep:]
    names = {file.name for checkpoint in kept for file in (checkpoint, _checksum_file(checkpoint))}
    for file in folder.iterdir():
        if file.name.lstrip(".").startswith("step-") and file.name not in names:
            file.unlink(missing_ok=True)


def load(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, plain data only (never unpickling code).

    Raises:
        BadInput: it is damaged, or no checkpoint of this program.
    """
    if _checksum_file(checkpoint).exists() and not is_whole(checkpoint):
        raise BadInput(
            f"checkpoint {checkpoint} is damaged: its checksum differs from the one written with it"
        )
    if not zipfile.is_zipfile(checkpoint):
        raise BadInput(f"{checkpoint} cannot be read as a checkpoint: it is no file that torch.save wrote")
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # zipfile, pickle and torch errors all mean the same to the user
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(f"{checkpoint} cannot be read as a checkpoint: {reason}") from error
    if (
        not isinstance(state, dict)
        or "state_dict" not in state
        or "net" not in state.get("hyper_parameters", {})
    ):
        raise BadInput(
            f"{checkpoint} is not a checkpoint of t6_lightning: it lacks the model's configuration"
        )
    return state
