"""T6 Lightning: train, measure and compare Tensor Product Attention and its rivals.

Importing this package is light; what it offers loads when first asked for.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from t6_lightning.checkpoint.load import load
    from t6_lightning.model.attention.mfa import MFAConfig
    from t6_lightning.model.attention.mha import MHAConfig
    from t6_lightning.model.attention.mla import MLAConfig
    from t6_lightning.model.attention.tpa.config import TPAConfig
    from t6_lightning.model.config import T6Config
    from t6_lightning.model.generate import generate
    from t6_lightning.model.t6 import T6
    from t6_lightning.runs.fit import fit
    from t6_lightning.training.module import T6Module

__all__ = [
    "T6", "MFAConfig", "MHAConfig", "MLAConfig", "T6Config", "T6Module", "TPAConfig", "fit", "generate", "load",
]  # fmt: skip

_OFFERED = {
    "T6": "model.t6",
    "T6Config": "model.config",
    "TPAConfig": "model.attention.tpa.config",
    "MHAConfig": "model.attention.mha",
    "MLAConfig": "model.attention.mla",
    "MFAConfig": "model.attention.mfa",
    "T6Module": "training.module",
    "fit": "runs.fit",
    "generate": "model.generate",
    "load": "checkpoint.load",
}
"""Name -> module of this package that defines it."""


def __getattr__(name: str) -> Any:
    if name in _OFFERED:
        return getattr(importlib.import_module(f"{__name__}.{_OFFERED[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_MOVED = {
    "backend": "model.backend",
    "budget": "model.budget",
    "callbacks": "training.callbacks",
    "callbacks.cadence": "training.callbacks.cadence",
    "callbacks.checkpoints": "training.callbacks.checkpoints",
    "callbacks.monitor": "training.callbacks.monitor",
    "callbacks.progress": "training.callbacks.progress",
    "callbacks.seeds": "training.callbacks.seeds",
    "callbacks.spikes": "training.callbacks.spikes",
    "checkpoint_files": "checkpoint.files",
    "checkpoint_shards": "checkpoint.shards",
    "console": "common.console",
    "errors": "common.errors",
    "initial": "model.init_report",
    "metrics": "training.metrics",
    "module": "training.module",
    "optim": "training.optim",
    "ranks": "distributed.ranks",
    "recompute": "training.recompute",
    "reference": "checkpoint.reference",
    "signals": "distributed.signals",
    "tracking": "runs.tracking",
}
"""Import paths of version 0.1.0 that saved configurations and variants of users name -> where these modules are."""


class _MovedModules(MetaPathFinder, Loader):
    """Imports a module that has moved under its old name too; both names give the same module."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname.removeprefix(f"{__name__}.") in _MOVED and fullname.startswith(f"{__name__}."):
            return spec_from_loader(fullname, self)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(f"{__name__}.{_MOVED[spec.name.removeprefix(f'{__name__}.')]}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has given the module the old name's spec.
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.insert(
    0, _MovedModules()
)  # before the folders: `callbacks` has a path, in which `callbacks.seeds` lies
