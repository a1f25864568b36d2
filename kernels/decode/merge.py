"""The second launch of Triton decoding: the segments of each row become one, in their order.

Shapes: B rows of the cache, T query tokens, H heads, E value dimension, U rank of V; W columns (query token, head) of a
program, G segments.
"""

# Triton's own language is not Python's to a type checker, and the package may be absent.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportMissingImports=false
# pyright: reportGeneralTypeIssues=false

import math

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.decode.launch import padded, power_of_2
from kernels.decode.tiles import LOWEST, OVERLAP, ROWS, ceil_div, counted, grains_of, length_of, pause_of

# Wider values are merged in parts: one row of 262,144 tokens of 128 takes 64.3 µs instead of 65.8, 16 of 32,768 229.8
# instead of 230.3; parts of 32 are slower for one row (H100).
MOST_FEATURES = 64


@triton.jit(do_not_specialize=["n_rows", "capacity", "n_programs", "n_columns"])
def merge_segments(
    o_ptr, highest_ptr, total_ptr, lengths_ptr, out_ptr, n_rows, capacity, n_programs, n_columns,
    RAGGED: tl.constexpr, GRAIN: tl.constexpr, PAUSE: tl.constexpr, E: tl.constexpr, E_PART: tl.constexpr,
    U: tl.constexpr, LEAST: tl.constexpr, SEGMENTS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """out (B, T, H, E): the segments of one row for COLUMNS of its (query token, head) columns, E_PART features."""
    row = tl.program_id(0)
    offsets_E = tl.arange(0, E_PART)
    if E > E_PART:
        offsets_E += tl.program_id(2) * E_PART
    columns_W = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    n_grains = 0
    row_begin = 0
    # Lengths are read before the wait: they are older than the first kernel, which starts this one after its own wait.
    grains = grains_of(lengths_ptr, tl.arange(0, ROWS), n_rows, capacity, RAGGED, GRAIN)
    pause = pause_of(grains, lengths_ptr, n_rows, capacity, n_programs, RAGGED, GRAIN, PAUSE, LEAST, ROWS)
    for first in range(0, n_rows, ROWS):
        rows = first + tl.arange(0, ROWS)
        grains = counted(grains_of(lengths_ptr, rows, n_rows, capacity, RAGGED, GRAIN), pause)
        n_grains += tl.sum(grains, 0)
        row_begin += tl.sum(tl.where(rows < row, grains, 0), 0)
    row_begin += pause
    row_grains = ceil_div(length_of(lengths_ptr, row, n_rows, capacity, RAGGED), GRAIN)
    n_working = tl.minimum(n_programs, ceil_div(n_grains, LEAST // GRAIN))
    # The program of a grain is the last one whose first grain is not past it; see `share`.
    # 64 bits: grains times programs may take them.
    wide = n_working.to(tl.int64)
    begin = row + (((row_begin + 1) * wide - 1) // tl.maximum(n_grains, 1)).to(tl.int32)
    end = row + 1 + (((row_begin + row_grains) * wide - 1) // tl.maximum(n_grains, 1)).to(tl.int32)
    end = tl.where(row_grains > 0, end, begin)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()

    live_W = columns_W < n_columns
    o_WE = tl.zeros((COLUMNS, E_PART), tl.float32)
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


def merge(
    o: torch.Tensor,
    highest: torch.Tensor,
    total: torch.Tensor,
    lengths_B: torch.Tensor | None,
    out: torch.Tensor,
    capacity: int,
    n_programs: int,
    U: int,
    grain: int,
    pause: int,
    least: int,
) -> None:
    """Write `out` (B, T, H, E) from o (G, T, H, E), highest and total (G, T, H) of a first launch of `n_programs`."""
    B, T, H, E = out.shape
    # One pass over the segments that rows of one length have, up to 128, and at most 64 numbers of o in a thread: with
    # four warps or more instead of one, 16 rows take 1 to 2 µs longer.
    segments = min(128, power_of_2(n_programs // B + (2 if n_programs % B else 0)))
    width = max(1, 16 // segments)
    ragged = lengths_B is not None
    part = min(padded(E), MOST_FEATURES)
    merge_segments[(B, math.ceil(T * H / width), math.ceil(E / part))](
        o, highest, total, lengths_B if ragged else highest, out, B, capacity, n_programs, T * H,
        RAGGED=ragged, GRAIN=grain, PAUSE=pause, E=E, E_PART=part, U=U, LEAST=least,
        SEGMENTS=segments, COLUMNS=width, ROWS=ROWS, OVERLAP=OVERLAP,
        num_warps=max(1, segments * width * part // (64 * 32)),
        **({"launch_pdl": True} if OVERLAP else {}),
    )  # fmt: skip
