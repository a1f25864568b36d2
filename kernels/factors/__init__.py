"""TPA decoding's first step: the query from its factors and the rotated feature factors of the new key.

Shapes: B batch, T tokens, H heads, D head dimension, R rank of Q, S rank of K.
"""

import torch

from kernels.decode import MOST_QUERIES, TRITON_DTYPES
from kernels.dispatch import choose, why_no_derivative
from kernels.factors import plain
from kernels.place import why_no_triton_at
from kernels.rope import Tables


def query_and_key(
    a_q_BTRH: torch.Tensor,
    b_q_BTRD: torch.Tensor,
    b_k_BTSD: torch.Tensor,
    queries: Tables,
    keys: Tables,
    *,
    pairing: str = "halves",
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Q = (1/R) Σ_r a_r ⊗ RoPE(b_r) (eq. 3.1 and 3.2), and RoPE(b_k), which is what the cache keeps.

    a_q_BTRH       (B, T, R, H) head factors of Q
    b_q_BTRD       (B, T, R, D) feature factors of Q
    b_k_BTSD       (B, T, S, D) feature factors of K
    queries, keys  cosines and sines, (T, W/2) or (B, T, W/2), float32: see `kernels.rope.rotate`
    pairing        which dimensions RoPE pairs: "halves" or "interleaved"
    backend        "auto", "triton" or "plain"
    returns        (B, T, H, D) and (B, T, S, D)

    "triton" does both in one launch, for a few tokens; it has no backward pass.
    Raises ValueError for a backend that is unknown or cannot run.
    """
    tensors = (a_q_BTRH, b_q_BTRD, b_k_BTSD)
    why_not = _why_not_triton(tensors, (*queries, *keys))
    run = choose(
        "query_and_key",
        backend,
        {"triton": _triton, "plain": plain.query_and_key},
        {"triton": why_not} if why_not else None,
    )
    return run(*tensors, queries, keys, pairing)


def _triton(*arguments):
    # Imported here: the package is absent on most machines without a GPU.
    from kernels.factors import triton

    return triton.query_and_key(*arguments)


def _why_not_triton(tensors: tuple[torch.Tensor, ...], tables: tuple[torch.Tensor, ...]) -> str | None:
    """One sentence, or None where the Triton kernel runs."""
    a_q, b_q, _ = tensors
    B, T, _, D = b_q.shape
    if torch.compiler.is_compiling():
        return "the compiler makes its own"
    why = why_no_triton_at(a_q, only_hopper="it is made for the launches of an H100 or later")
    if why:
        return why
    if T > MOST_QUERIES:
        return f"it takes at most {MOST_QUERIES} tokens"
    if any(x.dtype != a_q.dtype for x in tensors) or a_q.dtype not in TRITON_DTYPES:
        return "factors must all be float16, all bfloat16 or all float32"
    if any(x.shape != (B, T, D // 2) or x.dtype != torch.float32 for x in tables) or D % 2:
        return "all dimensions must turn, by float32 tables of each row"
    if any(x.stride(-1) != 1 for x in tensors) or any(not x.is_contiguous() for x in tables):
        return "tables must be contiguous, and the last dimension of the factors"
    return why_no_derivative(*tensors, *tables)
