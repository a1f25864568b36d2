"""Run folders: where a run lives, which checkpoint is its newest good one, whether it may go on.

T6_HOME/runs/NAME/
    config.yaml         the resolved configuration
    run.json            MLflow run id and status: running, interrupted, failed or finished
    checkpoints/        step-00000100.ckpt beside step-00000100.ckpt.sha256
    summary.json        figures of a finished run
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from t6_lightning.checkpoint.files import newest_verified
from t6_lightning.common.errors import BadInput, require
from t6_lightning.common.files import write_atomically
from t6_lightning.common.home import t6_home
from t6_lightning.distributed import ranks

LONGEST_NAME = 200
"""Bytes of a run's name: file systems take 255."""


class RunFolder:
    """One run's folder; nothing is created until `create`.

    Args:
        name: letters, digits and . _ + -; or what chooses a name when it is first asked for. With several ranks all
            of them must ask first at the same time: rank 0 chooses.
    """

    def __init__(self, name: str | Callable[[], str]) -> None:
        self._choose = name
        if isinstance(name, str):
            _check_name(name)

    @cached_property
    def name(self) -> str:
        if isinstance(self._choose, str):
            return self._choose
        return _check_name(ranks.first(self._choose))

    @property
    def path(self) -> Path:
        return t6_home() / "runs" / self.name

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def summary_file(self) -> Path:
        return self.path / "summary.json"

    def create(self, config_yaml: str) -> None:
        """Make the folder and write the resolved configuration."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_atomically(self.config_file, config_yaml)

    @property
    def exists(self) -> bool:
        return self.config_file.exists()

    @property
    def record(self) -> dict[str, Any]:
        """What run.json holds; empty when there is none yet."""
        file = self.path / "run.json"
        return json.loads(file.read_text()) if file.exists() else {}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for one training process; the lock goes with the process, however it ends.

        Raises:
            BadInput: another process is training this run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.path / ".lock", timeout=0):
                yield
        except Timeout:
            raise BadInput(
                f"--run={self.name!r} is not possible: another process is training it now"
            ) from None

    def update_record(self, **values: Any) -> None:
        """Change some of run.json."""
        write_atomically(self.path / "run.json", json.dumps(self.record | values, indent=2) + "\n")

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint whose checksum is right, or None."""
        return newest_verified(self.checkpoints)


def _check_name(name: str) -> str:
    allowed = f"a run's name is letters, digits and . _ + -, at most {LONGEST_NAME} bytes"
    fits = len(os.fsencode(name)) <= LONGEST_NAME  # of a folder; MLflow and Lightning add nothing to it
    require(fits and bool(re.fullmatch(r"[\w.+-]+", name)) and name.strip(".") != "", "--run", name, allowed)
    return name


def new_run_name(prefix: str) -> str:
    """A name that sorts by time and collides with no other."""
    prefix = re.sub(r"[^\w.+-]+", "-", prefix)
    return f"{prefix}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def newest_run() -> RunFolder | None:
    """The run folder that was started last."""
    folders = [file.parent for file in (t6_home() / "runs").glob("*/config.yaml")]
    started = [(RunFolder(folder.name).record.get("started", ""), folder.name) for folder in folders]
    return RunFolder(max(started)[1]) if started else None


def resolve_checkpoint(ckpt_path: str, run: str | None) -> Path:
    """The file that `--ckpt_path` names: a path, or `last` for the newest good one of `run` (or of the newest run).

    Raises:
        BadInput: there is no such file, or `last` finds none.
    """
    if ckpt_path != "last":
        require(
            Path(ckpt_path).exists(), "--ckpt_path", ckpt_path, "no such file; give a checkpoint or `last`"
        )
        return Path(ckpt_path).absolute()
    folder = RunFolder(run) if run else newest_run()
    if folder is None:
        raise BadInput(f"--ckpt_path='last' is not possible: there is no run in {t6_home() / 'runs'}")
    checkpoint = folder.last_checkpoint()
    if checkpoint is None:
        raise BadInput(f"--ckpt_path='last' is not possible: run {folder.name!r} has no complete checkpoint")
    return checkpoint


def run_of(checkpoint: Path) -> RunFolder | None:
    """The run folder that a checkpoint lies in, if it lies in one."""
    folder = checkpoint.absolute().parent.parent
    if folder.parent == t6_home() / "runs" and (folder / "config.yaml").exists():
        return RunFolder(folder.name)
    return None
