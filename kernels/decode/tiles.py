"""What the decode kernels do to one tile: loads, products, and the feature rows that are made on the chip.

Shapes: N cached tokens of a tile; W columns, one for each (query token, head) of a program; H heads, D head dimension,
P features of b, C features of the further factor c, with D = P C where there is one.
"""

# Triton's own language is not Python's to a type checker, and the package may be absent.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportMissingImports=false
# pyright: reportGeneralTypeIssues=false

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
# Programmatic dependent launch: each kernel starts while the one before it drains.
OVERLAP = not INTERPRETED
# Rows whose lengths a warp reads at once: the batch itself is never a constant.
ROWS = 32
# A finite stand-in for -inf: the running maximum of a column that has seen nothing. 2^(-inf - LOWEST) is 0.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def length_of(lengths_ptr, row, n_rows, capacity, RAGGED: tl.constexpr):
    """Cached tokens of `row`, a scalar or a block; 0 past the last row."""
    if RAGGED:
        length = tl.load(lengths_ptr + row, mask=row < n_rows, other=0).to(tl.int32)
        return tl.minimum(tl.maximum(length, 0), capacity)
    else:
        return tl.where(row < n_rows, capacity, 0)


@triton.jit
def ceil_div(x, y: tl.constexpr):
    return (x + y - 1) // y


@triton.jit
def load(
    ptr, at, live_N, x_X, N: tl.constexpr, TOKEN: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr
):
    """(N, X) factors of one rank; what lies past the row or past WIDTH reads as 0."""
    ptrs = ptr + at + tl.arange(0, N)[:, None] * TOKEN + x_X[None, :]
    live = live_N[:, None]
    if WIDTH < PADDED:
        live = live & (x_X < WIDTH)[None, :]
    return tl.load(ptrs, mask=live, other=0.0)


@triton.jit
def feature_of(x, P: tl.constexpr, P_PADDED: tl.constexpr, C: tl.constexpr):
    """The feature at place x of a padded row (C_PADDED, P_PADDED): c_j b_i stands at j P_PADDED + i."""
    if C == 0 or P == P_PADDED:
        return x
    else:
        return x // P_PADDED * P + x % P_PADDED


@triton.jit
def is_feature(x, P: tl.constexpr, P_PADDED: tl.constexpr, C: tl.constexpr):
    """Whether there is one."""
    if C == 0:
        return x < P
    elif P == P_PADDED:
        return x < P * C
    else:
        return (x // P_PADDED < C) & (x % P_PADDED < P)


@triton.jit
def turning(
    ptr, at, live_N, SINE: tl.constexpr, N: tl.constexpr, TOKEN: tl.constexpr, TURNED: tl.constexpr,
    HALVES: tl.constexpr, P_PADDED: tl.constexpr,
):  # fmt: skip
    """(N, P) cosines, or sines with the sign that each feature's partner takes; 1 and 0 where nothing turns."""
    features_P = tl.arange(0, P_PADDED)
    pairs_P = features_P % (TURNED // 2) if HALVES else features_P // 2
    live = live_N[:, None] & (features_P < TURNED)[None, :]
    ptrs = ptr + at + tl.arange(0, N)[:, None] * TOKEN + pairs_P[None, :]
    if SINE:
        first_P = features_P < TURNED // 2 if HALVES else features_P % 2 == 0
        sine_NP = tl.load(ptrs, mask=live, other=0.0).to(tl.float32)
        return tl.where(first_P[None, :], sine_NP, -sine_NP)
    else:
        return tl.load(ptrs, mask=live, other=1.0).to(tl.float32)


@triton.jit
def feature_rows(
    b_ptr, b_at, c_ptr, c_at, cos_NP, sin_NP, live_N, N: tl.constexpr, B_TOKEN: tl.constexpr, P: tl.constexpr,
    P_PADDED: tl.constexpr, C_TOKEN: tl.constexpr, C: tl.constexpr, C_PADDED: tl.constexpr, TURNED: tl.constexpr,
    HALVES: tl.constexpr,
):  # fmt: skip
    """(N, D) of one rank: b, its first TURNED features turned, times each of the C features of c (0: there is no c).

    In the dtype of the cache after each step, as where the rows are made in memory.
    """
    features_P = tl.arange(0, P_PADDED)
    rows = load(b_ptr, b_at, live_N, features_P, N, B_TOKEN, P, P_PADDED)
    if TURNED > 0:
        # Written so that the compiler sees which features lie side by side.
        partner_P = (features_P + TURNED // 2) % TURNED if HALVES else features_P + 1 - features_P % 2 * 2
        partner_NP = tl.load(
            b_ptr + b_at + tl.arange(0, N)[:, None] * B_TOKEN + partner_P[None, :],
            mask=live_N[:, None] & (features_P < TURNED)[None, :],
            other=0.0,
        )
        rows = (rows.to(tl.float32) * cos_NP + partner_NP.to(tl.float32) * sin_NP).to(b_ptr.dtype.element_ty)
    if C > 0:
        c_NC = load(c_ptr, c_at, live_N, tl.arange(0, C_PADDED), N, C_TOKEN, C, C_PADDED)
        rows_NCP = c_NC.to(tl.float32)[:, :, None] * rows.to(tl.float32)[:, None, :]
        rows = tl.reshape(rows_NCP.to(b_ptr.dtype.element_ty), (N, C_PADDED * P_PADDED))
    return rows


@triton.jit
def dot(x, y, UPCAST: tl.constexpr):
    # The interpreter's bfloat16 product is wrong.
    if UPCAST:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(x, y, input_precision="ieee")


# A tile is (N, W), or (W, N) with HEADS_FIRST; the same for what is written once for both.


@triton.jit
def along_tokens(x_N, HEADS_FIRST: tl.constexpr):
    return x_N[None, :] if HEADS_FIRST else x_N[:, None]


@triton.jit
def along_heads(x_W, HEADS_FIRST: tl.constexpr):
    return x_W[:, None] if HEADS_FIRST else x_W[None, :]


@triton.jit
def times_heads(
    x, a_NH, column_WH, N: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr, HEADS_FIRST: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """x[n, (t, h)] a[n, h]."""
    if HEADS_FIRST:
        # A product with ones and zeros is exact: it transposes a and repeats it for each query token inside the
        # tensor cores, where the alternative is a trip through registers and shared memory.
        return x * dot(column_WH, tl.trans(a_NH), UPCAST)
    elif QUERIES == 1:
        return x * a_NH.to(tl.float32)
    else:
        x_NTH = tl.reshape(x, (N, QUERIES, HEADS)) * a_NH.to(tl.float32)[:, None, :]
        return tl.reshape(x_NTH, (N, QUERIES * HEADS))


@triton.jit
def new_token(ptr, at, rank_stride, x_X, live_X, RANKS: tl.constexpr, RANKS_PADDED: tl.constexpr):
    """(R, X): the factors of all ranks of one new token."""
    ranks = tl.arange(0, RANKS_PADDED)
    live = (ranks < RANKS)[:, None] & live_X[None, :]
    return tl.load(ptr + at + ranks[:, None] * rank_stride + x_X[None, :], mask=live, other=0.0)


@triton.jit
def put(ptr, at, x_RX, x_X, live_X, RANK: tl.constexpr, RANKS: tl.constexpr, RANKS_PADDED: tl.constexpr):
    ranks = tl.arange(0, RANKS_PADDED)
    live = (ranks < RANKS)[:, None] & live_X[None, :]
    tl.store(ptr + at + ranks[:, None] * RANK + x_X[None, :], x_RX, mask=live)


@triton.jit
def grains_of(lengths_ptr, rows, n_rows, capacity, RAGGED: tl.constexpr, GRAIN: tl.constexpr):
    return ceil_div(length_of(lengths_ptr, rows, n_rows, capacity, RAGGED), GRAIN)


@triton.jit
def counted(grains, pause):
    """Grains of rows with a pause in front of each that has any: what it takes to begin one."""
    return grains + tl.where(grains > 0, pause, 0)


@triton.jit
def pause_of(
    grains, lengths_ptr, n_rows, capacity, n_programs, RAGGED: tl.constexpr, GRAIN: tl.constexpr, PAUSE: tl.constexpr,
    LEAST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """PAUSE; 0 where rows of one length have as many programs each, so that none begins a row on its way.

    `grains` are those of the first ROWS rows.
    """
    rows = tl.arange(0, ROWS)
    longest = tl.max(grains, 0)
    shortest = tl.min(tl.where(rows < n_rows, grains, longest), 0)
    for first in range(ROWS, n_rows, ROWS):
        grains = grains_of(lengths_ptr, first + rows, n_rows, capacity, RAGGED, GRAIN)
        longest = tl.maximum(longest, tl.max(grains, 0))
        shortest = tl.minimum(shortest, tl.min(tl.where(first + rows < n_rows, grains, shortest), 0))
    n_working = tl.minimum(n_programs, ceil_div(longest * n_rows, LEAST // GRAIN))
    return tl.where((shortest == longest) & (n_working % n_rows == 0), 0, PAUSE)


@triton.jit
def share(
    lengths_ptr, n_rows, capacity, RAGGED: tl.constexpr, GRAIN: tl.constexpr, PAUSE: tl.constexpr, LEAST: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """This program's grains [begin, end) among those of all rows, the row of the first, where that begins; the pause.

    Each row begins with its pause; an end inside one is put where it begins. The first ROWS rows are read once for all.
    """
    rows = tl.arange(0, ROWS)
    grains = grains_of(lengths_ptr, rows, n_rows, capacity, RAGGED, GRAIN)
    pause = pause_of(
        grains, lengths_ptr, n_rows, capacity, tl.num_programs(0), RAGGED, GRAIN, PAUSE, LEAST, ROWS
    )
    past = tl.cumsum(counted(grains, pause), 0)
    n_grains = tl.max(past, 0)
    for first in range(ROWS, n_rows, ROWS):
        grains = grains_of(lengths_ptr, first + rows, n_rows, capacity, RAGGED, GRAIN)
        n_grains += tl.sum(counted(grains, pause), 0)
    n_working = tl.maximum(tl.minimum(tl.num_programs(0), ceil_div(n_grains, LEAST // GRAIN)), 1)
    program = tl.program_id(0)
    # program * n_grains // n_working, which 32 bits may not hold on the way.
    each = n_grains // n_working
    over = n_grains % n_working
    begin = program * each + program * over // n_working
    end = tl.minimum((program + 1) * each + (program + 1) * over // n_working, n_grains)
    row = tl.sum(((past <= begin) & (rows < n_rows)).to(tl.int32), 0)
    row_begin = tl.max(tl.where(past <= begin, past, 0), 0)
    last_begin = tl.max(tl.where(past <= end, past, 0), 0)
    for first in range(ROWS, n_rows, ROWS):
        grains = grains_of(lengths_ptr, first + rows, n_rows, capacity, RAGGED, GRAIN)
        past = tl.max(past, 0) + tl.cumsum(counted(grains, pause), 0)
        row += tl.sum(((past <= begin) & (first + rows < n_rows)).to(tl.int32), 0)
        row_begin = tl.maximum(row_begin, tl.max(tl.where(past <= begin, past, 0), 0))
        last_begin = tl.maximum(last_begin, tl.max(tl.where(past <= end, past, 0), 0))
    end = tl.where(end - last_begin <= pause, last_begin, end)
    return begin, end, row, row_begin, pause
