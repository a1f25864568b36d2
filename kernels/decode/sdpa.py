"""TPA decoding by contracting K and V of the whole cache, then ordinary attention.

Shapes: B batch, T query tokens, M cached tokens, H heads, D head dimension, E value dimension,
S rank of K, U rank of V.
"""

import torch

from kernels.attention import attention
from kernels.contract import contract


def decode(
    q_BTHD: torch.Tensor,
    a_k_BMSH: torch.Tensor,
    b_k_BMSD: torch.Tensor,
    a_v_BMUH: torch.Tensor,
    b_v_BMUE: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """See `kernels.decode.decode`. Forms K (B, M, H, D) and V (B, M, H, E) for the call."""
    k_BMHD = contract(a_k_BMSH, b_k_BMSD)
    v_BMHE = contract(a_v_BMUH, b_v_BMUE)
    return attention(q_BTHD, k_BMHD, v_BMHE, scale=scale, causal=False, mask=mask, backend="sdpa")
