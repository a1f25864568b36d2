"""FlashTPA decoding in Triton: two launches, K and V of the cache are never formed (section 5).

Shapes: B rows of the cache, T query tokens, M cached tokens of a row, H heads, D head dimension, E value
dimension, S rank of K, U rank of V; W columns, one for each (query token, head) of a program; N cached tokens of
a tile; G segments.

The first kernel runs a fixed number of programs, whatever the batch and the lengths. They share the cached tokens
of all rows equally: each takes one run of consecutive grains (16 tokens, or a tile where there are pages), which
may end one row and begin the next. One program holds all heads it can, because they share the b factors:

    s[n, w] = Σ_s a_k[n, s, w] (b_k[n, s] · q[w])          p = 2^(s - max)
    o[e, w] = Σ_u Σ_n b_v[n, u, e] (p[n, w] a_v[n, u, w])

with tokens on the wide side of the matrix products, or heads where a program has 64 columns or more: then max and
Σ p stay within a warp, and p goes from one product to the next in registers.

Each part of a row in one program is a segment; it leaves o, max and Σ p in float32, and the second kernel merges the
segments of each row in their order, so that equal inputs give equal bits.
"""

# Triton's own language is not Python's to a type checker, and the package may be absent.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportMissingImports=false
# pyright: reportGeneralTypeIssues=false

import math
import os
from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.decode.launch import Launch, choose_launch, columns, padded, power_of_2, readable, strides

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
# Programmatic dependent launch: each kernel starts while the one before it drains.
OVERLAP = not INTERPRETED
# Rows whose lengths a warp reads at once: the batch itself is never a constant.
ROWS = 32
# Tokens of the smallest share of the work, so that programs differ by no more than that.
GRAIN = 16
# A finite stand-in for -inf: the running maximum of a column that has seen nothing. 2^(-inf - LOWEST) is 0.
LOWEST = tl.constexpr(-1e30)
# Programs of the interpreter stand in for multiprocessors: a few, so that segments cross rows.
INTERPRETED_PROGRAMS = 5


@triton.jit
def _length(lengths_ptr, row, n_rows, capacity, RAGGED: tl.constexpr):
    """Cached tokens of `row`, a scalar or a block; 0 past the last row."""
    if RAGGED:
        length = tl.load(lengths_ptr + row, mask=row < n_rows, other=0).to(tl.int32)
        return tl.minimum(tl.maximum(length, 0), capacity)
    else:
        return tl.where(row < n_rows, capacity, 0)


@triton.jit
def _ceil(x, y: tl.constexpr):
    return (x + y - 1) // y


@triton.jit
def _load(
    ptr, at, live_N, x_X, N: tl.constexpr, TOKEN: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr
):
    """(N, X) factors of one rank; what lies past the row or past WIDTH reads as 0."""
    ptrs = ptr + at + tl.arange(0, N)[:, None] * TOKEN + x_X[None, :]
    live = live_N[:, None]
    if WIDTH < PADDED:
        live = live & (x_X < WIDTH)[None, :]
    return tl.load(ptrs, mask=live, other=0.0)


@triton.jit
def _dot(x, y, UPCAST: tl.constexpr):
    # The interpreter's bfloat16 product is wrong.
    if UPCAST:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(x, y, input_precision="ieee")


# A tile is (N, W), or (W, N) with HEADS_FIRST; the same for what is written once for both.


@triton.jit
def _along_tokens(x_N, HEADS_FIRST: tl.constexpr):
    return x_N[None, :] if HEADS_FIRST else x_N[:, None]


@triton.jit
def _along_heads(x_W, HEADS_FIRST: tl.constexpr):
    return x_W[:, None] if HEADS_FIRST else x_W[None, :]


@triton.jit
def _times_heads(
    x, a_NH, column_WH, N: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr, HEADS_FIRST: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """x[n, (t, h)] a[n, h]."""
    if HEADS_FIRST:
        # A product with ones and zeros is exact: it transposes a and repeats it for each query token inside the
        # tensor cores, where the alternative is a trip through registers and shared memory.
        return x * _dot(column_WH, tl.trans(a_NH), UPCAST)
    elif QUERIES == 1:
        return x * a_NH.to(tl.float32)
    else:
        x_NTH = tl.reshape(x, (N, QUERIES, HEADS)) * a_NH.to(tl.float32)[:, None, :]
        return tl.reshape(x_NTH, (N, QUERIES * HEADS))


@triton.jit
def _new_token(ptr, at, rank_stride, x_X, live_X, RANKS: tl.constexpr, RANKS_PADDED: tl.constexpr):
    """(R, X): the factors of all ranks of one new token."""
    ranks = tl.arange(0, RANKS_PADDED)
    live = (ranks < RANKS)[:, None] & live_X[None, :]
    return tl.load(ptr + at + ranks[:, None] * rank_stride + x_X[None, :], mask=live, other=0.0)


@triton.jit
def _put(ptr, at, x_RX, x_X, live_X, RANK: tl.constexpr, RANKS: tl.constexpr, RANKS_PADDED: tl.constexpr):
    ranks = tl.arange(0, RANKS_PADDED)
    live = (ranks < RANKS)[:, None] & live_X[None, :]
    tl.store(ptr + at + ranks[:, None] * RANK + x_X[None, :], x_RX, mask=live)


@triton.jit
def _share(
    lengths_ptr, n_rows, capacity, RAGGED: tl.constexpr, GRAIN: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """This program's grains [begin, end) among those of all rows, the row of the first, and where that begins.

    The first ROWS rows are read once for all.
    """
    rows = tl.arange(0, ROWS)
    grains = _ceil(_length(lengths_ptr, rows, n_rows, capacity, RAGGED), GRAIN)
    past = tl.cumsum(grains, 0)
    n_grains = tl.sum(grains, 0)
    for first in range(ROWS, n_rows, ROWS):
        lengths = _length(lengths_ptr, first + rows, n_rows, capacity, RAGGED)
        n_grains += tl.sum(_ceil(lengths, GRAIN), 0)
    n_working = tl.maximum(tl.minimum(tl.num_programs(0), _ceil(n_grains, N // GRAIN)), 1)
    program = tl.program_id(0)
    begin = program * n_grains // n_working
    end = tl.minimum((program + 1) * n_grains // n_working, n_grains)
    row = tl.sum(((past <= begin) & (rows < n_rows)).to(tl.int32), 0)
    row_begin = tl.max(tl.where(past <= begin, past, 0), 0)
    for first in range(ROWS, n_rows, ROWS):
        grains = _ceil(_length(lengths_ptr, first + rows, n_rows, capacity, RAGGED), GRAIN)
        past = tl.max(past, 0) + tl.cumsum(grains, 0)
        row += tl.sum(((past <= begin) & (first + rows < n_rows)).to(tl.int32), 0)
        row_begin = tl.maximum(row_begin, tl.max(tl.where(past <= begin, past, 0), 0))
    return begin, end, row, row_begin


VARYING = [
    "n_rows", "capacity", "n_queries", "q_row", "q_query", "q_head", "a_k_row", "b_k_row", "a_v_row", "b_v_row",
    "pages_row", *(f"new_{name}_{of}" for name in ("a_k", "b_k", "a_v", "b_v") for of in ("row", "token", "rank")),
]  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def _attend(
    q_ptr, a_k_ptr, b_k_ptr, a_v_ptr, b_v_ptr, lengths_ptr, pages_ptr, o_ptr, highest_ptr, total_ptr,
    new_a_k_ptr, new_b_k_ptr, new_a_v_ptr, new_b_v_ptr,
    n_rows, capacity, n_queries, q_row, q_query, q_head, a_k_row, b_k_row, a_v_row, b_v_row, pages_row,
    new_a_k_row, new_a_k_token, new_a_k_rank, new_b_k_row, new_b_k_token, new_b_k_rank,
    new_a_v_row, new_a_v_token, new_a_v_rank, new_b_v_row, new_b_v_token, new_b_v_rank, scale,
    NEW_A_K: tl.constexpr, NEW_B_K: tl.constexpr, NEW_A_V: tl.constexpr, NEW_B_V: tl.constexpr,
    S_PADDED: tl.constexpr, U_PADDED: tl.constexpr,
    RAGGED: tl.constexpr, PAGE: tl.constexpr, GRAIN: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, E: tl.constexpr, S: tl.constexpr, U: tl.constexpr,
    A_K_TOKEN: tl.constexpr, A_K_RANK: tl.constexpr, A_K_UNIT: tl.constexpr, A_K_WIDTH: tl.constexpr,
    B_K_TOKEN: tl.constexpr, B_K_RANK: tl.constexpr, B_K_UNIT: tl.constexpr,
    A_V_TOKEN: tl.constexpr, A_V_RANK: tl.constexpr, A_V_UNIT: tl.constexpr, A_V_WIDTH: tl.constexpr,
    B_V_TOKEN: tl.constexpr, B_V_RANK: tl.constexpr, B_V_UNIT: tl.constexpr,
    N: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr,
    HEADS_FIRST: tl.constexpr, ROWS: tl.constexpr, UPCAST: tl.constexpr, OVERLAP: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """o (G, T, H, E), highest and total (G, T, H) of every segment; G = program + row.

    Row strides come in units of the alignment that all addresses of that factor share, so that the compiler
    sees it. PAGE > 0: rows of the factors are pages of that many tokens, found through `pages`.
    """
    W: tl.constexpr = QUERIES * HEADS
    HEAD_GROUPS: tl.constexpr = (H + HEADS - 1) // HEADS
    H_PADDED: tl.constexpr = HEAD_GROUPS * HEADS
    TOKENS: tl.constexpr = 1 if HEADS_FIRST else 0
    group = tl.program_id(1)
    offsets_D = tl.arange(0, D_PADDED)
    offsets_E = tl.arange(0, E_PADDED)
    if HEAD_GROUPS == 1:
        first_head = 0
    else:
        first_head = (group % HEAD_GROUPS) * HEADS
    first_query = (group // HEAD_GROUPS) * QUERIES
    heads_H = first_head + tl.arange(0, HEADS)
    heads_W = first_head + tl.arange(0, W) % HEADS
    queries_W = first_query + tl.arange(0, W) // HEADS
    live_W = (heads_W < H) & (queries_W < n_queries)
    column_WH = (heads_W[:, None] == heads_H[None, :]).to(tl.float32).to(a_k_ptr.dtype.element_ty)
    if OVERLAP:
        # Whatever ran before has now finished, so the second kernel may start and wait for this one.
        gdc_wait()
        gdc_launch_dependents()

    # 64 bits, where tokens times strides may need them.
    wide = tl.full((), 1, tl.int64)

    program = tl.program_id(0)
    begin, end, row, row_begin = _share(lengths_ptr, n_rows, capacity, RAGGED, GRAIN, N, ROWS)
    while begin < end:
        length = _length(lengths_ptr, row, n_rows, capacity, RAGGED)
        row_end = row_begin + _ceil(length, GRAIN)
        stop = tl.minimum(end, row_end)
        first_token = (begin - row_begin) * GRAIN
        past_token = tl.minimum((stop - row_begin) * GRAIN, length)
        if NEW_A_K or NEW_B_K or NEW_A_V or NEW_B_V:
            # Each program writes the new tokens that it reads; programs that share them write the same.
            live_H = heads_H < H
            live_D = offsets_D < D
            live_E = offsets_E < E
            oldest = tl.maximum(length - n_queries, 0)
            for token in range(tl.maximum(first_token, oldest), past_token):
                at_row = row.to(tl.int64)
                nth = token - (length - n_queries)
                if PAGE > 0:
                    block = tl.load(pages_ptr + row * pages_row + token // PAGE).to(tl.int64)
                    at = (token % PAGE) * wide
                else:
                    block = at_row
                    at = token * wide
                # All are loaded before the first is stored: one wait for all.
                if NEW_A_K:
                    from_a_k = at_row * new_a_k_row + nth * new_a_k_token
                    a_k_RH = _new_token(new_a_k_ptr, from_a_k, new_a_k_rank, heads_H, live_H, S, S_PADDED)
                if NEW_B_K:
                    from_b_k = at_row * new_b_k_row + nth * new_b_k_token
                    b_k_RD = _new_token(new_b_k_ptr, from_b_k, new_b_k_rank, offsets_D, live_D, S, S_PADDED)
                if NEW_A_V:
                    from_a_v = at_row * new_a_v_row + nth * new_a_v_token
                    a_v_RH = _new_token(new_a_v_ptr, from_a_v, new_a_v_rank, heads_H, live_H, U, U_PADDED)
                if NEW_B_V:
                    from_b_v = at_row * new_b_v_row + nth * new_b_v_token
                    b_v_RE = _new_token(new_b_v_ptr, from_b_v, new_b_v_rank, offsets_E, live_E, U, U_PADDED)
                if NEW_A_K:
                    _put(
                        a_k_ptr, block * a_k_row * A_K_UNIT + at * A_K_TOKEN, a_k_RH, heads_H, live_H,
                        A_K_RANK, S, S_PADDED,
                    )  # fmt: skip
                if NEW_B_K:
                    _put(
                        b_k_ptr, block * b_k_row * B_K_UNIT + at * B_K_TOKEN, b_k_RD, offsets_D, live_D,
                        B_K_RANK, S, S_PADDED,
                    )  # fmt: skip
                if NEW_A_V:
                    _put(
                        a_v_ptr, block * a_v_row * A_V_UNIT + at * A_V_TOKEN, a_v_RH, heads_H, live_H,
                        A_V_RANK, U, U_PADDED,
                    )  # fmt: skip
                if NEW_B_V:
                    _put(
                        b_v_ptr, block * b_v_row * B_V_UNIT + at * B_V_TOKEN, b_v_RE, offsets_E, live_E,
                        B_V_RANK, U, U_PADDED,
                    )  # fmt: skip
            # What one thread has written, others are about to read.
            tl.debug_barrier()
        q_at = q_ptr + row.to(tl.int64) * q_row
        # Queries are the last tokens of the row: each sees itself and what came before.
        if HEADS_FIRST:
            q_ptrs = q_at + (queries_W * q_query + heads_W * q_head)[:, None] + offsets_D[None, :]
            q = tl.load(q_ptrs, mask=live_W[:, None] & (offsets_D < D)[None, :], other=0.0)
            o = tl.zeros((W, E_PADDED), tl.float32)
        else:
            q_ptrs = q_at + (queries_W * q_query + heads_W * q_head)[None, :] + offsets_D[:, None]
            q = tl.load(q_ptrs, mask=live_W[None, :] & (offsets_D < D)[:, None], other=0.0)
            o = tl.zeros((E_PADDED, W), tl.float32)
        total_W = tl.zeros((W,), tl.float32)
        highest_W = tl.full((W,), LOWEST, tl.float32)
        if PAGE > 0:
            page = tl.load(pages_ptr + row * pages_row + first_token // PAGE)
        for start in tl.range(first_token, past_token, N, num_stages=STAGES):
            tokens_N = start + tl.arange(0, N)
            live_N = tokens_N < past_token
            if PAGE > 0:
                block = page.to(tl.int64)
                # Read one tile ahead: the loads of the next tile wait for it.
                page = tl.load(pages_ptr + row * pages_row + tl.minimum(start + N, past_token - 1) // PAGE)
                at = (start % PAGE) * wide
            else:
                block = row.to(tl.int64)
                at = start * wide
            a_k_at = block * a_k_row * A_K_UNIT + at * A_K_TOKEN
            b_k_at = block * b_k_row * B_K_UNIT + at * B_K_TOKEN
            a_v_at = block * a_v_row * A_V_UNIT + at * A_V_TOKEN
            b_v_at = block * b_v_row * B_V_UNIT + at * B_V_TOKEN

            logits = 0.0
            for s in tl.static_range(S):
                b_ND = _load(b_k_ptr, b_k_at + s * B_K_RANK, live_N, offsets_D, N, B_K_TOKEN, D, D_PADDED)
                a_NH = _load(
                    a_k_ptr, a_k_at + s * A_K_RANK, live_N, heads_H, N, A_K_TOKEN, A_K_WIDTH, H_PADDED
                )
                dots = _dot(q, tl.trans(b_ND), UPCAST) if HEADS_FIRST else _dot(b_ND, q, UPCAST)
                logits += _times_heads(dots, a_NH, column_WH, N, QUERIES, HEADS, HEADS_FIRST, UPCAST)
            if RAGGED and QUERIES > 1:
                visible_W = tl.minimum(length - (n_queries - 1 - queries_W), past_token)
                sees = _along_tokens(tokens_N, HEADS_FIRST) < _along_heads(visible_W, HEADS_FIRST)
                logits = tl.where(sees, logits * scale, -float("inf"))
            else:
                visible = past_token
                if RAGGED:
                    visible = tl.minimum(length - (n_queries - 1 - first_query), past_token)
                bias_N = tl.where(tokens_N < visible, 0.0, -float("inf"))
                logits = logits * scale + _along_tokens(bias_N, HEADS_FIRST)

            new_highest_W = tl.maximum(highest_W, tl.max(logits, TOKENS))
            p = tl.exp2(logits - _along_heads(new_highest_W, HEADS_FIRST))
            shrink_W = tl.exp2(highest_W - new_highest_W)
            total_W = total_W * shrink_W + tl.sum(p, TOKENS)
            o *= _along_heads(shrink_W, HEADS_FIRST)
            for u in tl.static_range(U):
                a_NH = _load(
                    a_v_ptr, a_v_at + u * A_V_RANK, live_N, heads_H, N, A_V_TOKEN, A_V_WIDTH, H_PADDED
                )
                b_NE = _load(b_v_ptr, b_v_at + u * B_V_RANK, live_N, offsets_E, N, B_V_TOKEN, E, E_PADDED)
                weights = _times_heads(p, a_NH, column_WH, N, QUERIES, HEADS, HEADS_FIRST, UPCAST)
                weights = weights.to(b_NE.dtype)
                o += _dot(weights, b_NE, UPCAST) if HEADS_FIRST else _dot(tl.trans(b_NE), weights, UPCAST)
            highest_W = new_highest_W

        segment = (program + row).to(tl.int64)
        columns_W = (segment * n_queries + queries_W) * H + heads_W
        tl.store(highest_ptr + columns_W, highest_W, mask=live_W)
        tl.store(total_ptr + columns_W, total_W, mask=live_W)
        if HEADS_FIRST:
            o_ptrs = o_ptr + columns_W[:, None] * E + offsets_E[None, :]
            tl.store(o_ptrs, o, mask=live_W[:, None] & (offsets_E < E)[None, :])
        else:
            o_ptrs = o_ptr + columns_W[None, :] * E + offsets_E[:, None]
            tl.store(o_ptrs, o, mask=live_W[None, :] & (offsets_E < E)[:, None])
        begin = stop
        row_begin = row_end
        row += 1


@triton.jit(do_not_specialize=["n_rows", "capacity", "n_programs", "n_columns"])
def _merge(
    o_ptr, highest_ptr, total_ptr, lengths_ptr, out_ptr, n_rows, capacity, n_programs, n_columns,
    RAGGED: tl.constexpr, GRAIN: tl.constexpr, E: tl.constexpr, E_PADDED: tl.constexpr, U: tl.constexpr,
    N: tl.constexpr, SEGMENTS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out (B, T, H, E): the segments of one row for COLUMNS of its (query token, head) columns."""
    row = tl.program_id(0)
    offsets_E = tl.arange(0, E_PADDED)
    columns_W = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if OVERLAP:
        gdc_launch_dependents()
    n_grains = 0
    row_begin = 0
    for first in range(0, n_rows, ROWS):
        rows = first + tl.arange(0, ROWS)
        grains = _ceil(_length(lengths_ptr, rows, n_rows, capacity, RAGGED), GRAIN)
        n_grains += tl.sum(grains, 0)
        row_begin += tl.sum(tl.where(rows < row, grains, 0), 0)
    row_end = row_begin + _ceil(_length(lengths_ptr, row, n_rows, capacity, RAGGED), GRAIN)
    n_working = tl.minimum(n_programs, _ceil(n_grains, N // GRAIN))
    # The program of a grain is the last one whose first grain is not past it; see `begin` in _attend.
    begin = row + ((row_begin + 1) * n_working - 1) // tl.maximum(n_grains, 1)
    end = row + 1 + (row_end * n_working - 1) // tl.maximum(n_grains, 1)
    end = tl.where(row_end > row_begin, end, begin)
    if OVERLAP:
        gdc_wait()

    live_W = columns_W < n_columns
    o_WE = tl.zeros((COLUMNS, E_PADDED), tl.float32)
    total_W = tl.zeros((COLUMNS,), tl.float32)
    highest_W = tl.full((COLUMNS,), LOWEST, tl.float32)
    for first in range(begin, end, SEGMENTS):
        segments_G = first + tl.arange(0, SEGMENTS)
        live_GW = (segments_G < end)[:, None] & live_W[None, :]
        at_GW = segments_G.to(tl.int64)[:, None] * n_columns + columns_W[None, :]
        highest_GW = tl.load(highest_ptr + at_GW, mask=live_GW, other=-float("inf"))
        total_GW = tl.load(total_ptr + at_GW, mask=live_GW, other=0.0)
        live_GWE = live_GW[:, :, None] & (offsets_E < E)[None, None, :]
        o_GWE = tl.load(o_ptr + at_GW[:, :, None] * E + offsets_E[None, None, :], mask=live_GWE, other=0.0)
        new_highest_W = tl.maximum(highest_W, tl.max(highest_GW, 0))
        weight_GW = tl.exp2(highest_GW - new_highest_W[None, :])
        shrink_W = tl.exp2(highest_W - new_highest_W)
        total_W = total_W * shrink_W + tl.sum(weight_GW * total_GW, 0)
        o_WE = o_WE * shrink_W[:, None] + tl.sum(weight_GW[:, :, None] * o_GWE, 0)
        highest_W = new_highest_W
    # The largest logit of a column contributes 1: a total below that has seen nothing, and 0 stays 0.
    o_WE = o_WE / (U * tl.maximum(total_W, 1.0))[:, None]
    out_ptrs = out_ptr + (row.to(tl.int64) * n_columns + columns_W)[:, None] * E + offsets_E[None, :]
    tl.store(out_ptrs, o_WE.to(out_ptr.dtype.element_ty), mask=live_W[:, None] & (offsets_E < E)[None, :])


def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def decode(
    q_BTHD: torch.Tensor,
    a_k_BMSH: torch.Tensor,
    b_k_BMSD: torch.Tensor,
    a_v_BMUH: torch.Tensor,
    b_v_BMUE: torch.Tensor,
    scale: float,
    lengths_B: torch.Tensor | None = None,
    pages: torch.Tensor | None = None,
    new: Sequence[torch.Tensor | None] | None = None,
    launch: Launch | None = None,
) -> torch.Tensor:
    """See `kernels.decode.decode`; with `pages` (rows, pages of a row) the factors are (page, token in it, ...)."""
    B, T, H, D = q_BTHD.shape
    page, S = b_k_BMSD.shape[1:3]
    U, E = b_v_BMUE.shape[2:]
    M = page if pages is None else page * pages.shape[1]
    device = q_BTHD.device
    q_BTHD = q_BTHD if q_BTHD.stride(-1) == 1 else q_BTHD.contiguous()

    queries, heads = columns(T, H, max(D, E))
    launch = launch or choose_launch(queries, heads, D, E, S, U, q_BTHD.dtype)
    if pages is not None and page % launch.tile:
        # Half the tile: as much on its way with twice the programs.
        launch = replace(launch, tile=64, programs=2 * launch.programs)
    a_k, b_k, a_v, b_v = (strides(x) for x in (a_k_BMSH, b_k_BMSD, a_v_BMUH, b_v_BMUE))
    n_programs = launch.programs * _multiprocessors(device)
    groups = math.ceil(T / queries) * math.ceil(H / heads)
    n_segments = n_programs + B - 1
    o = torch.empty((n_segments, T, H, E), dtype=torch.float32, device=device)
    highest, total = torch.empty((2, n_segments, T, H), dtype=torch.float32, device=device)
    out = torch.empty((B, T, H, E), dtype=q_BTHD.dtype, device=device)

    ragged = lengths_B is not None
    # A pointer that is not used must still be one.
    lengths = lengths_B if ragged else q_BTHD
    appended = [None if x is None else x if x.stride(-1) == 1 else x.contiguous() for x in new or [None] * 4]
    grain = GRAIN if pages is None else launch.tile
    extra = {"launch_pdl": True} if OVERLAP else {}
    _attend[(n_programs, groups)](
        q_BTHD, a_k_BMSH, b_k_BMSD, a_v_BMUH, b_v_BMUE, lengths, q_BTHD if pages is None else pages,
        o, highest, total, *(q_BTHD if x is None else x for x in appended),
        B, M, T, *q_BTHD.stride()[:3], a_k.row, b_k.row, a_v.row, b_v.row,
        0 if pages is None else pages.stride(0),
        *(stride for x in appended for stride in ((0, 0, 0) if x is None else x.stride()[:3])),
        scale * math.log2(math.e) / S,
        NEW_A_K=appended[0] is not None, NEW_B_K=appended[1] is not None,
        NEW_A_V=appended[2] is not None, NEW_B_V=appended[3] is not None,
        S_PADDED=power_of_2(S), U_PADDED=power_of_2(U),
        RAGGED=ragged, PAGE=0 if pages is None else page, GRAIN=grain, H=H, D=D, E=E, S=S, U=U,
        A_K_TOKEN=a_k.token, A_K_RANK=a_k.rank, A_K_UNIT=a_k.unit, A_K_WIDTH=readable(H, a_k),
        B_K_TOKEN=b_k.token, B_K_RANK=b_k.rank, B_K_UNIT=b_k.unit,
        A_V_TOKEN=a_v.token, A_V_RANK=a_v.rank, A_V_UNIT=a_v.unit, A_V_WIDTH=readable(H, a_v),
        B_V_TOKEN=b_v.token, B_V_RANK=b_v.rank, B_V_UNIT=b_v.unit,
        N=launch.tile, QUERIES=queries, HEADS=heads, D_PADDED=padded(D), E_PADDED=padded(E),
        HEADS_FIRST=launch.heads_first, ROWS=ROWS, UPCAST=INTERPRETED, OVERLAP=OVERLAP, STAGES=launch.stages,
        num_warps=launch.warps, **extra,
    )  # fmt: skip
    # One pass over the segments that a row usually has, and at most 64 numbers of o in a thread.
    segments = min(256, power_of_2(n_programs // B + 2))
    width = max(1, 16 // segments)
    warps = min(16, max(4, segments * width * padded(E) // (64 * 32)))
    _merge[(B, math.ceil(T * H / width))](
        o, highest, total, lengths, out, B, M, n_programs, T * H,
        RAGGED=ragged, GRAIN=grain, E=E, E_PADDED=padded(E), U=U, N=launch.tile,
        SEGMENTS=segments, COLUMNS=width, ROWS=ROWS, OVERLAP=OVERLAP,
        num_warps=warps, **extra,
    )  # fmt: skip
    return out


def n_compiled() -> int:
    """Kernels compiled in this process so far: it must not grow with a sequence."""
    return sum(len(found[0]) for kernel in (_attend, _merge) for found in kernel.device_caches.values())
