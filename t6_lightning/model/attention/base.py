"""What every attention family declares (its costs) and what every attention layer is given (its layout).

Shape suffixes: B batch, T tokens, M cached tokens, D head dimension, C d_model.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, ClassVar

from t6_lightning.errors import require

if TYPE_CHECKING:  # costs are arithmetic: `params` answers without loading torch
    import torch
    from torch import nn


class AttentionConfig(abc.ABC):
    """One attention variant as a value: subclasses are frozen dataclasses, one file per family.

    A subclass names its `mechanism`, has the fields `n_heads` and `head_dim`, states what it costs in closed
    form and builds its layer. Defining it in this folder is all it takes to make it selectable.
    """

    mechanism: ClassVar[str]
    n_heads: int
    head_dim: int

    @abc.abstractmethod
    def n_parameters(self, d_model: int) -> int:
        """Parameters of one layer (table 1 of the paper)."""

    @abc.abstractmethod
    def cache_entries(self) -> dict[str, tuple[int, ...]]:
        """What one layer caches for one token: name and shape of each tensor."""

    @abc.abstractmethod
    def flops(self, d_model: int, keys: float) -> float:
        """Forward FLOPs of one layer for one token that attends to `keys` tokens; 2 per multiply-add."""

    @abc.abstractmethod
    def build(self, d_model: int) -> nn.Module:
        """The layer: `forward(x_BTC, layout, cache) -> y_BTC`."""

    def cache_elements(self) -> int:
        """Numbers that one layer caches for one token."""
        return sum(prod(shape) for shape in self.cache_entries().values())

    def check_heads(self) -> None:
        """Refuse head counts and dimensions that no attention with RoPE can have."""
        for field in ("n_heads", "head_dim"):
            value = getattr(self, field)
            require(
                isinstance(value, int) and value >= 1,
                f"attention.{field}",
                value,
                "it must be an integer >= 1",
            )
        require(
            self.head_dim % 2 == 0,
            "attention.head_dim",
            self.head_dim,
            "RoPE turns pairs, so it must be even",
        )


@dataclass(frozen=True)
class Layout:
    """Where each token stands and what it may attend to; computed once per forward, shared by all layers.

    Attributes:
        cos, sin: RoPE tables, float32 (T, D/2) or (B, T, D/2).
        mask: bool (B, 1, T, M), True where a token may attend; None means `causal` alone decides.
        causal: each token sees itself and those before it (only without a mask).
    """

    cos: torch.Tensor
    sin: torch.Tensor
    mask: torch.Tensor | None = None
    causal: bool = True
