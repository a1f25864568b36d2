"""The query from its factors and the rotated feature factors of the new key in one launch.

Shapes: N tokens of all rows, H heads, D head dimension, P pairs that turn (D/2), R rank of Q, S rank of K.
"""

# Triton's own language is not Python's to a type checker, and the package may be absent.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportMissingImports=false

import os

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

OVERLAP = os.environ.get("TRITON_INTERPRET", "0") != "1"
# Heads of a program.
HEADS = 16


@triton.jit
def _turn(ptr, at, pairs, live, cos, sin, D: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Both members of each pair, rotated, float32."""
    if INTERLEAVED:
        x1 = tl.load(ptr + at + 2 * pairs, mask=live, other=0.0).to(tl.float32)
        x2 = tl.load(ptr + at + 2 * pairs + 1, mask=live, other=0.0).to(tl.float32)
    else:
        x1 = tl.load(ptr + at + pairs, mask=live, other=0.0).to(tl.float32)
        x2 = tl.load(ptr + at + pairs + D // 2, mask=live, other=0.0).to(tl.float32)
    return x1 * cos + x2 * sin, x2 * cos - x1 * sin


@triton.jit
def _put(ptr, at, pairs, live, y1, y2, D: tl.constexpr, INTERLEAVED: tl.constexpr):
    kind = ptr.dtype.element_ty
    if INTERLEAVED:
        tl.store(ptr + at + 2 * pairs, y1.to(kind), mask=live)
        tl.store(ptr + at + 2 * pairs + 1, y2.to(kind), mask=live)
    else:
        tl.store(ptr + at + pairs, y1.to(kind), mask=live)
        tl.store(ptr + at + pairs + D // 2, y2.to(kind), mask=live)


VARYING = [
    "T", "a_row", "a_token", "a_rank", "b_row", "b_token", "b_rank", "k_row", "k_token", "k_rank",
    "q_cos_row", "q_cos_token", "k_cos_row", "k_cos_token",
]  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def _query_and_key(
    a_ptr, b_ptr, k_ptr, q_cos_ptr, q_sin_ptr, k_cos_ptr, k_sin_ptr, q_ptr, key_ptr,
    T, a_row, a_token, a_rank, b_row, b_token, b_rank, k_row, k_token, k_rank,
    q_cos_row, q_cos_token, k_cos_row, k_cos_token,
    H: tl.constexpr, D: tl.constexpr, R: tl.constexpr, S: tl.constexpr, P_PADDED: tl.constexpr,
    HEADS: tl.constexpr, INTERLEAVED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    row, t = token // T, token % T
    heads_H = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pairs_P = tl.arange(0, P_PADDED)
    live_P = pairs_P < D // 2
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    at = row * q_cos_row + t * q_cos_token + pairs_P
    cos_P = tl.load(q_cos_ptr + at, mask=live_P, other=0.0)
    sin_P = tl.load(q_sin_ptr + at, mask=live_P, other=0.0)
    q1_HP = tl.zeros((HEADS, P_PADDED), tl.float32)
    q2_HP = tl.zeros((HEADS, P_PADDED), tl.float32)
    for r in tl.static_range(R):
        a_H = tl.load(a_ptr + row * a_row + t * a_token + r * a_rank + heads_H, mask=heads_H < H, other=0.0)
        b1_P, b2_P = _turn(
            b_ptr, row * b_row + t * b_token + r * b_rank, pairs_P, live_P, cos_P, sin_P, D, INTERLEAVED
        )
        q1_HP += a_H.to(tl.float32)[:, None] * b1_P[None, :]
        q2_HP += a_H.to(tl.float32)[:, None] * b2_P[None, :]
    live_HP = (heads_H < H)[:, None] & live_P[None, :]
    at_H1 = ((token.to(tl.int64) * H + heads_H) * D)[:, None]
    _put(q_ptr, at_H1, pairs_P[None, :], live_HP, q1_HP / R, q2_HP / R, D, INTERLEAVED)
    if tl.program_id(1) == 0:
        at = row * k_cos_row + t * k_cos_token + pairs_P
        cos_P = tl.load(k_cos_ptr + at, mask=live_P, other=0.0)
        sin_P = tl.load(k_sin_ptr + at, mask=live_P, other=0.0)
        for s in tl.static_range(S):
            k1_P, k2_P = _turn(
                k_ptr, row * k_row + t * k_token + s * k_rank, pairs_P, live_P, cos_P, sin_P, D, INTERLEAVED
            )
            _put(key_ptr, (token * S + s) * D, pairs_P, live_P, k1_P, k2_P, D, INTERLEAVED)


def query_and_key(
    a_q_BTRH: torch.Tensor,
    b_q_BTRD: torch.Tensor,
    b_k_BTSD: torch.Tensor,
    queries: tuple[torch.Tensor, torch.Tensor],
    keys: tuple[torch.Tensor, torch.Tensor],
    pairing: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.factors.query_and_key`; tables (B, T, D/2)."""
    B, T, R, H = a_q_BTRH.shape
    S, D = b_k_BTSD.shape[2:]
    q_BTHD = torch.empty((B, T, H, D), dtype=a_q_BTRH.dtype, device=a_q_BTRH.device)
    key_BTSD = torch.empty((B, T, S, D), dtype=a_q_BTRH.dtype, device=a_q_BTRH.device)
    _query_and_key[(B * T, triton.cdiv(H, HEADS))](
        a_q_BTRH, b_q_BTRD, b_k_BTSD, *queries, *keys, q_BTHD, key_BTSD,
        T, *a_q_BTRH.stride()[:3], *b_q_BTRD.stride()[:3], *b_k_BTSD.stride()[:3],
        *queries[0].stride()[:2], *keys[0].stride()[:2],
        H=H, D=D, R=R, S=S, P_PADDED=triton.next_power_of_2(D // 2), HEADS=HEADS,
        INTERLEAVED=pairing == "interleaved", OVERLAP=OVERLAP,
        num_warps=4, **({"launch_pdl": True} if OVERLAP else {}),
    )  # fmt: skip
    return q_BTHD, key_BTSD
