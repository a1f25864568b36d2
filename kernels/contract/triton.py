"""Factor contraction in Triton: RoPE, Σ_r a_r ⊗ b_r and 1/R in one pass, forward and backward.

Shapes: B batch, T tokens, N = B T of them, R rank (RP its padding for matrix products), H heads, D head dimension,
W turned dimensions, P = D/2 pairs.

A program does one token, with its heads in blocks. The head dimension is cut into the two sides of RoPE's pairs,
x1 and x2, each a tile of its own: turning is then arithmetic between tiles, in both directions.

    forward     out1[h, p] = (1/R) Σ_r a[r, h] y1[r, p],  y = RoPE(b)                             likewise 2
    backward    dA[r, h] = (1/R) Σ_p dOut1[h, p] y1[r, p] + dOut2[h, p] y2[r, p]
                g1[r, p] = (1/R) Σ_h a[r, h] dOut1[h, p],  dB = RoPEᵀ(g)

Out is written once, dOut read once; beside them move the factors only, which are some tenths of their size. The
matrix products are too small to matter (0.1 % of a step's): one side is the rank, padded to 16 where it is the inner
one (forward), else to 8.
"""

# Triton's own language is not Python's to a type checker, and the package may be absent.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportMissingImports=false, reportGeneralTypeIssues=false

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.rope.tables import alike

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


class Launch(NamedTuple):
    """How a kernel is cut up: heads of a block, warps of a program."""

    heads: int
    warps: int


@triton.jit
def _dot(x, y, UPCAST: tl.constexpr):
    # The interpreter's bfloat16 product is wrong.
    if UPCAST:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(x, y, input_precision="ieee")


@triton.jit
def _pairs(P: tl.constexpr, D: tl.constexpr, W: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Dimensions of both sides of each pair; what does not turn is paired too, in any order."""
    pairs_P = tl.arange(0, P)
    if INTERLEAVED:
        first = 2 * pairs_P
        second = first + 1
    elif W == 0 or W == D:
        first = pairs_P
        second = first + D // 2
    else:
        turns = pairs_P < W // 2
        first = tl.where(turns, pairs_P, pairs_P + W // 2)
        second = tl.where(turns, pairs_P + W // 2, pairs_P + D // 2)
    return first, second


@triton.jit
def _tables(cos_ptr, sin_ptr, at, P: tl.constexpr, W: tl.constexpr):
    """Cosines and sines (1, P) of one token; 1 and 0 where nothing turns."""
    pairs_P = tl.arange(0, P)
    cos_P = tl.load(cos_ptr + at + pairs_P, mask=pairs_P < W // 2, other=1.0).to(tl.float32)
    sin_P = tl.load(sin_ptr + at + pairs_P, mask=pairs_P < W // 2, other=0.0).to(tl.float32)
    return cos_P[None, :], sin_P[None, :]


@triton.jit
def _turned(x1, x2, cos, sin):
    """Both sides of RoPE, in x's dtype."""
    wide1 = x1.to(tl.float32)
    wide2 = x2.to(tl.float32)
    return (wide1 * cos + wide2 * sin).to(x1.dtype), (wide2 * cos - wide1 * sin).to(x2.dtype)


@triton.jit(do_not_specialize=["T"])
def _forward(
    a_ptr, b_ptr, cos_ptr, sin_ptr, out_ptr,
    T, a_row, a_token, b_row, b_token, table_row, table_token,
    H: tl.constexpr, D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, P: tl.constexpr,
    A_RANK: tl.constexpr, B_RANK: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out (N, H, D)."""
    first, second = _pairs(P, D, W, INTERLEAVED)
    ranks_R = tl.arange(0, RP)
    live_P = tl.arange(0, P) < D // 2
    n = tl.program_id(0)
    row = (n // T).to(tl.int64)
    t = (n % T).to(tl.int64)
    cos = 1.0
    sin = 0.0
    if W > 0:
        cos, sin = _tables(cos_ptr, sin_ptr, row * table_row + t * table_token, P, W)
    live_RP = (ranks_R < R)[:, None] & live_P[None, :]
    ptrs = b_ptr + row * b_row + t * b_token + ranks_R[:, None] * B_RANK
    y1 = tl.load(ptrs + first[None, :], mask=live_RP, other=0.0)
    y2 = tl.load(ptrs + second[None, :], mask=live_RP, other=0.0)
    if W > 0:
        y1, y2 = _turned(y1, y2, cos, sin)
    a_at = a_ptr + row * a_row + t * a_token
    out_at = out_ptr + n.to(tl.int64) * (H * D)
    for h in tl.static_range(0, H, HEADS):
        heads_H = h + tl.arange(0, HEADS)
        live_RH = (ranks_R < R)[:, None] & (heads_H < H)[None, :]
        a_RH = tl.load(a_at + ranks_R[:, None] * A_RANK + heads_H[None, :], mask=live_RH, other=0.0)
        a_HR = tl.trans(a_RH)
        live = (heads_H < H)[:, None] & live_P[None, :]
        ptrs = out_at + heads_H[:, None] * D
        out1 = _dot(a_HR, y1, UPCAST) * (1.0 / R)
        tl.store(ptrs + first[None, :], out1.to(out_ptr.dtype.element_ty), mask=live)
        out2 = _dot(a_HR, y2, UPCAST) * (1.0 / R)
        tl.store(ptrs + second[None, :], out2.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["T"])
def _backward(
    d_out_ptr, a_ptr, b_ptr, cos_ptr, sin_ptr, d_a_ptr, d_b_ptr,
    T, d_row, d_token, d_head, a_row, a_token, b_row, b_token, table_row, table_token, d_a_token, d_b_token,
    A_PAD: tl.constexpr, B_PAD: tl.constexpr, MOST_PAD: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, P: tl.constexpr,
    A_RANK: tl.constexpr, B_RANK: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dA (N, R, H) and dB (N, R, D) of dOut (N, H, D), each token's with so many zeros behind them.

    Heads and pairs come first in every tile, ranks last: a matrix product's last side may be as small as 8.
    """
    first, second = _pairs(P, D, W, INTERLEAVED)
    ranks_R = tl.arange(0, RP)
    live_R = ranks_R < R
    live_P = tl.arange(0, P) < D // 2
    live_PR = live_P[:, None] & live_R[None, :]
    n = tl.program_id(0)
    row = (n // T).to(tl.int64)
    t = (n % T).to(tl.int64)
    # All that is read is asked for before anything is computed of it.
    ptrs = b_ptr + row * b_row + t * b_token + ranks_R[None, :] * B_RANK
    y1 = tl.load(ptrs + first[:, None], mask=live_PR, other=0.0)
    y2 = tl.load(ptrs + second[:, None], mask=live_PR, other=0.0)
    cos = 1.0
    sin = 0.0
    if W > 0:
        turning_P = tl.arange(0, P)[:, None]
        table_at = row * table_row + t * table_token + turning_P
        cos = tl.load(cos_ptr + table_at, mask=turning_P < W // 2, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + table_at, mask=turning_P < W // 2, other=0.0).to(tl.float32)
    a_at = a_ptr + row * a_row + t * a_token
    d_out_at = d_out_ptr + row * d_row + t * d_token
    d_a_at = d_a_ptr + n.to(tl.int64) * d_a_token
    d_b_at = d_b_ptr + n.to(tl.int64) * d_b_token
    g1 = tl.zeros((P, RP), tl.float32)
    g2 = tl.zeros((P, RP), tl.float32)
    for h in tl.static_range(0, H, HEADS):
        heads_H = h + tl.arange(0, HEADS)
        live_HR = (heads_H < H)[:, None] & live_R[None, :]
        live = (heads_H < H)[:, None] & live_P[None, :]
        ptrs = d_out_at + heads_H[:, None] * d_head
        d1 = tl.load(ptrs + first[None, :], mask=live, other=0.0)
        d2 = tl.load(ptrs + second[None, :], mask=live, other=0.0)
        a_HR = tl.load(a_at + ranks_R[None, :] * A_RANK + heads_H[:, None], mask=live_HR, other=0.0)
        if W > 0 and h == 0:
            y1, y2 = _turned(y1, y2, cos, sin)
        g1 += _dot(tl.trans(d1), a_HR, UPCAST)
        g2 += _dot(tl.trans(d2), a_HR, UPCAST)
        d_a = _dot(d1, y1, UPCAST) + _dot(d2, y2, UPCAST)
        d_a = (d_a * (1.0 / R)).to(d_a_ptr.dtype.element_ty)
        tl.store(d_a_at + ranks_R[None, :] * H + heads_H[:, None], d_a, mask=live_HR)
    d_b1 = g1
    d_b2 = g2
    if W > 0:
        d_b1 = g1 * cos - g2 * sin
        d_b2 = g1 * sin + g2 * cos
    ptrs = d_b_at + ranks_R[None, :] * D
    d_b1 = (d_b1 * (1.0 / R)).to(d_b_ptr.dtype.element_ty)
    d_b2 = (d_b2 * (1.0 / R)).to(d_b_ptr.dtype.element_ty)
    tl.store(ptrs + first[:, None], d_b1, mask=live_PR)
    tl.store(ptrs + second[:, None], d_b2, mask=live_PR)
    if MOST_PAD > 0:
        behind = tl.arange(0, MOST_PAD)
        nothing = tl.zeros((MOST_PAD,), d_a_ptr.dtype.element_ty)
        tl.store(d_a_at + R * H + behind, nothing, mask=behind < A_PAD)
        tl.store(d_b_at + R * D + behind, nothing, mask=behind < B_PAD)


@triton.jit(do_not_specialize=["T"])
def _forward_qkv(
    record_ptr, q_cos_ptr, q_sin_ptr, k_cos_ptr, k_sin_ptr, q_ptr, k_ptr, v_ptr,
    T, row, token, q_table_row, q_table_token, k_table_row, k_table_token,
    Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """`_forward` of Q, K and V from one record: a program does one of them for one token. Q, K, V: see `_part`."""
    part = tl.program_id(1)
    if part == 0:
        _forward(
            record_ptr + Q[0], record_ptr + Q[1], q_cos_ptr, q_sin_ptr, q_ptr,
            T, row, token, row, token, q_table_row, q_table_token,
            Q[2], Q[3], Q[4], Q[5], Q[6], Q[7], Q[2], Q[3], INTERLEAVED, HEADS, UPCAST,
        )  # fmt: skip
    elif part == 1:
        _forward(
            record_ptr + K[0], record_ptr + K[1], k_cos_ptr, k_sin_ptr, k_ptr,
            T, row, token, row, token, k_table_row, k_table_token,
            K[2], K[3], K[4], K[5], K[6], K[7], K[2], K[3], INTERLEAVED, HEADS, UPCAST,
        )  # fmt: skip
    else:
        _forward(
            record_ptr + V[0], record_ptr + V[1], q_cos_ptr, q_sin_ptr, v_ptr,
            T, row, token, row, token, 0, 0,
            V[2], V[3], V[4], V[5], V[6], V[7], V[2], V[3], INTERLEAVED, HEADS, UPCAST,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def _backward_qkv(
    d_q_ptr, d_k_ptr, d_v_ptr, record_ptr, q_cos_ptr, q_sin_ptr, k_cos_ptr, k_sin_ptr, d_record_ptr,
    T, d_q_row, d_q_token, d_q_head, d_k_row, d_k_token, d_k_head, d_v_row, d_v_token, d_v_head, row, token,
    q_table_row, q_table_token, k_table_row, k_table_token, d_token,
    Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """`_backward` of Q, K and V into one record; a program does one of them for one token."""
    part = tl.program_id(1)
    if part == 0:
        _backward(
            d_q_ptr, record_ptr + Q[0], record_ptr + Q[1], q_cos_ptr, q_sin_ptr,
            d_record_ptr + Q[0], d_record_ptr + Q[1],
            T, d_q_row, d_q_token, d_q_head, row, token, row, token, q_table_row, q_table_token, d_token, d_token,
            Q[8], Q[9], Q[10], Q[2], Q[3], Q[4], Q[5], Q[6], Q[7], Q[2], Q[3], INTERLEAVED, HEADS, UPCAST,
        )  # fmt: skip
    elif part == 1:
        _backward(
            d_k_ptr, record_ptr + K[0], record_ptr + K[1], k_cos_ptr, k_sin_ptr,
            d_record_ptr + K[0], d_record_ptr + K[1],
            T, d_k_row, d_k_token, d_k_head, row, token, row, token, k_table_row, k_table_token, d_token, d_token,
            K[8], K[9], K[10], K[2], K[3], K[4], K[5], K[6], K[7], K[2], K[3], INTERLEAVED, HEADS, UPCAST,
        )  # fmt: skip
    else:
        _backward(
            d_v_ptr, record_ptr + V[0], record_ptr + V[1], q_cos_ptr, q_sin_ptr,
            d_record_ptr + V[0], d_record_ptr + V[1],
            T, d_v_row, d_v_token, d_v_head, row, token, row, token, 0, 0, d_token, d_token,
            V[8], V[9], V[10], V[2], V[3], V[4], V[5], V[6], V[7], V[2], V[3], INTERLEAVED, HEADS, UPCAST,
        )  # fmt: skip


def choose_launch(H: int, D: int, dtype: torch.dtype, backward: bool) -> Launch:
    """The fastest or close to it for 34, 47, 61 and 78 heads (H100, bfloat16, D = 64)."""
    if dtype == torch.float32 or D > 128:  # what a block holds would leave the registers
        return Launch(heads=16, warps=4)
    if not backward:
        return Launch(heads=64, warps=4)
    return Launch(heads=64 if 32 < H <= 64 and D <= 64 else 32, warps=1)


def _shape(
    a_BTRH: torch.Tensor, b_BTRD: torch.Tensor, cos: torch.Tensor | None, pairing: str, least_rank: int
) -> dict:
    R, H, D = *a_BTRH.shape[2:], b_BTRD.shape[-1]
    return {
        "H": H,
        "D": D,
        "W": 0 if cos is None else 2 * cos.shape[-1],
        "R": R,
        "RP": max(least_rank, triton.next_power_of_2(R)),
        "P": max(16, triton.next_power_of_2(D // 2)),
        "A_RANK": a_BTRH.stride(2) if R > 1 else 0,
        "B_RANK": b_BTRD.stride(2) if R > 1 else 0,
        "INTERLEAVED": pairing == "interleaved",
        "UPCAST": INTERPRETED,
    }


def _tables_of(
    cos: torch.Tensor | None, sin: torch.Tensor | None, unused: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Tables as a kernel reads them, both by the strides of (row, token) that follow; `unused` where there are none."""
    if cos is None or sin is None:
        return unused, unused, 0, 0
    cos, sin = alike(cos, sin)
    return cos, sin, cos.stride(0) if cos.dim() == 3 else 0, cos.stride(-2)


def _contiguous_last(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def forward(
    a_BTRH: torch.Tensor,
    b_BTRD: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    pairing: str,
    launch: Launch | None = None,
) -> torch.Tensor:
    """(B, T, H, D); any views."""
    B, T, _, H = a_BTRH.shape
    D = b_BTRD.shape[-1]
    a, b = _contiguous_last(a_BTRH), _contiguous_last(b_BTRD)
    out = torch.empty((B, T, H, D), dtype=a.dtype, device=a.device)
    heads, warps = launch or choose_launch(H, D, a.dtype, False)
    cos_at, sin_at, *table_strides = _tables_of(cos, sin, a)
    if out.numel():
        _forward[(B * T,)](
            a, b, cos_at, sin_at, out,
            T, *a.stride()[:2], *b.stride()[:2], *table_strides,
            **_shape(a, b, cos, pairing, 16), HEADS=heads, num_warps=warps,
        )  # fmt: skip
    return out


def backward(
    d_out_BTHD: torch.Tensor,
    a_BTRH: torch.Tensor,
    b_BTRD: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    pairing: str,
    launch: Launch | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dA (B, T, R, H) and dB (B, T, R, D), contiguous; any views."""
    d_a = torch.empty(a_BTRH.shape, dtype=a_BTRH.dtype, device=a_BTRH.device)
    d_b = torch.empty(b_BTRD.shape, dtype=b_BTRD.dtype, device=b_BTRD.device)
    B, T, R, H = a_BTRH.shape
    D = b_BTRD.shape[-1]
    a, b, d_out = _contiguous_last(a_BTRH), _contiguous_last(b_BTRD), _contiguous_last(d_out_BTHD)
    heads, warps = launch or choose_launch(H, D, a.dtype, True)
    cos_at, sin_at, *table_strides = _tables_of(cos, sin, a)
    if d_out.numel():
        _backward[(B * T,)](
            d_out, a, b, cos_at, sin_at, d_a, d_b,
            T, *d_out.stride()[:3], *a.stride()[:2], *b.stride()[:2], *table_strides, R * H, R * D,
            A_PAD=0, B_PAD=0, MOST_PAD=0, **_shape(a, b, cos, pairing, 8), HEADS=heads, num_warps=warps,
        )  # fmt: skip
    return d_a, d_b


def _part(numbers: Sequence[int], turn: torch.Tensor | None, least_rank: int, pads: tuple[int, int]) -> tuple:
    """What a kernel must know of a part of a record: a, b, H, D, W, R, RP, P; for gradients A_PAD, B_PAD, MOST_PAD."""
    a, b, rank, heads, width = numbers
    padded = max(least_rank, triton.next_power_of_2(rank)), max(16, triton.next_power_of_2(width // 2))
    most = triton.next_power_of_2(max(pads)) if max(pads) else 0
    return a, b, heads, width, 0 if turn is None else 2 * turn.shape[-1], rank, *padded, *pads, most


def _parts(parts, q_cos, k_cos, least_rank: int, pads) -> dict:
    turns = (q_cos, k_cos, None)
    found = (_part(*given) for given in zip(parts, turns, (least_rank,) * 3, pads, strict=True))
    return dict(zip("QKV", found, strict=True))


def _record_strides(record_BTN: torch.Tensor) -> tuple[int, int]:
    return (
        (record_BTN.stride(0), record_BTN.stride(1)) if record_BTN.shape[1] > 1 else (record_BTN.stride(0), 0)
    )


def forward_qkv(
    record_BTN: torch.Tensor,
    parts: Sequence[Sequence[int]],
    q_cos: torch.Tensor | None,
    q_sin: torch.Tensor | None,
    k_cos: torch.Tensor | None,
    k_sin: torch.Tensor | None,
    pairing: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q, K and V (B, T, H, D) in one launch; `parts` are kernels.contract.qkv.Part of each."""
    B, T = record_BTN.shape[:2]
    record = _contiguous_last(record_BTN)
    q, k, v = (record.new_empty(B, T, part[3], part[4]) for part in parts)
    heads, warps = choose_launch(parts[0][3], max(part[4] for part in parts), record.dtype, False)
    *q_tables, q_table_row, q_table_token = _tables_of(q_cos, q_sin, record)
    *k_tables, k_table_row, k_table_token = _tables_of(k_cos, k_sin, record)
    if record.numel():
        _forward_qkv[(B * T, 3)](
            record, *q_tables, *k_tables, q, k, v,
            T, *_record_strides(record), q_table_row, q_table_token, k_table_row, k_table_token,
            **_parts(parts, q_cos, k_cos, 16, ((0, 0),) * 3), INTERLEAVED=pairing == "interleaved",
            HEADS=heads, UPCAST=INTERPRETED, num_warps=warps,
        )  # fmt: skip
    return q, k, v


def backward_qkv(
    d_q: torch.Tensor,
    d_k: torch.Tensor,
    d_v: torch.Tensor,
    record_BTN: torch.Tensor,
    parts: Sequence[Sequence[int]],
    q_cos: torch.Tensor | None,
    q_sin: torch.Tensor | None,
    k_cos: torch.Tensor | None,
    k_sin: torch.Tensor | None,
    pairing: str,
) -> torch.Tensor:
    """The gradient of the record in one launch; 0 for what belongs to no part."""
    B, T, N = record_BTN.shape
    record = _contiguous_last(record_BTN)
    gradients = [_contiguous_last(x) for x in (d_q, d_k, d_v)]
    d_record = torch.empty(record.shape, dtype=record.dtype, device=record.device)
    # Behind each stretch of factors lie numbers of no part, up to the next: who writes it writes their zeros too.
    ends = sorted([start for part in parts for start in part[:2]] + [N])
    d_record[..., : ends[0]].zero_()

    def unused(start: int, length: int) -> int:
        return ends[ends.index(start) + 1] - start - length

    pads = [(unused(a, rank * heads), unused(b, rank * width)) for a, b, rank, heads, width in parts]
    heads, warps = choose_launch(parts[0][3], max(part[4] for part in parts), record.dtype, True)
    *q_tables, q_table_row, q_table_token = _tables_of(q_cos, q_sin, record)
    *k_tables, k_table_row, k_table_token = _tables_of(k_cos, k_sin, record)
    if record.numel():
        _backward_qkv[(B * T, 3)](
            *gradients, record, *q_tables, *k_tables, d_record,
            T, *(stride for x in gradients for stride in x.stride()[:3]), *_record_strides(record),
            q_table_row, q_table_token, k_table_row, k_table_token, N,
            **_parts(parts, q_cos, k_cos, 8, pads), INTERLEAVED=pairing == "interleaved",
            HEADS=heads, UPCAST=INTERPRETED, num_warps=warps,
        )  # fmt: skip
    return d_record
