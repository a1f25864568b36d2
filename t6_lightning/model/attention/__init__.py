"""Attention families: each file (or package) of this folder defines one or more `AttentionConfig` classes.

They are found by themselves: a new idea is a new file here, and nothing else.
"""

from __future__ import annotations

import importlib
import pkgutil

from t6_lightning.model.attention.base import AttentionConfig, AttentionLayer, Keys, Layout

for _module in pkgutil.iter_modules(__path__, __name__ + "."):
    importlib.import_module(_module.name)


def attention_configs() -> dict[str, type[AttentionConfig]]:
    """Every attention family by the name of its config class."""
    return {cls.__name__: cls for cls in AttentionConfig.__subclasses__()}


__all__ = ["AttentionConfig", "AttentionLayer", "Keys", "Layout", "attention_configs"]
