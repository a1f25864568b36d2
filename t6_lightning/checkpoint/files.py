"""Checkpoint files that are whole or not there: written beside, checksummed, renamed."""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import torch

from t6_lightning.checkpoint import content
from t6_lightning.checkpoint import shards as checkpoint_shards
from t6_lightning.common.errors import BadInput, CheckpointError, first_line
from t6_lightning.common.files import replacing, sync, write_atomically
from t6_lightning.common.state import DamagedState, read_bounded
from t6_lightning.distributed import ranks

log = logging.getLogger(__name__)


def _checksum_file(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.name + ".sha256")


def _checksum_line(digest: str, checkpoint: Path) -> str:
    """As `sha256sum` writes it."""
    return f"{digest}  {checkpoint.name}\n"


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


def _write(state: dict[str, Any], file: Path) -> str:
    """Write a checkpoint; returns its SHA-256."""
    with file.open("wb") as stream:
        hashed: Any = _Hashed(stream)
        with hashed.hasher:
            torch.save(state, hashed)
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
    try:
        with replacing(checkpoint) as file:
            digest = _write(state, file)
            with replacing(_checksum_file(checkpoint)) as checksum:
                checksum.write_text(_checksum_line(digest, checkpoint))
                if checkpoint.is_dir():
                    remove(checkpoint)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
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
                sync(temporary)
                temporary.rename(checkpoint)
                sync(checkpoint.parent)
        except OSError as error:
            failure = _not_written(checkpoint, error)
        shutil.rmtree(temporary, ignore_errors=True)
    if ranks.largest(float(failure is not None)):
        raise failure or CheckpointError(f"checkpoint {checkpoint} could not be written by another rank")


def add_checksum(checkpoint: Path) -> None:
    """Write the SHA-256 of a file that another writer has made, so that `is_whole` can tell."""
    write_atomically(_checksum_file(checkpoint), _checksum_line(_sha256(checkpoint), checkpoint))


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
        if not checkpoint.is_file():
            return False
        seen = (str(checkpoint.absolute()), status.st_ino, status.st_size, status.st_mtime_ns)
        if seen in _verified:
            return True
        whole = read_bounded(_checksum_file(checkpoint)).split()[:1] == [_sha256(checkpoint)]
    except (OSError, DamagedState):
        return False
    if whole:
        _verified.add(seen)
    return whole


def _damage(checkpoint: Path) -> str:
    """What `is_whole` found wrong."""
    if checkpoint.is_dir():
        return "a file in it is missing, or its checksum differs from the one written with it"
    return "its checksum differs from the one written with it"


NAME = re.compile(r"step-(\d{8,18})\.ckpt")
"""Of a checkpoint. Whatever else is in their folder is not ours."""
BESIDE = re.compile(r"step-\d{8,18}\.ckpt(\.sha256)?(\.\d+-\d+|\.partial)?|\.step-\d{8,18}\.ckpt.*")
"""Of a checkpoint, its checksum, or what a killed process of this version or an earlier one left of writing either."""


def in_order(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted((file for file in folder.glob("step-*.ckpt") if NAME.fullmatch(file.name)), key=step_of)


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
    half-written or half-removed. Other files stay."""
    kept = {*in_order(folder)[-keep:], *also}
    names = {file.name for checkpoint in kept for file in (checkpoint, _checksum_file(checkpoint))}
    for file in folder.iterdir():
        if BESIDE.fullmatch(file.name) and file.name not in names:
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
    if not is_folder and not (checkpoint.is_file() and zipfile.is_zipfile(checkpoint)):
        raise BadInput(f"{checkpoint} cannot be read as a checkpoint: it is no file that torch.save wrote")
    has_sum = is_folder or _checksum_file(checkpoint).exists()
    if has_sum and not is_whole(checkpoint):
        raise BadInput(f"checkpoint {checkpoint} is damaged: {_damage(checkpoint)}")
    for file in checkpoint_shards.files_of(checkpoint) if is_folder else [checkpoint]:
        if damage := content.archive_damage(file, contents=not has_sum):
            raise BadInput(f"checkpoint {file} is damaged: {damage}")
    try:
        if is_folder:
            state = checkpoint_shards.load(checkpoint)
        else:
            state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # zipfile, pickle and torch errors all mean the same to the user
        raise BadInput(f"{checkpoint} cannot be read as a checkpoint: {_reason(error)}") from error
    if damage := content.value_damage(state):
        raise BadInput(f"{checkpoint} cannot be read as a checkpoint: {damage}")
    try:
        return checkpoint_shards.put_together(state) if is_folder and whole else state
    except RuntimeError as error:  # pieces of different widths
        raise BadInput(f"{checkpoint} cannot be read as a checkpoint: {first_line(error)}") from error


def _reason(error: Exception) -> str:
    """What torch says, which for code in a pickle is a page on how to run it all the same."""
    unsupported = re.search(r"Unsupported (?:global|operand|class)[^\n]*", str(error))
    if "weights_only" in str(error) or unsupported:
        return f"it holds more than plain data ({unsupported[0][:120] if unsupported else 'code'})"
    return first_line(error)[:200]


def load(checkpoint: Path, whole: bool = True) -> dict[str, Any]:
    """Read a checkpoint of a T6Module; see `read`.

    Raises:
        BadInput: it is damaged, or no checkpoint of this program.
    """
    state = read(checkpoint, whole)
    if damage := content.form_damage(state):
        raise BadInput(f"{checkpoint} is not a checkpoint of t6_lightning: {damage}")
    if not state["state_dict"]:
        raise BadInput(f"{checkpoint} holds no weights: it is one file of a checkpoint; name their folder")
    return state
