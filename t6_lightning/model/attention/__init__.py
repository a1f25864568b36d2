"""Attention families: each file (or package) of this folder defines one or more `AttentionConfig` classes.

The files of this folder are found by themselves; a class of any other module is named by its import path.
"""

from __future__ import annotations

import importlib
import pkgutil

from t6_lightning.common.classes import derived_classes, import_class, import_path
from t6_lightning.common.errors import require
from t6_lightning.model.attention.base import AttentionConfig, AttentionLayer, Keys, Layout

for _module in pkgutil.iter_modules(__path__, __name__ + "."):
    importlib.import_module(_module.name)


def attention_configs() -> dict[str, type[AttentionConfig]]:
    """Every attention family that has been imported, derived ones included, by the name of its config class.

    A class outside this package whose name another class has too goes by its import path.
    """
    classes = derived_classes(AttentionConfig)
    names = [cls.__name__ for cls in classes]

    def name(cls: type) -> str:
        is_ours = cls.__module__.startswith(f"{__name__}.")
        return cls.__name__ if is_ours or names.count(cls.__name__) == 1 else import_path(cls)

    return {name(cls): cls for cls in classes}


def attention_config(name: str) -> type[AttentionConfig]:
    """The config class of a family's name or an import path; see `import_class` for what importing means.

    A path inside this project means the family of that name, so that checkpoints outlive moved modules.

    Raises:
        BadInput: an unknown name, or a path that names no such class.
    """
    families = attention_configs()
    is_ours = name.startswith(f"{__name__.partition('.')[0]}.")
    short = name.rpartition(".")[2] if is_ours else name
    if short in families:
        return families[short]
    require("." in name, "attention.class_path", name, f"choose one of {', '.join(sorted(families))}")
    return import_class(name, AttentionConfig, "attention.class_path")


__all__ = ["AttentionConfig", "AttentionLayer", "Keys", "Layout", "attention_config", "attention_configs"]
