"""Tensor Product Attention (Zhang et al., 2025, arXiv 2501.06425), sections 3.1 to 3.3.

Shape suffixes: B batch, T tokens, M cached tokens, H heads, D head dimension, R rank, C d_model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F

from kernels.attention import attention
from kernels.contract import contract
from kernels.decode import decode
from kernels.rope import rotate
from t6_lightning.errors import require
from t6_lightning.model.attention.base import AttentionConfig, Layout
from t6_lightning.model.init import FACTOR_INITS, Side, zero_

if TYPE_CHECKING:
    from t6_lightning.model.cache import LayerCache


@dataclass(frozen=True)
class TPAConfig(AttentionConfig):
    """Contextual second-order TPA: Q, K and V are sums of rank-one products of two factors of the token.

    Attributes:
        n_heads: heads; n_heads * head_dim need not equal d_model.
        head_dim: dimension of each head (even, for RoPE).
        rank_q: rank of Q, R_Q.
        rank_k: rank of K, R_K.
        rank_v: rank of V, R_V.
        init: initialization of the factor matrices: "xavier_reference" as the public code computes it,
            "xavier_paper" as appendix G states it.
    """

    mechanism: ClassVar[str] = "tpa"
    n_heads: int = 8
    head_dim: int = 64
    rank_q: int = 6
    rank_k: int = 2
    rank_v: int = 2
    init: Literal["xavier_reference", "xavier_paper"] = "xavier_reference"

    def __post_init__(self) -> None:
        self.check_heads()
        for field in ("rank_q", "rank_k", "rank_v"):
            value = getattr(self, field)
            require(
                isinstance(value, int) and value >= 1,
                f"attention.{field}",
                value,
                "a rank is an integer >= 1",
            )
        require(
            self.init in FACTOR_INITS, "attention.init", self.init, f"choose one of {', '.join(FACTOR_INITS)}"
        )

    @property
    def ranks(self) -> dict[str, int]:
        return {"q": self.rank_q, "k": self.rank_k, "v": self.rank_v}

    def n_parameters(self, d_model: int) -> int:
        factors = sum(self.ranks.values()) * (self.n_heads + self.head_dim)
        return d_model * factors + d_model * self.n_heads * self.head_dim

    def cache_entries(self) -> dict[str, tuple[int, ...]]:
        return {
            "a_k": (self.rank_k, self.n_heads),
            "b_k": (self.rank_k, self.head_dim),
            "a_v": (self.rank_v, self.n_heads),
            "b_v": (self.rank_v, self.head_dim),
        }

    def flops(self, d_model: int, keys: float) -> float:
        width = self.n_heads * self.head_dim
        contraction = sum(self.ranks.values()) * width
        return 2 * (self.n_parameters(d_model) + contraction) + 2 * 2 * width * keys

    def build(self, d_model: int) -> TensorProductAttention:
        return TensorProductAttention(self, d_model)


class TensorProductAttention(nn.Module):
    """Q_t = (1/R_Q) A_Q(x_t)ᵀ RoPE(B_Q(x_t)), likewise K; V without RoPE (eq. 3.1 to 3.3).

    The cache holds the factors A_K, rotated B_K, A_V and B_V, never K and V (section 3.3).
    """

    def __init__(self, config: TPAConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.factor_shapes: dict[str, tuple[int, int]] = {}
        for name, rank in config.ranks.items():
            sides: tuple[tuple[Side, int], ...] = (("a", config.n_heads), ("b", config.head_dim))
            for side, size in sides:
                projection = nn.Linear(d_model, rank * size, bias=False)
                FACTOR_INITS[config.init](projection.weight, side, rank)
                setattr(self, f"{side}_{name}", projection)
                self.factor_shapes[f"{side}_{name}"] = (rank, size)
        self.output = nn.Linear(config.n_heads * config.head_dim, d_model, bias=False)
        zero_(self.output.weight)

    def factors(self, x_BTC: torch.Tensor) -> dict[str, torch.Tensor]:
        """All six factors, (B, T, R, H) or (B, T, R, D), from one matrix product: six small ones are slower."""
        weight = torch.cat([self.get_submodule(name).weight for name in self.factor_shapes])  # pyright: ignore
        sizes = [rank * size for rank, size in self.factor_shapes.values()]
        parts = F.linear(x_BTC, weight).split(sizes, dim=-1)
        shapes = self.factor_shapes.items()
        return {name: part.unflatten(-1, shape) for (name, shape), part in zip(shapes, parts, strict=True)}

    def forward(self, x_BTC: torch.Tensor, layout: Layout, cache: LayerCache | None = None) -> torch.Tensor:
        f = self.factors(x_BTC)
        scale = self.config.head_dim**-0.5
        q_BTHD = contract(f["a_q"], f["b_q"], layout.cos, layout.sin)
        b_k = rotate(f["b_k"], layout.cos, layout.sin)
        if cache is not None:
            cached = cache.append(a_k=f["a_k"], b_k=b_k, a_v=f["a_v"], b_v=f["b_v"])
            if not layout.causal:
                o_BTHD = decode(q_BTHD, *cached, scale=scale, mask=layout.mask)
                return self.output(o_BTHD.flatten(-2))
        # Training and prefill: nothing came before these tokens, so their own K and V are all there is.
        k_BTHD = contract(f["a_k"], b_k)
        v_BTHD = contract(f["a_v"], f["b_v"])
        o_BTHD = attention(q_BTHD, k_BTHD, v_BTHD, scale=scale, causal=layout.causal, mask=layout.mask)
        return self.output(o_BTHD.flatten(-2))
