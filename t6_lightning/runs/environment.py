"""Where a run was made: versions, hardware and the state of the code."""

from __future__ import annotations

import getpass
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from t6_lightning.common.files import write_atomically
from t6_lightning.common.version import VERSION

PACKAGES = (
    "torch", "lightning", "torchmetrics", "numpy", "datasets", "pyarrow", "transformers", "tokenizers",
    "tiktoken", "mlflow", "optuna", "jsonargparse", "triton",
)  # fmt: skip


def _git(*arguments: str) -> str | None:
    """Output of git in the checkout that this package runs from; None when it is no checkout."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def git_tags() -> dict[str, str]:
    """MLflow tags: the commit of the code and whether its tree was clean."""
    commit = _git("rev-parse", "HEAD")
    # An unrelated repository around an installed package says nothing about the code.
    if commit is None or _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return {"version": VERSION}
    dirty = bool(_git("status", "--porcelain"))
    return {
        "version": VERSION,
        "mlflow.source.git.commit": commit,
        "git_dirty": str(dirty).lower(),
    }


def user() -> str:
    """Who runs this; in a container the number may have no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def describe() -> dict[str, Any]:
    """Versions and hardware as plain values."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
        "packages": versions,
        **git_tags(),
    }


def write(file: Path) -> Path:
    """Write `describe()` as JSON."""
    write_atomically(file, json.dumps(describe(), indent=2) + "\n")
    return file
