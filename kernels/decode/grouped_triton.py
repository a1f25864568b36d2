"""Decoding over full keys and values in Triton: GQA and MQA of any width, and absorbed MLA.

Shapes: B rows of the cache, T query tokens, M cached tokens of a row, H heads, G KV heads, D head dimension, E value
dimension; W columns, one for each (query token, head) of a program, all of one KV head; N cached tokens of a tile.

As kernels/decode/triton.py shares and merges the work, with tokens on the wide side of both products:

    s[n, w] = k[n] · q[w]          o[e, w] = Σ_n v[n, e] p[n, w],  p = 2^(s - max)

A width that is no power of 2 is cut into one and a rest (74 = 64 + 10, 288 = 256 + 32): padded to the next, as one
product must be, 288 would take the room and the time of 512. Values that are the first E features of the keys (MLA's
latent, of which keys have a turned key behind) are read once, and meet both products; such keys are cut at E.
"""

# Triton's own language is not Python's to a type checker, and the package may be absent.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportMissingImports=false
# pyright: reportGeneralTypeIssues=false

import math

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.decode.launch import MOST_SHARED_MEMORY, Launch, even_programs, padded, power_of_2, strides
from kernels.decode.merge import merge
from kernels.decode.tiles import (
    INTERPRETED,
    LOWEST,
    OVERLAP,
    ROWS,
    ceil_div,
    counted,
    dot,
    length_of,
    load,
    share,
)
from kernels.decode.triton import GRAIN, LEAST_TOKENS, PAUSE_BYTES, multiprocessors

# Columns of a program: both products are of 64 tokens with them, and o stays in the registers.
MOST_COLUMNS = 32
MOST_SEGMENTS = 128


@triton.jit(
    do_not_specialize=["n_rows", "capacity", "n_queries", "q_row", "q_query", "q_head", "k_row", "v_row"]
)
def _attend(
    q_ptr, k_ptr, v_ptr, lengths_ptr, o_ptr, highest_ptr, total_ptr,
    n_rows, capacity, n_queries, q_row, q_query, q_head, k_row, v_row, scale,
    RAGGED: tl.constexpr, GRAIN: tl.constexpr, PAUSE: tl.constexpr, LEAST: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_REST: tl.constexpr, E: tl.constexpr, E_REST: tl.constexpr,
    SHARED: tl.constexpr,
    K_TOKEN: tl.constexpr, K_HEAD: tl.constexpr, K_UNIT: tl.constexpr,
    V_TOKEN: tl.constexpr, V_HEAD: tl.constexpr, V_UNIT: tl.constexpr,
    N: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr,
    D_PADDED: tl.constexpr, D_REST_PADDED: tl.constexpr, E_PADDED: tl.constexpr, E_REST_PADDED: tl.constexpr,
    ROWS: tl.constexpr, UPCAST: tl.constexpr, OVERLAP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """o (segment, T, H, E + E_REST), highest and total (segment, T, H); segment = program + row.

    D and D_REST are the two parts of a key, E and E_REST those of a value; a rest may be 0. SHARED: values are the
    first part of the keys.
    """
    W: tl.constexpr = QUERIES * HEADS
    PER_KV_HEAD: tl.constexpr = H // G
    CHUNKS: tl.constexpr = (PER_KV_HEAD + HEADS - 1) // HEADS
    group = tl.program_id(1)
    kv_head = group // CHUNKS % G
    heads_W = group % CHUNKS * HEADS + tl.arange(0, W) % HEADS
    queries_W = group // (CHUNKS * G) * QUERIES + tl.arange(0, W) // HEADS
    live_W = (heads_W < PER_KV_HEAD) & (queries_W < n_queries)
    heads_W += kv_head * PER_KV_HEAD
    features_D = tl.arange(0, D_PADDED)
    features_E = tl.arange(0, E_PADDED)
    if D_REST > 0:
        rest_D = tl.arange(0, D_REST_PADDED)
    if E_REST > 0:
        rest_E = tl.arange(0, E_REST_PADDED)
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
        visible_W = past_token
        if RAGGED:
            # Queries are the last tokens of the row: each sees itself and what came before.
            visible_W = tl.minimum(length - (n_queries - 1 - queries_W), past_token)

        q_W = q_ptr + row.to(tl.int64) * q_row + queries_W * q_query + heads_W * q_head
        live_DW = (features_D < D)[:, None] & live_W[None, :]
        q_DW = tl.load(q_W[None, :] + features_D[:, None], mask=live_DW, other=0.0)
        if D_REST > 0:
            live_DW = (rest_D < D_REST)[:, None] & live_W[None, :]
            q_rest_DW = tl.load(q_W[None, :] + (D + rest_D)[:, None], mask=live_DW, other=0.0)
        o_EW = tl.zeros((E_PADDED, W), tl.float32)
        if E_REST > 0:
            o_rest_EW = tl.zeros((E_REST_PADDED, W), tl.float32)
        total_W = tl.zeros((W,), tl.float32)
        highest_W = tl.full((W,), LOWEST, tl.float32)
        # From 0: Triton 3.7 does not pipeline a loop whose first number comes out of a reduction.
        for past in tl.range(0, past_token - first_token, N, num_stages=STAGES):
            start = first_token + past
            tokens_N = start + tl.arange(0, N)
            live_N = tokens_N < past_token
            k_at = row.to(tl.int64) * k_row * K_UNIT + start * wide * K_TOKEN + kv_head * wide * K_HEAD
            k_ND = load(k_ptr, k_at, live_N, features_D, N, K_TOKEN, D, D_PADDED)
            logits = dot(k_ND, q_DW, UPCAST)
            if D_REST > 0:
                k_rest_ND = load(k_ptr, k_at + D, live_N, rest_D, N, K_TOKEN, D_REST, D_REST_PADDED)
                logits += dot(k_rest_ND, q_rest_DW, UPCAST)
            sees = tokens_N[:, None] < visible_W[None, :] if RAGGED else live_N[:, None]
            logits = tl.where(sees, logits * scale, -float("inf"))
            new_highest_W = tl.maximum(highest_W, tl.max(logits, 0))
            p = tl.exp2(logits - new_highest_W[None, :])
            shrink_W = tl.exp2(highest_W - new_highest_W)
            total_W = total_W * shrink_W + tl.sum(p, 0)
            weights = p.to(k_ND.dtype)
            if SHARED:
                o_EW = o_EW * shrink_W[None, :] + dot(tl.trans(k_ND), weights, UPCAST)
            else:
                v_at = row.to(tl.int64) * v_row * V_UNIT + start * wide * V_TOKEN + kv_head * wide * V_HEAD
                v_NE = load(v_ptr, v_at, live_N, features_E, N, V_TOKEN, E, E_PADDED)
                o_EW = o_EW * shrink_W[None, :] + dot(tl.trans(v_NE), weights, UPCAST)
                if E_REST > 0:
                    v_rest_NE = load(v_ptr, v_at + E, live_N, rest_E, N, V_TOKEN, E_REST, E_REST_PADDED)
                    o_rest_EW = o_rest_EW * shrink_W[None, :] + dot(tl.trans(v_rest_NE), weights, UPCAST)
            highest_W = new_highest_W

        columns_W = ((program + row).to(tl.int64) * n_queries + queries_W) * H + heads_W
        tl.store(highest_ptr + columns_W, highest_W, mask=live_W)
        tl.store(total_ptr + columns_W, total_W, mask=live_W)
        o_W = o_ptr + columns_W * (E + E_REST)
        live_EW = (features_E < E)[:, None] & live_W[None, :]
        tl.store(o_W[None, :] + features_E[:, None], o_EW, mask=live_EW)
        if E_REST > 0:
            live_EW = (rest_E < E_REST)[:, None] & live_W[None, :]
            tl.store(o_W[None, :] + (E + rest_E)[:, None], o_rest_EW, mask=live_EW)
        begin = stop
        row_begin = row_end
        row += 1


def parts(features: int) -> tuple[int, int]:
    """A power of 2 and the rest, where their padded sides take less than the next power of 2; else all, and 0."""
    first = power_of_2(features + 1) // 2
    rest = features - first
    if rest and first >= 16 and first + padded(rest) < power_of_2(features):
        return first, rest
    return features, 0


# (tokens of a tile, stages, programs of a multiprocessor), the best first of those that fit; measured on an H100 in
# bfloat16: the widest that many stages allow, and small tiles in two programs where rows are as wide as MLA's of 512.
ALIGNED = ((128, 3, 1), (64, 4, 1), (64, 3, 1), (16, 4, 2), (16, 2, 1))
# Of loads of less than 8 bytes there are many: more programs to wait for them.
UNALIGNED = ((64, 2, 4), (16, 4, 2), (16, 2, 1))


def choose_launch(token_bytes: int, query_bytes: int, unit_bytes: int, itemsize: int) -> Launch:
    """By what a tile takes for each token, what queries take, and the loads that the alignment allows."""
    if itemsize == 4:  # no tensor cores at full precision
        return Launch(tile=16, warps=4, stages=1, programs=2, heads_first=False)
    tile, stages, programs = next(
        (tile, stages, programs)
        for tile, stages, programs in (ALIGNED if unit_bytes >= 8 else UNALIGNED)
        if tile * (stages * token_bytes + MOST_COLUMNS * itemsize) + query_bytes <= MOST_SHARED_MEMORY
    )
    return Launch(tile, 4, stages, programs, heads_first=False)


def shares(k_BMGD: torch.Tensor, v_BMGE: torch.Tensor) -> bool:
    """Whether values are the first features of the keys, in the same memory."""
    return (
        k_BMGD.data_ptr() == v_BMGE.data_ptr()
        and strides(k_BMGD) == strides(v_BMGE)
        and k_BMGD.shape[-1] >= v_BMGE.shape[-1]
    )


def decode(
    q_BTHD: torch.Tensor,
    k_BMGD: torch.Tensor,
    v_BMGE: torch.Tensor,
    scale: float,
    lengths_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `kernels.decode.grouped.decode_grouped`."""
    B, T, H, width = q_BTHD.shape
    M, G = k_BMGD.shape[1:3]
    E_all = v_BMGE.shape[-1]
    device, itemsize = q_BTHD.device, q_BTHD.element_size()
    q_BTHD = q_BTHD if q_BTHD.stride(-1) == 1 else q_BTHD.contiguous()
    shared = shares(k_BMGD, v_BMGE)
    (D, D_rest), (E, E_rest) = ((E_all, width - E_all), (E_all, 0)) if shared else map(parts, (width, E_all))
    D_padded, E_padded = padded(D), padded(E)
    D_rest_padded, E_rest_padded = (padded(rest) if rest else 0 for rest in (D_rest, E_rest))
    heads = min(padded(H // G), MOST_COLUMNS)
    queries = min(power_of_2(T), MOST_COLUMNS // heads)
    groups = math.ceil(T / queries) * G * math.ceil(H // G / heads)
    in_tile = D_padded + D_rest_padded + (0 if shared else E_padded + E_rest_padded)
    k, v = strides(k_BMGD), strides(v_BMGE)
    launch = choose_launch(
        in_tile * itemsize,
        (D_padded + D_rest_padded) * queries * heads * itemsize,
        min(k.unit, v.unit) * itemsize,
        itemsize,
    )

    # More segments of a row cost more to merge than they gain: 75 MB of one row of MLA take 97 µs, not 220 (H100).
    most = min(launch.programs * multiprocessors(device) // groups, MOST_SEGMENTS * B)
    n_programs = even_programs(max(1, most), B, queries * heads)
    n_segments = n_programs + B - 1
    o = torch.empty((n_segments, T, H, E_all), dtype=torch.float32, device=device)
    highest, total = torch.empty((2, n_segments, T, H), dtype=torch.float32, device=device)
    out = torch.empty((B, T, H, E_all), dtype=q_BTHD.dtype, device=device)
    ragged = lengths_B is not None
    lengths_B = None if lengths_B is None else lengths_B.contiguous()
    lengths = q_BTHD if lengths_B is None else lengths_B  # a pointer that is not used must still be one
    pause = math.ceil(PAUSE_BYTES / (GRAIN * (width + (0 if shared else E_all)) * itemsize))
    least = max(GRAIN, min(launch.tile, LEAST_TOKENS))
    extra = {"launch_pdl": True} if OVERLAP else {}
    _attend[(n_programs, groups)](
        q_BTHD, k_BMGD, v_BMGE, lengths, o, highest, total,
        B, M, T, *q_BTHD.stride()[:3], k.row, v.row, scale * math.log2(math.e),
        RAGGED=ragged, GRAIN=GRAIN, PAUSE=pause, LEAST=least, H=H, G=G, D=D, D_REST=D_rest, E=E, E_REST=E_rest,
        SHARED=shared, K_TOKEN=k.token, K_HEAD=k.rank, K_UNIT=k.unit, V_TOKEN=v.token, V_HEAD=v.rank, V_UNIT=v.unit,
        N=launch.tile, QUERIES=queries, HEADS=heads,
        D_PADDED=D_padded, D_REST_PADDED=D_rest_padded, E_PADDED=E_padded, E_REST_PADDED=E_rest_padded,
        ROWS=ROWS, UPCAST=INTERPRETED, OVERLAP=OVERLAP, STAGES=launch.stages, num_warps=launch.warps, **extra,
    )  # fmt: skip
    merge(o, highest, total, lengths_B, out, M, n_programs, 1, GRAIN, pause, least)
    return out
