"""Multi-head latent attention (DeepSeek-V2, 2024; appendix F.5 of the TPA paper).

Shape suffixes: B batch, T tokens, M cached tokens, H heads, D head dimension, S turned dimensions (d_h^R),
L latent dimension (d_c), N one key/value head, C d_model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from kernels.decode.grouped import decode_grouped
from kernels.rope import rotate
from t6_lightning.common.errors import require
from t6_lightning.model.attention.base import AttentionConfig, AttentionLayer, Keys, Layout
from t6_lightning.model.cache import LayerCache
from t6_lightning.model.norm import RMSNorm
from t6_lightning.model.rope import Rope


@dataclass(frozen=True)
class MLAConfig(AttentionConfig):
    """Keys and values of all heads are linear maps of one cached latent, beside one shared key for RoPE.

    Attributes:
        n_heads: heads.
        head_dim: d_h, dimension of values and of the part of queries and keys that does not turn.
        rope_dim: d_h^R, further dimensions of queries and keys, which turn; all heads share that key.
        kv_rank: d_c, dimension of the cached latent.
        q_rank: d'_c, dimension of the query latent.
        rope: in whose convention they turn.
    """

    n_heads: int = 8
    head_dim: int = 64
    rope_dim: int = 32
    kv_rank: int = 256
    q_rank: int = 512
    rope: Rope = Rope()

    def __post_init__(self) -> None:
        self.check_integers(n_heads=1, head_dim=1, rope_dim=2, kv_rank=1, q_rank=1)
        require(self.rope_dim % 2 == 0, "attention.rope_dim", self.rope_dim, "RoPE turns pairs: make it even")
        require(self.rope.dims is None, "rope.dims", self.rope.dims, "in MLA rope_dim says how many turn")

    @property
    def rotates_when_read(self) -> bool:
        return False

    def n_parameters(self, d_model: int) -> int:
        h, d_h, d_r = self.n_heads, self.head_dim, self.rope_dim
        query = self.q_rank * (d_model + h * d_h + h * d_r)
        latent = self.kv_rank * (d_model + 2 * h * d_h)
        norms = self.q_rank + self.kv_rank
        return query + latent + d_model * (h * d_h + d_r) + norms

    def cache_entries(self) -> dict[str, tuple[int, ...]]:
        return {"latent": (self.kv_rank + self.rope_dim,)}

    def flops(self, d_model: int, keys: float) -> float:
        h, d_h = self.n_heads, self.head_dim
        products = self.n_parameters(d_model) - self.q_rank - self.kv_rank
        return 2 * products + 2 * h * (d_h + self.rope_dim + d_h) * keys

    def decode_flops(self, d_model: int, keys: float) -> float:
        # Absorbed, a query goes through W_UK and an output through W_UV: as many products as expanding the new
        # token, but scores and values are taken in the latent's dimension.
        latent_minus_heads = 2 * self.kv_rank - 2 * self.head_dim
        return self.flops(d_model, keys) + 2 * self.n_heads * latent_minus_heads * keys

    def rope_width(self) -> int:
        return self.rope_dim

    def softmax_scale(self) -> float:
        return (self.head_dim + self.rope_dim) ** -0.5

    def build(self, d_model: int) -> MultiHeadLatentAttention:
        return MultiHeadLatentAttention(self, d_model)


class MultiHeadLatentAttention(AttentionLayer[MLAConfig]):
    """The cache holds the normalized latent and the turned key, nothing per head.

    Decoding is absorbed: q·(W_UK c) = (W_UKᵀ q)·c and Σ p (W_UV c) = W_UV Σ p c, which makes the cache one
    key/value head that all query heads read.
    """

    def __init__(self, config: MLAConfig, d_model: int) -> None:
        super().__init__(config)
        h, d_h, d_r = config.n_heads, config.head_dim, config.rope_dim
        self.q_down = nn.Linear(d_model, config.q_rank, bias=False)
        self.q_norm = RMSNorm(config.q_rank, eps=1e-6)
        self.q_up = nn.Linear(config.q_rank, h * (d_h + d_r), bias=False)  # per head [still, turned]
        self.kv_down = nn.Linear(d_model, config.kv_rank + d_r, bias=False)  # [latent, turned key]
        self.kv_norm = RMSNorm(config.kv_rank, eps=1e-6)
        self.kv_up = nn.Linear(config.kv_rank, h * 2 * d_h, bias=False)  # per head [key, value]
        self.output = nn.Linear(h * d_h, d_model, bias=False)

    def project(self, x_BTC: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        c = self.config
        q = self.q_up(self.q_norm(self.q_down(x_BTC))).unflatten(-1, (c.n_heads, -1))
        q_BTHD, q_BTHS = q.split([c.head_dim, c.rope_dim], dim=-1)
        q_BTHS = rotate(q_BTHS, *layout.queries, c.rope.pairing)
        c_BTL, k_BTS = self.kv_down(x_BTC).split([c.kv_rank, c.rope_dim], dim=-1)
        k_BTNS = rotate(k_BTS.unsqueeze(-2), *layout.keys.tables, c.rope.pairing)
        latent = torch.cat((self.kv_norm(c_BTL), k_BTNS.squeeze(-2)), dim=-1)
        return torch.cat((q_BTHD, q_BTHS), dim=-1), {"latent": latent}

    def expand(self, entries: dict[str, torch.Tensor], keys: Keys) -> tuple[torch.Tensor, torch.Tensor]:
        c = self.config
        c_BML, k_BMS = entries["latent"].split([c.kv_rank, c.rope_dim], dim=-1)
        k_BMHD, v_BMHD = self.kv_up(c_BML).unflatten(-1, (c.n_heads, -1)).chunk(2, dim=-1)
        k_BMHS = k_BMS.unsqueeze(-2).expand(-1, -1, c.n_heads, -1)
        return torch.cat((k_BMHD, k_BMHS), dim=-1), v_BMHD

    def attend_cached(
        self, q_BTHD: torch.Tensor, new: dict[str, torch.Tensor], cache: LayerCache, layout: Layout
    ) -> torch.Tensor:
        c = self.config
        up_k_HDL, up_v_HDL = self.kv_up.weight.unflatten(0, (c.n_heads, -1)).chunk(2, dim=1)
        q_BTHD, q_BTHS = q_BTHD.split([c.head_dim, c.rope_dim], dim=-1)
        q_BTHL = torch.einsum("bthd,hdl->bthl", q_BTHD, up_k_HDL.to(q_BTHD.dtype))
        latent_BMNX = cache.append(new)["latent"].unsqueeze(-2).to(q_BTHL.dtype)
        o_BTHL = decode_grouped(
            torch.cat((q_BTHL, q_BTHS), dim=-1),
            latent_BMNX,
            latent_BMNX[..., : c.kv_rank],
            scale=c.softmax_scale(),
            mask=layout.mask,
            lengths=layout.lengths,
            backend=layout.attention_backend,
        )
        return torch.einsum("bthl,hdl->bthd", o_BTHL, up_v_HDL.to(o_BTHL.dtype))
