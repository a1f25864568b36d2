"""Softmax attention over full keys and values; heads may share them in groups (GQA, MQA).

Shapes: B batch, T query tokens, M cached tokens, H heads, G KV heads, D head dimension, E value dimension.
"""

import torch

from kernels.attention import plain, sdpa
from kernels.dispatch import choose


def attention(
    q_BTHD: torch.Tensor,
    k_BMGD: torch.Tensor,
    v_BMGE: torch.Tensor,
    *,
    scale: float,
    causal: bool = True,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> torch.Tensor:
    """softmax(scale · q kᵀ) v per head; head h reads KV head h // (H/G).

    q_BTHD   (B, T, H, D), H a multiple of G
    k_BMGD   (B, M, G, D)
    v_BMGE   (B, M, G, E)
    causal   token t attends to tokens 0..t; needs T == M
    mask     bool (B, 1, T, M), True = may attend; a row without any True gives zeros. Needs causal=False
    dropout  probability with which an attention weight is dropped; 0 outside training
    backend  "auto", "sdpa" or "plain"
    returns  (B, T, H, E) in q's dtype

    Inputs may be any views. Raises ValueError for shapes or options that do not fit together.
    """
    B, T, H, D = q_BTHD.shape
    M, G = k_BMGD.shape[1:3]
    if k_BMGD.shape != (B, M, G, D) or v_BMGE.shape[:3] != (B, M, G) or H % G:
        raise ValueError(
            f"attention: q {tuple(q_BTHD.shape)}, k {tuple(k_BMGD.shape)}, v {tuple(v_BMGE.shape)} must be"
            " (B, T, H, D), (B, M, G, D), (B, M, G, E) with H a multiple of G"
        )
    if mask is not None and causal:
        raise ValueError("attention: mask and causal=True exclude each other; put the causal part into mask")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (B, 1, T, M)):
        raise ValueError(f"attention: mask must be bool {(B, 1, T, M)}, is {mask.dtype} {tuple(mask.shape)}")
    if causal and T != M:
        raise ValueError(f"attention: causal=True needs as many queries as keys, got T={T} and M={M}")
    run = choose("attention", backend, {"sdpa": sdpa.attention, "plain": plain.attention})
    return run(q_BTHD, k_BMGD, v_BMGE, scale, causal, mask, dropout)
