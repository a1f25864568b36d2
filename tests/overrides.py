"""Which methods that a derived attention layer overrides are bypassed by methods that it inherits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from t6_lightning.model.attention import AttentionLayer
from t6_lightning.model.attention.tpa import TensorProductAttention, TPAConfig
from t6_lightning.model.config import T6Config
from t6_lightning.model.t6 import T6

NEVER_COMPUTES = ("freeze", "thaw")

TRAINING = {
    "project": ("attend_new", "heads"),
    "expand": ("attend_new", "heads"),
    "heads": ("attend_new",),
    "attend": ("attend_new",),
    "attend_new": ("before_output",),
    "finish": ("before_output",),
    "before_output": ("forward",),
}
PREFILL = {
    "project": ("before_output",),
    "expand": ("before_output",),
    "heads": ("project", "expand"),
    "attend": ("before_output",),
    "attend_new": ("project", "expand", "attend"),
    "finish": ("before_output",),
    "before_output": ("forward",),
}
DECODING = {
    "project": ("before_output",),
    "expand": ("attend_cached",),
    "heads": ("project", "attend_cached"),
    "attend": ("attend_cached",),
    "attend_new": ("project", "attend_cached"),
    "attend_cached": ("before_output",),
    "finish": ("before_output",),
    "forward": ("before_output",),
}
FURTHER = {
    "training": ("attend_new", "heads"),
    "prefill": ("project", "expand"),
    "decoding": ("project", "attend_cached"),
}
"""For methods that a family adds."""
CHAIN = {"training": TRAINING, "prefill": PREFILL, "decoding": DECODING}
"""Phase -> method of `AttentionLayer` -> the methods that do its work there where it is not called."""


@contextmanager
def recorded(layer: AttentionLayer[Any], names: set[str]) -> Iterator[set[str]]:
    """The methods among `names` that are called through the layer."""
    called: set[str] = set()

    def recording(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            called.add(name)
            return method(*args, **options)

        return call

    for name in names:
        setattr(layer, name, recording(name, getattr(layer, name)))
    try:
        yield called
    finally:
        for name in names:
            delattr(layer, name)


def calls_of(config: T6Config, names: set[str], tokens: torch.Tensor) -> dict[str, set[str]]:
    """Phase -> the methods of the first layer that it calls."""
    model = T6(config)
    layer = model.blocks[0].attention
    with recorded(layer, names) as training:
        model.train().loss(tokens, tokens)
    with torch.no_grad(), model.eval().frozen():
        cache = model.new_cache(len(tokens), tokens.shape[1])
        with recorded(layer, names) as prefill:
            model(tokens[:, :-1], cache=cache)
        with recorded(layer, names) as decoding:
            model(tokens[:, -1:], cache=cache)
    return {"training": training, "prefill": prefill, "decoding": decoding}


def bypassed_overrides(config: T6Config, tokens: torch.Tensor) -> list[str]:
    """One sentence for each method that is overridden, not called in some phase, and not replaced there either."""
    layer = type(config.attention.build(config.d_model))
    layers = [cls for cls in layer.__mro__ if issubclass(cls, AttentionLayer)]
    names = {
        name
        for cls in layers
        for name, value in vars(cls).items()
        if callable(value) and not name.startswith("_") and name not in NEVER_COMPUTES
    }
    owner: dict[str, int] = {
        name: next(i for i, cls in enumerate(layers) if name in vars(cls)) for name in names
    }
    again = [name for name in names if any(name in vars(cls) for cls in layers[owner[name] + 1 :])]
    configs = [config]
    if isinstance(config.attention, TPAConfig):
        configs.append(dataclasses.replace(config, attention_saves="factors"))
    sentences: dict[tuple[str, str, str], str] = {}
    for one in configs:
        calls = calls_of(one, names, tokens)
        for phase, called in calls.items():
            for name in sorted(again):
                computes = name in DECODING or any(name in every for every in calls.values())
                if name in called or not computes:
                    continue
                instead = [m for m in CHAIN[phase].get(name, FURTHER[phase]) if m in called]
                if name == "attend_cached" or any(owner[m] <= owner[name] for m in instead):
                    continue
                fault = (name, phase, instead[-1] if instead else "")
                sentences.setdefault(fault, _sentence(name, phase, instead, layers, owner, one))
    return list(sentences.values())


def _sentence(
    name: str,
    phase: str,
    instead: list[str],
    layers: list[type],
    owner: dict[str, int],
    config: T6Config,
) -> str:
    inherited = " and ".join(f"{layers[owner[m]].__name__}.{m}" for m in instead[-1:]) or "the model"
    setting = " with attention_saves: factors" if config.attention_saves == "factors" else ""
    hint = ""
    if issubclass(layers[0], TensorProductAttention):
        hint = ", or change the factors in adapt_factors, which all of them call"
    return (
        f"{layers[owner[name]].__name__} overrides {name}, which {inherited} does not call in {phase}{setting}: "
        f"override {instead[-1] if instead else 'another method'} too{hint}"
    )
