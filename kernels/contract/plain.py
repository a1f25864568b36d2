"""Factor contraction as one batched matrix product per token.

Shapes: B batch, T tokens, R rank, H heads, D head dimension.
"""

import torch

from kernels.rope import rotate


def contract(
    a_BTRH: torch.Tensor, b_BTRD: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None
) -> torch.Tensor:
    """(1/R) Aᵀ RoPE(B) for every token: (B, T, R, H) and (B, T, R, D) to (B, T, H, D)."""
    B, T, R, _ = a_BTRH.shape
    if cos is not None and sin is not None:
        b_BTRD = rotate(b_BTRD, cos, sin)
    a_NHR = a_BTRH.flatten(0, 1).transpose(1, 2)
    b_NRD = b_BTRD.flatten(0, 1)
    # alpha puts 1/R into the product's accumulator: no second pass over the large result, and no second
    # rounding in half precision. With beta=0 the first argument is never read.
    unread = a_NHR.new_empty(1, 1, 1)
    return torch.baddbmm(unread, a_NHR, b_NRD, beta=0, alpha=1 / R).unflatten(0, (B, T))
