"""Activation checkpointing: less memory for the backward pass, at the price of computing forward parts twice.

Wrapped around the blocks from outside; the model does not know of it, and neither gradients nor dropout masks change.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from kernels.attention import OPERATORS
from t6_lightning.common.errors import require

Recompute = Literal["none", "selective", "full"]
CHOICES: tuple[str, ...] = ("none", "selective", "full")

aten = torch.ops.aten
DEAR = {
    aten.mm.default,
    aten.addmm.default,
    *OPERATORS,
}
"""Operations whose results `selective` keeps: products with weights, and attention. What lies between (norms, RoPE,
contractions of factors, SiLU, dropout) is cheap to compute and large to keep."""


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in DEAR else CheckpointPolicy.PREFER_RECOMPUTE


def apply(blocks: nn.ModuleList, recompute: Recompute) -> None:
    """Make each block keep its input alone ("full"), its dear results as well ("selective") or everything ("none").

    Call before blocks are compiled or sharded. Raises BadInput for any other choice.
    """
    require(recompute in CHOICES, "model.recompute", recompute, f"choose one of {', '.join(CHOICES)}")
    if recompute == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if recompute == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for block in blocks:
        block.forward = _checkpointed(block.forward, options)


def _checkpointed(forward: Any, options: dict[str, Any]) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():  # validation and generation, where a cache is written to
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, **options, **kwargs)

    return run
