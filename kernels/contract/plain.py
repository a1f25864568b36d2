"""Factor contraction as one batched matrix product per token.

Shapes: B batch, T tokens, R rank, H heads, D head dimension.
"""

from collections.abc import Sequence

import torch

from kernels.rope import rotate


def outer(features: Sequence[torch.Tensor]) -> torch.Tensor:
    """vec(b_r ⊗ c_r ⊗ …) per token and rank (appendix C): [(B, T, R, d_b), (B, T, R, d_c), ...] to (B, T, R, D).

    vec stacks columns: b_i c_j stands at j · d_b + i, and so on for further factors; D = d_b · d_c · ...
    """
    rows_BTRD = features[0]
    for factor in features[1:]:
        rows_BTRD = (factor.unsqueeze(-1) * rows_BTRD.unsqueeze(-2)).flatten(-2)
    return rows_BTRD


def contract(
    a_BTRH: torch.Tensor,
    b_BTRD: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    pairing: str = "halves",
) -> torch.Tensor:
    """(1/R) Aᵀ RoPE(B) for every token: (B, T, R, H) and (B, T, R, D) to (B, T, H, D)."""
    B, T, R, _ = a_BTRH.shape
    if a_BTRH.dtype != b_BTRD.dtype:
        wider = torch.promote_types(a_BTRH.dtype, b_BTRD.dtype)
        a_BTRH, b_BTRD = a_BTRH.to(wider), b_BTRD.to(wider)
    if cos is not None and sin is not None:
        b_BTRD = rotate(b_BTRD, cos, sin, pairing)
    a_NHR = a_BTRH.flatten(0, 1).transpose(1, 2)
    b_NRD = b_BTRD.flatten(0, 1)
    # alpha puts 1/R into the product's accumulator: no second pass over the large result, and no second
    # rounding in half precision. With beta=0 the first argument is never read.
    unread = a_NHR.new_empty(1, 1, 1)
    return torch.baddbmm(unread, a_NHR, b_NRD, beta=0, alpha=1 / R).unflatten(0, (B, T))
