"""Every attention variant there is: the families found in the package, and the presets, shrunk by one rule.

The environment variable T6_VARIANTS names others to take in their place: modules and YAML files.
"""

from __future__ import annotations

import dataclasses
import importlib
import os

import torch

from t6_lightning.model.attention import attention_configs
from t6_lightning.model.config import T6Config
from t6_lightning.model.t6 import T6
from t6_lightning.presets import load_net, model_presets

NAMED = os.environ.get("T6_VARIANTS", "").split()
FILES = [name for name in NAMED if name.endswith((".yaml", ".yml"))]
MODULES = [importlib.import_module(name).__name__ for name in NAMED if name not in FILES]


def families() -> dict[str, T6Config]:
    """The families at their defaults."""
    found = attention_configs()
    if NAMED:
        inside = tuple(f"{module}." for module in MODULES)
        found = {name: cls for name, cls in found.items() if f"{cls.__module__}.".startswith(inside)}
        assert found or FILES, f"T6_VARIANTS={' '.join(NAMED)!r} defines no attention family"
    return {name: T6Config(attention=family()) for name, family in found.items()}


def shrunk(config: T6Config) -> T6Config:
    """The rule: everything around the attention is made small, the attention itself stays as it is.

    So heads (odd ones included), ranks, order, latent and head dimensions are those of the preset.
    """
    return dataclasses.replace(
        config, vocab_size=61, d_model=24, n_layers=2, context=32, ffn_hidden=40, dropout=0.0
    )


def variants() -> dict[str, T6Config]:
    """Families at their defaults and shrunk presets by name; equal ones once, under the first name."""
    named = families()
    for name in FILES if NAMED else model_presets():
        named[name] = load_net(name)
    distinct: dict[T6Config, str] = {}
    for name, config in named.items():
        distinct.setdefault(shrunk(config), name)
    return {name: config for config, name in distinct.items()}


def one_per_family() -> dict[str, T6Config]:
    """The smallest of each family: its defaults."""
    return {name: shrunk(config) for name, config in families().items()}


def random_model(config: T6Config, dtype: torch.dtype = torch.float64) -> T6:
    """A model with noise on every parameter, so that every path shows in the logits.

    Matrices that start at zero would hide what comes before them, and scales that start at one their own absence.
    """
    torch.manual_seed(0)
    model = T6(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = parameter.square().mean().sqrt() if parameter.any() else torch.ones(())
            parameter.add_(torch.randn_like(parameter) * 0.3 * spread)
    return model


def random_tokens(config: T6Config, batch: int, length: int) -> torch.Tensor:
    """Token ids (batch, length)."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(config.vocab_size, (batch, length), generator=generator)
