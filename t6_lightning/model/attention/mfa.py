"""Multi-matrix factorization attention (Hu et al., 2024; appendix F.4 of the TPA paper).

Shape suffixes: B batch, T tokens, H heads, D head dimension, C d_model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from kernels.rope import rotate
from t6_lightning.model.attention.base import AttentionConfig, AttentionLayer, Keys, Layout
from t6_lightning.model.rope import Rope


@dataclass(frozen=True)
class MFAConfig(AttentionConfig):
    """One key and one value head; the query of head i is x W^DQ W_i^UQ.

    Attributes:
        n_heads: query heads.
        head_dim: d_c, dimension of the query latent and of every head.
        rope: how positions enter Q and K.
    """

    n_heads: int = 8
    head_dim: int = 128
    rope: Rope = Rope()

    def __post_init__(self) -> None:
        self.check_integers(n_heads=1, head_dim=1)
        self.rope_width()

    @property
    def rotates_when_read(self) -> bool:
        return False

    def n_parameters(self, d_model: int) -> int:
        d_c = self.head_dim
        return 3 * d_model * d_c + self.n_heads * d_c**2 + d_model * self.n_heads * d_c

    def cache_entries(self) -> dict[str, tuple[int, ...]]:
        return {"k": (1, self.head_dim), "v": (1, self.head_dim)}

    def flops(self, d_model: int, keys: float) -> float:
        return 2 * self.n_parameters(d_model) + 2 * 2 * self.n_heads * self.head_dim * keys

    def initial_variances(self, d_model: int) -> dict[str, float]:
        # Two default matrices in a row: each leaves a third of the variance.
        return {"q": 1 / 9, "k": 1 / 3, "v": 1 / 3}

    def build(self, d_model: int) -> MultiMatrixFactorizationAttention:
        return MultiMatrixFactorizationAttention(self, d_model)


class MultiMatrixFactorizationAttention(AttentionLayer[MFAConfig]):
    def __init__(self, config: MFAConfig, d_model: int) -> None:
        super().__init__(config)
        d_c = config.head_dim
        self.q_down = nn.Linear(d_model, d_c, bias=False)
        self.q_up = nn.Linear(d_c, config.n_heads * d_c, bias=False)
        self.k = nn.Linear(d_model, d_c, bias=False)
        self.v = nn.Linear(d_model, d_c, bias=False)
        self.output = nn.Linear(config.n_heads * d_c, d_model, bias=False)

    def project(self, x_BTC: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        by_head, pairing = (-1, self.config.head_dim), self.config.rope.pairing
        q_BTHD = rotate(self.q_up(self.q_down(x_BTC)).unflatten(-1, by_head), *layout.queries, pairing)
        k_BT1D = rotate(self.k(x_BTC).unflatten(-1, by_head), *layout.keys.tables, pairing)
        return q_BTHD, {"k": k_BT1D, "v": self.v(x_BTC).unflatten(-1, by_head)}

    def expand(self, entries: dict[str, torch.Tensor], keys: Keys) -> tuple[torch.Tensor, torch.Tensor]:
        return entries["k"], entries["v"]
