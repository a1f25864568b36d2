"""Run folders: where a run lives, which checkpoint is its newest good one, whether it may go on.

T6_HOME/runs/NAME/
    config.yaml         the resolved configuration
    run.json            MLflow run id and status: running, interrupted, failed or finished
    checkpoints/        step-00000100.ckpt beside step-00000100.ckpt.sha256
    summary.json        figures of a finished run
"""

from __future__ import annotations

import logging
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any

import yaml
from filelock import FileLock, Timeout

from t6_lightning.checkpoint.files import in_order, newest_verified
from t6_lightning.common import state
from t6_lightning.common.errors import BadInput, first_line, require
from t6_lightning.common.home import t6_home
from t6_lightning.common.state import DamagedState
from t6_lightning.distributed import ranks

LONGEST_NAME = 200
"""Bytes of a run's name: file systems take 255."""

log = logging.getLogger(__name__)

RECORD = {"status": str, "started": (str, NoneType), "mlflow_run_id": (str, NoneType)}
"""Types of what run.json holds; any may be missing."""
_damaged_records: set[Path] = set()
"""Those that were named already."""


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

    @property
    def record_file(self) -> Path:
        return self.path / "run.json"

    def create(self, config_yaml: str) -> None:
        """Make the folder and write the resolved configuration."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        state.write_text(self.config_file, config_yaml)

    @property
    def has_saved(self) -> bool:
        """Whether there are checkpoints, whole or not."""
        return bool(in_order(self.checkpoints))

    @property
    def exists(self) -> bool:
        """Whether it was trained before, if only up to its first step."""
        return self.config_file.exists() or self.has_saved

    @property
    def settings(self) -> dict[Any, Any] | None:
        """What config.yaml holds; None where the run has not begun.

        Raises:
            DamagedState: it is damaged, or missing though there are checkpoints.
        """
        remedy = "give --config with what the run was started with, and --ckpt_path last to go on"
        try:
            text = state.read_text(self.config_file, remedy, LARGEST_CONFIG)
        except FileNotFoundError:
            if not self.has_saved:
                return None
            raise DamagedState(self.config_file, "missing beside the run's checkpoints", remedy) from None
        try:
            settings = _read_yaml(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            reason = f"damaged (no YAML: {first_line(error)})"
            raise DamagedState(self.config_file, reason, remedy) from error
        if not isinstance(settings, dict):
            raise DamagedState(self.config_file, "damaged (it holds no settings)", remedy)
        return settings

    @property
    def record(self) -> dict[str, Any]:
        """What run.json holds; empty when there is none yet, or a damaged one, which is named once.

        It is rebuilt when the run goes on: its checkpoints say how far it is, the tracking store which run it is.
        """
        try:
            return state.read_state(self.record_file, optional=RECORD)
        except FileNotFoundError:
            return {}
        except DamagedState as error:
            if self.record_file not in _damaged_records:
                log.warning("%s; it is rebuilt when the run goes on", error)
            _damaged_records.add(self.record_file)
            return {}

    @property
    def started(self) -> str:
        """When the run began, in ISO 8601; without a record, when its configuration was written."""
        if started := self.record.get("started"):
            return started
        file = self.config_file if self.config_file.exists() else self.path
        return datetime.fromtimestamp(file.stat().st_mtime, UTC).isoformat()

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
        state.write_state(self.record_file, self.record | values)

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint whose checksum is right, or None."""
        return newest_verified(self.checkpoints)

    def checkpoint_to_go_on_from(self) -> Path | None:
        """The newest whole checkpoint; None where none was written yet.

        Raises:
            BadInput: there are some, and none is whole.
        """
        saved = in_order(self.checkpoints)
        checkpoint = self.last_checkpoint()
        if saved and checkpoint is None:
            raise BadInput(
                f"--run={self.name!r} is not possible: none of that run's {len(saved)} checkpoints is whole; choose "
                f"another name, or remove {self.path} to train it from the beginning"
            )
        return checkpoint


NAME = re.compile(r"[\w.+-]+")


def _is_name(name: str) -> bool:
    fits = len(os.fsencode(name)) <= LONGEST_NAME  # of a folder; MLflow and Lightning add nothing to it
    return fits and bool(NAME.fullmatch(name)) and name.strip(".") != ""


def _check_name(name: str) -> str:
    allowed = f"a run's name is letters, digits and . _ + -, at most {LONGEST_NAME} bytes"
    require(_is_name(name), "--run", name, allowed)
    return name


def new_run_name(prefix: str) -> str:
    """A name that sorts by time and collides with no other."""
    prefix = re.sub(r"[^\w.+-]+", "-", prefix)
    return f"{prefix}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
LARGEST_CONFIG = 2**20
"""Bytes of a configuration; the presets' have about 3,000."""
DEEPEST = 50
"""Mappings and lists in each other in a configuration."""


def _read_yaml(text: str) -> Any:
    """Plain values of what `yaml.safe_dump` wrote: nothing that grows without bound in reading."""
    depth = 0
    for token in yaml.scan(text, LOADER):
        name = type(token).__name__
        depth += name.endswith("StartToken") - name.endswith("EndToken")
        if depth > DEEPEST or isinstance(token, yaml.AliasToken):
            raise ValueError("it is nested too deep, or refers to itself")
    return yaml.load(text, LOADER)


def newest_run() -> RunFolder:
    """The run that was started last.

    Raises:
        BadInput: there is none.
    """
    folders = (t6_home() / "runs").glob("*/")
    runs = [RunFolder(folder.name) for folder in folders if _is_name(folder.name)]
    started = [(run.started, run.name) for run in runs if run.exists]
    if not started:
        raise BadInput(f"--ckpt_path='last' is not possible: there is no run in {t6_home() / 'runs'}")
    return RunFolder(max(started)[1])


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
    checkpoint = folder.checkpoint_to_go_on_from()
    if checkpoint is None:
        raise BadInput(f"--ckpt_path='last' is not possible: run {folder.name!r} has no complete checkpoint")
    return checkpoint


def run_of(checkpoint: Path) -> RunFolder | None:
    """The run folder that a checkpoint lies in, if it lies in one."""
    folder = checkpoint.absolute().parent
    inside = folder.name == "checkpoints" and folder.parent.parent == t6_home() / "runs"
    return RunFolder(folder.parent.name) if inside and _is_name(folder.parent.name) else None


def run_named_by(ckpt_path: str, run: str | None) -> RunFolder | None:
    """The run that `--ckpt_path` is about, if it is about one: that of the file, `run` for `last`, or the newest.

    Raises:
        BadInput: there is no such file, or no run at all.
    """
    if ckpt_path != "last":
        return run_of(resolve_checkpoint(ckpt_path, None))
    return RunFolder(run) if run else newest_run()
