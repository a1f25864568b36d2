"""Multi-head attention (Vaswani et al., 2017), the baseline of the paper (appendix F.1).

Shape suffixes: B batch, T tokens, M cached tokens, H heads, D head dimension, C d_model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from kernels.attention import attention
from kernels.rope import rotate
from t6_lightning.model.attention.base import AttentionConfig, Layout
from t6_lightning.model.init import zero_

if TYPE_CHECKING:
    import torch

    from t6_lightning.model.cache import LayerCache


@dataclass(frozen=True)
class MHAConfig(AttentionConfig):
    """Multi-head attention with RoPE.

    Attributes:
        n_heads: heads; n_heads * head_dim need not equal d_model.
        head_dim: dimension of each head (even, for RoPE).
    """

    mechanism: ClassVar[str] = "mha"
    n_heads: int = 4
    head_dim: int = 64

    def __post_init__(self) -> None:
        self.check_heads()

    def n_parameters(self, d_model: int) -> int:
        return 4 * d_model * self.n_heads * self.head_dim

    def cache_entries(self) -> dict[str, tuple[int, ...]]:
        return {"k": (self.n_heads, self.head_dim), "v": (self.n_heads, self.head_dim)}

    def flops(self, d_model: int, keys: float) -> float:
        width = self.n_heads * self.head_dim
        return 2 * 4 * d_model * width + 2 * 2 * width * keys

    def build(self, d_model: int) -> MultiHeadAttention:
        return MultiHeadAttention(self, d_model)


class MultiHeadAttention(nn.Module):
    """Causal softmax attention with one key and one value per head; rotated keys are cached."""

    def __init__(self, config: MHAConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        width = config.n_heads * config.head_dim
        self.q = nn.Linear(d_model, width, bias=False)
        self.k = nn.Linear(d_model, width, bias=False)
        self.v = nn.Linear(d_model, width, bias=False)
        self.output = nn.Linear(width, d_model, bias=False)
        zero_(self.output.weight)

    def forward(self, x_BTC: torch.Tensor, layout: Layout, cache: LayerCache | None = None) -> torch.Tensor:
        heads = (self.config.n_heads, self.config.head_dim)
        q_BTHD = rotate(self.q(x_BTC).unflatten(-1, heads), layout.cos, layout.sin)
        k_BMHD = rotate(self.k(x_BTC).unflatten(-1, heads), layout.cos, layout.sin)
        v_BMHD = self.v(x_BTC).unflatten(-1, heads)
        if cache is not None:
            k_BMHD, v_BMHD = cache.append(k=k_BMHD, v=v_BMHD)
        o_BTHD = attention(
            q_BTHD, k_BMHD, v_BMHD, scale=self.config.head_dim**-0.5, causal=layout.causal, mask=layout.mask
        )
        return self.output(o_BTHD.flatten(-2))
