"""Factor contraction: queries, keys or values from their factors.

Shapes: B batch, T tokens, R rank, H heads, D head dimension.
"""

import torch

from kernels.contract import plain
from kernels.contract.plain import outer
from kernels.dispatch import choose


def contract(
    a_BTRH: torch.Tensor,
    b_BTRD: torch.Tensor,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    *,
    pairing: str = "halves",
    backend: str = "auto",
) -> torch.Tensor:
    """Q_t = (1/R) Σ_r a_r ⊗ RoPE(b_r), eq. 3.1 and 3.2; without cos and sin nothing is rotated (V).

    a_BTRH    (B, T, R, H) head factors
    b_BTRD    (B, T, R, D) feature factors
    cos, sin  (T, D/2) or (B, T, D/2), both or neither
    pairing   which dimensions RoPE pairs: "halves" or "interleaved"
    backend   "auto" or "plain"
    returns   (B, T, H, D)

    Raises ValueError for factors of different B, T or R, for one table without the other, and for a
    backend that is unknown.
    """
    if a_BTRH.shape[:3] != b_BTRD.shape[:3]:
        raise ValueError(
            f"contract: factors must agree in B, T and R: a is {tuple(a_BTRH.shape)}, b {tuple(b_BTRD.shape)}"
        )
    if (cos is None) != (sin is None):
        raise ValueError("contract: give both cos and sin, or neither")
    run = choose("contract", backend, {"plain": plain.contract})
    return run(a_BTRH, b_BTRD, cos, sin, pairing)


__all__ = ["contract", "outer"]
