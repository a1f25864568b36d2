"""Softmax attention by torch's scaled_dot_product_attention.

Shapes: B batch, T query tokens, M cached tokens, H heads, G KV heads, D head dimension, E value dimension.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

IMPLEMENTATIONS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def attention(
    q_BTHD: torch.Tensor,
    k_BMGD: torch.Tensor,
    v_BMGE: torch.Tensor,
    scale: float,
    causal: bool,
    mask: torch.Tensor | None,
    dropout: float,
    implementation: str | None = None,
) -> torch.Tensor:
    """See `kernels.attention.attention`. K and V of a group are read in place, never repeated per head.

    `implementation` names one of torch's; None leaves it to torch.
    """
    # On a GPU in half precision, SDPA gives a row that may attend to nothing some average of V (torch 2.11,
    # H100). Such a row is shown everything, which is safe in every implementation, and its output erased.
    blind_B1T1 = None
    if mask is not None:
        blind_B1T1 = ~mask.any(-1, keepdim=True)
        mask = mask | blind_B1T1
    H, G, T = q_BTHD.shape[2], k_BMGD.shape[2], q_BTHD.shape[1]
    folded = H != G and not causal
    if folded:
        # The heads of a group read the same K and V: as further queries of one head nothing is repeated,
        # whatever implementation SDPA picks (its math one repeats K and V under enable_gqa).
        q_BTHD = q_BTHD.unflatten(2, (G, H // G)).transpose(1, 2).flatten(2, 3).transpose(1, 2)
        if mask is not None and T > 1:
            mask = mask.repeat_interleave(H // G, dim=2)
    only = nullcontext() if implementation is None else sdpa_kernel(IMPLEMENTATIONS[implementation])
    with only:
        o_BHTE = F.scaled_dot_product_attention(
            q_BTHD.transpose(1, 2),
            k_BMGD.transpose(1, 2),
            v_BMGE.transpose(1, 2),
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=causal,
            scale=scale,
            enable_gqa=H != G and not folded,
        )
    if folded:
        o_BHTE = o_BHTE.unflatten(2, (T, H // G)).transpose(2, 3).flatten(1, 2)
    if blind_B1T1 is not None:
        o_BHTE = o_BHTE.masked_fill(blind_B1T1, 0)
    return o_BHTE.transpose(1, 2)
