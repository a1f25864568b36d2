"""TPA attention over a cache of factors (section 5).

Shapes: B batch, T query tokens, M cached tokens, H heads, D head dimension, E value dimension,
S rank of K, U rank of V.
"""

from collections.abc import Callable

import torch

from kernels.decode import plain, sdpa
from kernels.dispatch import choose


def decode(
    q_BTHD: torch.Tensor,
    a_k_BMSH: torch.Tensor,
    b_k_BMSD: torch.Tensor,
    a_v_BMUH: torch.Tensor,
    b_v_BMUE: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """softmax(scale · q Kᵀ) V with K = (1/S) Σ_s a_s ⊗ b_s and V = (1/U) Σ_u a_u ⊗ b_u (algorithms 1-3).

    q_BTHD    (B, T, H, D) queries, already rotated
    a_k_BMSH  (B, M, S, H) cached head factors of K
    b_k_BMSD  (B, M, S, D) cached feature factors of K, already rotated
    a_v_BMUH  (B, M, U, H) cached head factors of V
    b_v_BMUE  (B, M, U, E) cached feature factors of V
    mask      bool (B, 1, T, M), True = may attend (None: all of the cache is visible to every query);
              a row without any True gives zeros
    backend   "auto", "sdpa" or "plain"
    returns   (B, T, H, E) in q's dtype

    Raises ValueError for shapes that do not fit together and for a backend that is unknown.
    """
    B, T, H, D = q_BTHD.shape
    M, S = b_k_BMSD.shape[1:3]
    U = b_v_BMUE.shape[2]
    fits = (
        a_k_BMSH.shape == (B, M, S, H)
        and b_k_BMSD.shape == (B, M, S, D)
        and a_v_BMUH.shape == (B, M, U, H)
        and b_v_BMUE.shape[:3] == (B, M, U)
    )
    if not fits:
        shapes = [tuple(x.shape) for x in (q_BTHD, a_k_BMSH, b_k_BMSD, a_v_BMUH, b_v_BMUE)]
        raise ValueError(
            f"decode: q, a_k, b_k, a_v, b_v are {shapes}, must be"
            " (B, T, H, D), (B, M, S, H), (B, M, S, D), (B, M, U, H), (B, M, U, E)"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (B, 1, T, M)):
        raise ValueError(f"decode: mask must be bool {(B, 1, T, M)}, is {mask.dtype} {tuple(mask.shape)}")
    run = choose("decode", backend, _fastest_first(T, q_BTHD.device.type))
    return run(q_BTHD, a_k_BMSH, b_k_BMSD, a_v_BMUH, b_v_BMUE, scale, mask)


def _fastest_first(T: int, device: str) -> dict[str, Callable[..., torch.Tensor]]:
    """The backends in the order of their measured speed for T query tokens.

    The factor-space form repeats for every query what SDPA on contracted K and V does once. On a CPU that
    pays for one query: 1/8 of SDPA's time on 2 cores (34 heads, head_dim 64, rank 2, 4,096 cached tokens,
    float32), while from 4 queries (rank 2) or 2 (rank 6) on SDPA is as fast or faster. On a GPU its many small
    operators take 3 times as long as SDPA (H100, 47 heads, batch 16, 32,768 tokens, bfloat16).
    `python -m kernels.bench decode [--queries N] [--rank R]`.
    """
    if device == "cpu" and T == 1:
        return {"plain": plain.decode, "sdpa": sdpa.decode}
    return {"sdpa": sdpa.decode, "plain": plain.decode}
