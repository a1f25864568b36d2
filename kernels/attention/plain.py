"""Softmax attention written out: the truth that the other backends are held to.

Shapes: B batch, T query tokens, M cached tokens, H heads, G KV heads, N = H/G heads per KV head,
D head dimension, E value dimension.
"""

import torch
import torch.nn.functional as F

from kernels.dispatch import without_autocast


def attention(
    q_BTHD: torch.Tensor,
    k_BMGD: torch.Tensor,
    v_BMGE: torch.Tensor,
    scale: float,
    causal: bool,
    mask: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """See `kernels.attention.attention`. Works in float32, or float64 for float64 inputs."""
    dtype = torch.promote_types(q_BTHD.dtype, torch.float32)
    T, M, G = q_BTHD.shape[1], k_BMGD.shape[1], k_BMGD.shape[2]
    if causal:
        mask = torch.ones(T, M, dtype=torch.bool, device=q_BTHD.device).tril().view(1, 1, T, M)
    with without_autocast(q_BTHD.device):
        q_BTGND = q_BTHD.to(dtype).unflatten(2, (G, -1))
        scores_BGNTM = torch.einsum("btgnd,bmgd->bgntm", q_BTGND, k_BMGD.to(dtype)) * scale
        if mask is None:
            p_BGNTM = scores_BGNTM.softmax(-1)
        else:
            hidden = ~mask.unsqueeze(1)
            # The smallest number rather than -inf, then zeros: a row that sees nothing gives 0 and not NaN.
            lowest = torch.finfo(dtype).min
            p_BGNTM = scores_BGNTM.masked_fill(hidden, lowest).softmax(-1).masked_fill(hidden, 0)
        p_BGNTM = F.dropout(p_BGNTM, dropout)
        o_BTGNE = torch.einsum("bgntm,bmge->btgne", p_BGNTM, v_BMGE.to(dtype))
    return o_BTGNE.flatten(2, 3).to(q_BTHD.dtype)
