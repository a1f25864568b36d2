"""Multi-head attention (Vaswani et al., 2017) and its forms with fewer key/value heads (appendix F.1 to F.3).

Shape suffixes: B batch, T tokens, H heads, G key/value heads, D head dimension, C d_model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from kernels.rope import rotate
from t6_lightning.common.errors import require
from t6_lightning.model.attention.base import AttentionConfig, AttentionLayer, Keys, Layout
from t6_lightning.model.norm import OUTPUT_NORM_EPS, RMSNorm
from t6_lightning.model.rope import Rope


@dataclass(frozen=True)
class MHAConfig(AttentionConfig):
    """Attention whose heads have their own keys and values (MHA), or share them in groups (GQA, MQA).

    Attributes:
        n_heads: query heads; n_heads * head_dim need not equal d_model.
        head_dim: dimension of each head.
        n_kv_heads: key/value heads, a divisor of n_heads: None is n_heads (MHA), 1 is MQA, between is GQA.
        rope: how positions enter Q and K.
        output_norm: RMSNorm of each head's output, with one learned weight of head_dim and eps 1e-5.
    """

    n_heads: int = 4
    head_dim: int = 64
    n_kv_heads: int | None = None
    rope: Rope = Rope()
    output_norm: bool = False

    def __post_init__(self) -> None:
        self.check_integers(n_heads=1, head_dim=1)
        self.rope_width()
        if self.n_kv_heads is not None:
            self.check_integers(n_kv_heads=1)
            require(
                self.n_heads % self.n_kv_heads == 0,
                "attention.n_kv_heads",
                self.n_kv_heads,
                f"it must divide n_heads={self.n_heads}",
            )

    @property
    def groups(self) -> int:
        """G, key/value heads."""
        return self.n_kv_heads or self.n_heads

    @property
    def mechanism(self) -> str:
        if type(self) is not MHAConfig:
            return super().mechanism
        return "mha" if self.groups == self.n_heads else "mqa" if self.groups == 1 else "gqa"

    @property
    def rotates_when_read(self) -> bool:
        return False

    def n_parameters(self, d_model: int) -> int:
        return self._products(d_model) + self.output_norm * self.head_dim

    def _products(self, d_model: int) -> int:
        return 2 * d_model * (self.n_heads + self.groups) * self.head_dim

    def cache_entries(self) -> dict[str, tuple[int, ...]]:
        return {"k": (self.groups, self.head_dim), "v": (self.groups, self.head_dim)}

    def flops(self, d_model: int, keys: float) -> float:
        return 2 * self._products(d_model) + 2 * 2 * self.n_heads * self.head_dim * keys

    def build(self, d_model: int) -> MultiHeadAttention:
        return MultiHeadAttention(self, d_model)


class MultiHeadAttention(AttentionLayer[MHAConfig]):
    """Plain linear Q, K and V; rotated keys are cached."""

    def __init__(self, config: MHAConfig, d_model: int) -> None:
        super().__init__(config)
        width, kv_width = config.n_heads * config.head_dim, config.groups * config.head_dim
        self.q = nn.Linear(d_model, width, bias=False)
        self.k = nn.Linear(d_model, kv_width, bias=False)
        self.v = nn.Linear(d_model, kv_width, bias=False)
        self.output = nn.Linear(width, d_model, bias=False)
        if config.output_norm:
            self.output_norm = RMSNorm(config.head_dim, eps=OUTPUT_NORM_EPS)

    def project(self, x_BTC: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        by_head, pairing = (-1, self.config.head_dim), self.config.rope.pairing
        q_BTHD = rotate(self.q(x_BTC).unflatten(-1, by_head), *layout.queries, pairing)
        k_BTGD = rotate(self.k(x_BTC).unflatten(-1, by_head), *layout.keys.tables, pairing)
        return q_BTHD, {"k": k_BTGD, "v": self.v(x_BTC).unflatten(-1, by_head)}

    def expand(self, entries: dict[str, torch.Tensor], keys: Keys) -> tuple[torch.Tensor, torch.Tensor]:
        return entries["k"], entries["v"]

    def finish(self, o_BTHE: torch.Tensor, x_BTC: torch.Tensor) -> torch.Tensor:
        return self.output_norm(o_BTHE) if self.config.output_norm else o_BTHE
