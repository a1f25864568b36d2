"""FlashTPA decoding in Triton: two launches, K and V of the cache are never formed (section 5).

Shapes: B rows of the cache, T query tokens, M cached tokens of a row, H heads, D head dimension, E value
dimension, S rank of K, U rank of V; W columns, one for each (query token, head) of a program; N cached tokens of
a tile; G segments. With further factors c (order 3) D = P C and E = X Y: b has P and X features, c has C and Y.

The first kernel runs a fixed number of programs, whatever the batch and the lengths. They share the cached tokens
of all rows equally: each takes one run of consecutive grains (16 tokens, or a tile where there are pages), which
may end one row and begin the next; the time that this takes counts as grains. One program holds all heads it can,
because they share the b factors:

    s[n, w] = Σ_s a_k[n, s, w] (b_k[n, s] · q[w])          p = 2^(s - max)
    o[e, w] = Σ_u Σ_n b_v[n, u, e] (p[n, w] a_v[n, u, w])

with tokens on the wide side of the matrix products, or heads where a program has 64 columns or more: then max and
Σ p stay within a warp, and p goes from one product to the next in registers. A b that is cached unturned, or that c
multiplies, is turned and multiplied tile by tile.

Each part of a row in one program is a segment; it leaves o, max and Σ p in float32, and the second kernel merges the
segments of each row in their order, so that equal inputs give equal bits.
"""

# Triton's own language is not Python's to a type checker, and the package may be absent.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportMissingImports=false
# pyright: reportGeneralTypeIssues=false

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.decode.launch import (
    Launch,
    Strides,
    Work,
    choose_launch,
    columns,
    even_programs,
    padded_row,
    power_of_2,
    readable,
    strides,
)
from kernels.decode.merge import merge, merge_segments
from kernels.decode.rows import Rows
from kernels.decode.tiles import (
    INTERPRETED,
    LOWEST,
    OVERLAP,
    ROWS,
    along_heads,
    along_tokens,
    ceil_div,
    counted,
    dot,
    feature_of,
    feature_rows,
    is_feature,
    length_of,
    load,
    new_token,
    put,
    share,
    times_heads,
    turning,
)
from kernels.rope.tables import alike

# Tokens of the smallest share of the work, so that programs differ by no more than that.
GRAIN = 16
# Tokens that are worth a program: of 128 in a tile, half. 16 rows of 1,024 tokens take 9.5 µs instead of 10.2 (H100).
LEAST_TOKENS = 64
# A program that begins a row is given so much less to read, for the time that this takes: 16 rows of 65,536 tokens take
# 143.5 µs instead of 147. Of 45, 90 and 150 kB the last was the best in 11 of 12 cases (H100).
PAUSE_BYTES = 150_000
# Programs of the interpreter stand in for multiprocessors: a few, so that segments cross rows.
INTERPRETED_PROGRAMS = 5


FACTORS = ("a_k", "b_k", "c_k", "a_v", "b_v", "c_v")
VARYING = [
    "n_rows", "capacity", "n_queries", "q_row", "q_query", "q_head", *(f"{name}_row" for name in FACTORS),
    "pages_row", "turn_row", *(f"new_{name}_{of}" for name in FACTORS for of in ("row", "token", "rank")),
]  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def _attend(
    q_ptr, a_k_ptr, b_k_ptr, c_k_ptr, a_v_ptr, b_v_ptr, c_v_ptr, cos_ptr, sin_ptr, lengths_ptr, pages_ptr,
    o_ptr, highest_ptr, total_ptr,
    new_a_k_ptr, new_b_k_ptr, new_c_k_ptr, new_a_v_ptr, new_b_v_ptr, new_c_v_ptr,
    n_rows, capacity, n_queries, q_row, q_query, q_head,
    a_k_row, b_k_row, c_k_row, a_v_row, b_v_row, c_v_row, pages_row, turn_row,
    new_a_k_row, new_a_k_token, new_a_k_rank, new_b_k_row, new_b_k_token, new_b_k_rank,
    new_c_k_row, new_c_k_token, new_c_k_rank, new_a_v_row, new_a_v_token, new_a_v_rank,
    new_b_v_row, new_b_v_token, new_b_v_rank, new_c_v_row, new_c_v_token, new_c_v_rank, scale,
    NEW_A_K: tl.constexpr, NEW_B_K: tl.constexpr, NEW_C_K: tl.constexpr,
    NEW_A_V: tl.constexpr, NEW_B_V: tl.constexpr, NEW_C_V: tl.constexpr,
    S_PADDED: tl.constexpr, U_PADDED: tl.constexpr,
    RAGGED: tl.constexpr, PAGE: tl.constexpr, GRAIN: tl.constexpr, PAUSE: tl.constexpr,
    H: tl.constexpr, P: tl.constexpr, C: tl.constexpr, X: tl.constexpr, Y: tl.constexpr,
    S: tl.constexpr, U: tl.constexpr, TURNED: tl.constexpr, HALVES: tl.constexpr, TURN_TOKEN: tl.constexpr,
    A_K_TOKEN: tl.constexpr, A_K_RANK: tl.constexpr, A_K_UNIT: tl.constexpr, A_K_WIDTH: tl.constexpr,
    B_K_TOKEN: tl.constexpr, B_K_RANK: tl.constexpr, B_K_UNIT: tl.constexpr,
    C_K_TOKEN: tl.constexpr, C_K_RANK: tl.constexpr, C_K_UNIT: tl.constexpr,
    A_V_TOKEN: tl.constexpr, A_V_RANK: tl.constexpr, A_V_UNIT: tl.constexpr, A_V_WIDTH: tl.constexpr,
    B_V_TOKEN: tl.constexpr, B_V_RANK: tl.constexpr, B_V_UNIT: tl.constexpr,
    C_V_TOKEN: tl.constexpr, C_V_RANK: tl.constexpr, C_V_UNIT: tl.constexpr,
    N: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr,
    P_PADDED: tl.constexpr, C_PADDED: tl.constexpr, X_PADDED: tl.constexpr, Y_PADDED: tl.constexpr,
    HEADS_FIRST: tl.constexpr, ROWS: tl.constexpr, UPCAST: tl.constexpr, OVERLAP: tl.constexpr,
    STAGES: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """o (G, T, H, E), highest and total (G, T, H) of every segment; G = program + row.

    Row strides come in units of the alignment that all addresses of that factor share, so that the compiler
    sees it. PAGE > 0: rows of the factors are pages of that many tokens, found through `pages`. C, Y and TURNED are
    0 where there is no c and b is cached turned.
    """
    E: tl.constexpr = X * Y if Y > 0 else X
    D_PADDED: tl.constexpr = P_PADDED * C_PADDED
    E_PADDED: tl.constexpr = X_PADDED * Y_PADDED
    W: tl.constexpr = QUERIES * HEADS
    HEAD_GROUPS: tl.constexpr = (H + HEADS - 1) // HEADS
    H_PADDED: tl.constexpr = HEAD_GROUPS * HEADS
    TOKENS: tl.constexpr = 1 if HEADS_FIRST else 0
    STEP: tl.constexpr = 1 if QUERIES == 1 else N
    group = tl.program_id(1)
    offsets_D = feature_of(tl.arange(0, D_PADDED), P, P_PADDED, C)
    offsets_E = feature_of(tl.arange(0, E_PADDED), X, X_PADDED, Y)
    live_D = is_feature(tl.arange(0, D_PADDED), P, P_PADDED, C)
    live_E = is_feature(tl.arange(0, E_PADDED), X, X_PADDED, Y)
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
    begin, end, row, row_begin, pause = share(
        lengths_ptr, n_rows, capacity, RAGGED, GRAIN, PAUSE, LEAST, ROWS
    )
    while begin < end:
        length = length_of(lengths_ptr, row, n_rows, capacity, RAGGED)
        row_end = row_begin + counted(ceil_div(length, GRAIN), pause)
        stop = tl.minimum(end, row_end)
        first_token = tl.maximum(begin - row_begin - pause, 0) * GRAIN
        past_token = tl.minimum((stop - row_begin - pause) * GRAIN, length)
        if NEW_A_K or NEW_B_K or NEW_C_K or NEW_A_V or NEW_B_V or NEW_C_V:
            # Each program writes the new tokens that it reads; programs that share them write the same.
            live_H = heads_H < H
            features_P = tl.arange(0, P_PADDED)
            features_C = tl.arange(0, C_PADDED)
            features_X = tl.arange(0, X_PADDED)
            features_Y = tl.arange(0, Y_PADDED)
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
                    a_k_new = new_token(new_a_k_ptr, from_a_k, new_a_k_rank, heads_H, live_H, S, S_PADDED)
                if NEW_B_K:
                    from_b_k = at_row * new_b_k_row + nth * new_b_k_token
                    b_k_new = new_token(
                        new_b_k_ptr, from_b_k, new_b_k_rank, features_P, features_P < P, S, S_PADDED
                    )
                if NEW_C_K:
                    from_c_k = at_row * new_c_k_row + nth * new_c_k_token
                    c_k_new = new_token(
                        new_c_k_ptr, from_c_k, new_c_k_rank, features_C, features_C < C, S, S_PADDED
                    )
                if NEW_A_V:
                    from_a_v = at_row * new_a_v_row + nth * new_a_v_token
                    a_v_new = new_token(new_a_v_ptr, from_a_v, new_a_v_rank, heads_H, live_H, U, U_PADDED)
                if NEW_B_V:
                    from_b_v = at_row * new_b_v_row + nth * new_b_v_token
                    b_v_new = new_token(
                        new_b_v_ptr, from_b_v, new_b_v_rank, features_X, features_X < X, U, U_PADDED
                    )
                if NEW_C_V:
                    from_c_v = at_row * new_c_v_row + nth * new_c_v_token
                    c_v_new = new_token(
                        new_c_v_ptr, from_c_v, new_c_v_rank, features_Y, features_Y < Y, U, U_PADDED
                    )
                if NEW_A_K:
                    to_a_k = block * a_k_row * A_K_UNIT + at * A_K_TOKEN
                    put(a_k_ptr, to_a_k, a_k_new, heads_H, live_H, A_K_RANK, S, S_PADDED)
                if NEW_B_K:
                    to_b_k = block * b_k_row * B_K_UNIT + at * B_K_TOKEN
                    put(b_k_ptr, to_b_k, b_k_new, features_P, features_P < P, B_K_RANK, S, S_PADDED)
                if NEW_C_K:
                    to_c_k = block * c_k_row * C_K_UNIT + at * C_K_TOKEN
                    put(c_k_ptr, to_c_k, c_k_new, features_C, features_C < C, C_K_RANK, S, S_PADDED)
                if NEW_A_V:
                    to_a_v = block * a_v_row * A_V_UNIT + at * A_V_TOKEN
                    put(a_v_ptr, to_a_v, a_v_new, heads_H, live_H, A_V_RANK, U, U_PADDED)
                if NEW_B_V:
                    to_b_v = block * b_v_row * B_V_UNIT + at * B_V_TOKEN
                    put(b_v_ptr, to_b_v, b_v_new, features_X, features_X < X, B_V_RANK, U, U_PADDED)
                if NEW_C_V:
                    to_c_v = block * c_v_row * C_V_UNIT + at * C_V_TOKEN
                    put(c_v_ptr, to_c_v, c_v_new, features_Y, features_Y < Y, C_V_RANK, U, U_PADDED)
            # What one thread has written, others are about to read.
            tl.debug_barrier()
        q_at = q_ptr + row.to(tl.int64) * q_row
        # Queries are the last tokens of the row: each sees itself and what came before.
        if HEADS_FIRST:
            q_ptrs = q_at + (queries_W * q_query + heads_W * q_head)[:, None] + offsets_D[None, :]
            q = tl.load(q_ptrs, mask=live_W[:, None] & live_D[None, :], other=0.0)
            o = tl.zeros((W, E_PADDED), tl.float32)
        else:
            q_ptrs = q_at + (queries_W * q_query + heads_W * q_head)[None, :] + offsets_D[:, None]
            q = tl.load(q_ptrs, mask=live_W[None, :] & live_D[:, None], other=0.0)
            o = tl.zeros((E_PADDED, W), tl.float32)
        total_W = tl.zeros((W,), tl.float32)
        highest_W = tl.full((W,), LOWEST, tl.float32)
        if PAGE > 0:
            page = tl.load(pages_ptr + row * pages_row + first_token // PAGE)
        # From 0: Triton 3.7 does not pipeline a loop whose first number comes out of a reduction. In tiles: 78 heads
        # take 217 µs instead of 221; but in tokens for several queries: 4 with 47 heads take 236 instead of 249 (H100).
        for past in tl.range(0, ceil_div(past_token - first_token, N // STEP), STEP, num_stages=STAGES):
            start = first_token + past * (N // STEP)
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
            c_k_at = block * c_k_row * C_K_UNIT + at * C_K_TOKEN
            c_v_at = block * c_v_row * C_V_UNIT + at * C_V_TOKEN
            cos_NP = 1.0
            sin_NP = 0.0
            if TURNED > 0:
                turn_at = row.to(tl.int64) * turn_row + start * TURN_TOKEN
                cos_NP = turning(cos_ptr, turn_at, live_N, False, N, TURN_TOKEN, TURNED, HALVES, P_PADDED)
                sin_NP = turning(sin_ptr, turn_at, live_N, True, N, TURN_TOKEN, TURNED, HALVES, P_PADDED)

            logits = 0.0
            for s in tl.static_range(S):
                b_ND = feature_rows(
                    b_k_ptr, b_k_at + s * B_K_RANK, c_k_ptr, c_k_at + s * C_K_RANK, cos_NP, sin_NP, live_N, N,
                    B_K_TOKEN, P, P_PADDED, C_K_TOKEN, C, C_PADDED, TURNED, HALVES,
                )  # fmt: skip
                a_NH = load(
                    a_k_ptr, a_k_at + s * A_K_RANK, live_N, heads_H, N, A_K_TOKEN, A_K_WIDTH, H_PADDED
                )
                dots = dot(q, tl.trans(b_ND), UPCAST) if HEADS_FIRST else dot(b_ND, q, UPCAST)
                logits += times_heads(dots, a_NH, column_WH, N, QUERIES, HEADS, HEADS_FIRST, UPCAST)
            if RAGGED and QUERIES > 1:
                visible_W = tl.minimum(length - (n_queries - 1 - queries_W), past_token)
                sees = along_tokens(tokens_N, HEADS_FIRST) < along_heads(visible_W, HEADS_FIRST)
                logits = tl.where(sees, logits * scale, -float("inf"))
            else:
                visible = past_token
                if RAGGED:
                    visible = tl.minimum(length - (n_queries - 1 - first_query), past_token)
                bias_N = tl.where(tokens_N < visible, 0.0, -float("inf"))
                logits = logits * scale + along_tokens(bias_N, HEADS_FIRST)

            new_highest_W = tl.maximum(highest_W, tl.max(logits, TOKENS))
            p = tl.exp2(logits - along_heads(new_highest_W, HEADS_FIRST))
            shrink_W = tl.exp2(highest_W - new_highest_W)
            total_W = total_W * shrink_W + tl.sum(p, TOKENS)
            o *= along_heads(shrink_W, HEADS_FIRST)
            for u in tl.static_range(U):
                a_NH = load(
                    a_v_ptr, a_v_at + u * A_V_RANK, live_N, heads_H, N, A_V_TOKEN, A_V_WIDTH, H_PADDED
                )
                b_NE = feature_rows(
                    b_v_ptr, b_v_at + u * B_V_RANK, c_v_ptr, c_v_at + u * C_V_RANK, 1.0, 0.0, live_N, N,
                    B_V_TOKEN, X, X_PADDED, C_V_TOKEN, Y, Y_PADDED, 0, HALVES,
                )  # fmt: skip
                weights = times_heads(p, a_NH, column_WH, N, QUERIES, HEADS, HEADS_FIRST, UPCAST)
                weights = weights.to(b_NE.dtype)
                o += dot(weights, b_NE, UPCAST) if HEADS_FIRST else dot(tl.trans(b_NE), weights, UPCAST)
            highest_W = new_highest_W

        segment = (program + row).to(tl.int64)
        columns_W = (segment * n_queries + queries_W) * H + heads_W
        tl.store(highest_ptr + columns_W, highest_W, mask=live_W)
        tl.store(total_ptr + columns_W, total_W, mask=live_W)
        if HEADS_FIRST:
            o_ptrs = o_ptr + columns_W[:, None] * E + offsets_E[None, :]
            tl.store(o_ptrs, o, mask=live_W[:, None] & live_E[None, :])
        else:
            o_ptrs = o_ptr + columns_W[None, :] * E + offsets_E[:, None]
            tl.store(o_ptrs, o, mask=live_W[None, :] & live_E[:, None])
        begin = stop
        row_begin = row_end
        row += 1


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; of the interpreter, programs that stand in for them."""
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
    rows: Rows | None = None,
    launch: Launch | None = None,
) -> torch.Tensor:
    """See `kernels.decode.decode`; with `pages` (rows, pages of a row) the factors are (page, token in it, ...)."""
    B, T, H, _ = q_BTHD.shape
    page, S, P = b_k_BMSD.shape[1:]
    U, X = b_v_BMUE.shape[2:]
    rows = rows or Rows()
    C, Y = (0 if c is None else c.shape[-1] for c in (rows.c_k, rows.c_v))
    E = X * max(Y, 1)
    M = page if pages is None else page * pages.shape[1]
    device = q_BTHD.device
    q_BTHD = q_BTHD if q_BTHD.stride(-1) == 1 else q_BTHD.contiguous()

    (P_PADDED, C_PADDED), (X_PADDED, Y_PADDED) = padded_row(P, C), padded_row(X, Y)
    widths = P_PADDED * C_PADDED, X_PADDED * Y_PADDED
    queries, heads = columns(T, H, max(widths))
    factors = (a_k_BMSH, b_k_BMSD, rows.c_k, a_v_BMUH, b_v_BMUE, rows.c_v)
    a_k, b_k, c_k, a_v, b_v, c_v = (Strides(0, 0, 0, 1) if x is None else strides(x) for x in factors)
    groups = math.ceil(T / queries) * math.ceil(H / heads)
    if launch is None:
        cached = P_PADDED + (C_PADDED if C else 0), X_PADDED + (Y_PADDED if Y else 0)
        wide = min(a_k.unit, b_k.unit, a_v.unit, b_v.unit) * q_BTHD.element_size() >= 8
        of_page = 0 if pages is None else page
        work = Work(queries, heads, groups, widths, cached, (S, U), q_BTHD.dtype, rows.turned, wide, of_page)
        launch = choose_launch(work)
    cos = sin = q_BTHD
    turn_row = turn_token = 0
    if rows.turned:
        cos, sin = alike(*rows.tables)
        turn_row, turn_token = (cos.stride(0) if cos.dim() == 3 else 0), cos.stride(-2)
    n_programs = even_programs(
        max(1, launch.programs * multiprocessors(device) // groups), B, queries * heads
    )
    n_segments = n_programs + B - 1
    o = torch.empty((n_segments, T, H, E), dtype=torch.float32, device=device)
    highest, total = torch.empty((2, n_segments, T, H), dtype=torch.float32, device=device)
    out = torch.empty((B, T, H, E), dtype=q_BTHD.dtype, device=device)

    ragged = lengths_B is not None
    lengths_B = None if lengths_B is None else lengths_B.contiguous()
    pages = None if pages is None else pages.contiguous()
    # A pointer that is not used must still be one.
    lengths = q_BTHD if lengths_B is None else lengths_B
    appended = [None if x is None else x if x.stride(-1) == 1 else x.contiguous() for x in new or ()]
    appended += [None] * (6 - len(appended))
    appended = [appended[i] for i in (0, 1, 4, 2, 3, 5)]
    grain = GRAIN if pages is None else launch.tile
    grain_bytes = grain * (S * (H + P + C) + U * (H + X + Y)) * q_BTHD.element_size()
    pause = math.ceil(PAUSE_BYTES / grain_bytes)
    least = max(grain, min(launch.tile, LEAST_TOKENS))
    extra = {"launch_pdl": True} if OVERLAP and launch.overlap else {}
    _attend[(n_programs, groups)](
        q_BTHD, *(q_BTHD if x is None else x for x in factors), cos, sin, lengths,
        q_BTHD if pages is None else pages, o, highest, total, *(q_BTHD if x is None else x for x in appended),
        B, M, T, *q_BTHD.stride()[:3], a_k.row, b_k.row, c_k.row, a_v.row, b_v.row, c_v.row,
        0 if pages is None else pages.stride(0), turn_row,
        *(stride for x in appended for stride in ((0, 0, 0) if x is None else x.stride()[:3])),
        scale * math.log2(math.e) / S,
        **{f"NEW_{name.upper()}": x is not None for name, x in zip(FACTORS, appended, strict=True)},
        S_PADDED=power_of_2(S), U_PADDED=power_of_2(U),
        RAGGED=ragged, PAGE=0 if pages is None else page, GRAIN=grain, PAUSE=pause, H=H, P=P, C=C, X=X, Y=Y, S=S, U=U,
        TURNED=rows.turned, HALVES=rows.pairing == "halves", TURN_TOKEN=turn_token,
        A_K_TOKEN=a_k.token, A_K_RANK=a_k.rank, A_K_UNIT=a_k.unit, A_K_WIDTH=readable(H, a_k),
        B_K_TOKEN=b_k.token, B_K_RANK=b_k.rank, B_K_UNIT=b_k.unit,
        C_K_TOKEN=c_k.token, C_K_RANK=c_k.rank, C_K_UNIT=c_k.unit,
        A_V_TOKEN=a_v.token, A_V_RANK=a_v.rank, A_V_UNIT=a_v.unit, A_V_WIDTH=readable(H, a_v),
        B_V_TOKEN=b_v.token, B_V_RANK=b_v.rank, B_V_UNIT=b_v.unit,
        C_V_TOKEN=c_v.token, C_V_RANK=c_v.rank, C_V_UNIT=c_v.unit,
        N=launch.tile, QUERIES=queries, HEADS=heads,
        P_PADDED=P_PADDED, C_PADDED=C_PADDED, X_PADDED=X_PADDED, Y_PADDED=Y_PADDED,
        HEADS_FIRST=launch.heads_first, ROWS=ROWS, UPCAST=INTERPRETED, OVERLAP=OVERLAP, STAGES=launch.stages,
        LEAST=least, num_warps=launch.warps, **extra,
    )  # fmt: skip
    merge(o, highest, total, lengths_B, out, M, n_programs, U, grain, pause, least)
    return out


def n_compiled() -> int:
    """Kernels compiled in this process so far: it must not grow with a sequence."""
    return sum(
        len(found[0]) for kernel in (_attend, merge_segments) for found in kernel.device_caches.values()
    )
