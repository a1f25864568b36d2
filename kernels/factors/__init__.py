"""TPA decoding's first step: the query from its factors and the rotated feature factors of the new key.

Shapes: B batch, T tokens, H heads, D head dimension, R rank of Q, S rank of K.
"""

import torch

from kernels.decode import MOST_QUERIES, TRITON_DTYPES
from kernels.dispatch import check_floats, choose, why_no_derivative
from kernels.factors import plain
from kernels.place import lies_side_by_side, why_no_triton_at
from kernels.rope import Tables, check_tables


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
    Raises ValueError for factors of different B, T, R or D or without a rank, for tables that are missing or do not
    fit, and for a backend that is unknown or cannot run.
    """
    tensors = (a_q_BTRH, b_q_BTRD, b_k_BTSD)
    _check(*tensors, queries, keys, pairing)
    why_not = _why_not_triton(tensors, (*queries, *keys))
    run = choose(
        "query_and_key",
        backend,
        {"triton": _triton, "plain": plain.query_and_key},
        {"triton": why_not} if why_not else None,
    )
    return run(*tensors, queries, keys, pairing)


def _check(
    a_q_BTRH: torch.Tensor,
    b_q_BTRD: torch.Tensor,
    b_k_BTSD: torch.Tensor,
    queries: Tables,
    keys: Tables,
    pairing: str,
) -> None:
    """Raises ValueError where these do not fit together."""
    factors = {"a_q": a_q_BTRH, "b_q": b_q_BTRD, "b_k": b_k_BTSD}
    fits = all(x.dim() == 4 and min(x.shape[2:]) > 0 for x in factors.values())
    fits = fits and a_q_BTRH.shape[:3] == b_q_BTRD.shape[:3]
    fits = fits and b_k_BTSD.shape[:2] == b_q_BTRD.shape[:2] and b_k_BTSD.shape[3] == b_q_BTRD.shape[3]
    if not fits:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in factors.items())
        raise ValueError(
            f"query_and_key: {shapes}; allowed: (B, T, R, H), (B, T, R, D) and (B, T, S, D), where R, H, S and D"
            " are at least 1"
        )
    check_floats("query_and_key", factors)
    for name, tables, x in (("queries", queries, b_q_BTRD), ("keys", keys, b_k_BTSD)):
        if tables is None or any(table is None for table in tables):
            raise ValueError(f"query_and_key: give both cos and sin of {name}")
        check_tables("query_and_key", *tables, x.shape, pairing)


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
    if not all(lies_side_by_side(x) for x in tensors) or not all(x.is_contiguous() for x in tables):
        return "tables must be contiguous, and the last dimension of the factors"
    return why_no_derivative(*tensors, *tables)
