"""How the Triton decode kernel is cut up, in numbers alone: nothing here needs Triton.

Shapes: see kernels/decode/triton.py; W columns, one for each (query token, head) of a program.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

# Bytes of a multiprocessor for load pipelines; the rest of its 227 KB is for queries and conversions.
SHARED_MEMORY = 222_000
# What one program may have of it at most, with a little to spare.
MOST_SHARED_MEMORY = 226 * 1024


@dataclass(frozen=True)
class Launch:
    """How the first kernel is cut up.

    tile        cached tokens at a time
    warps       of a program
    stages      of the load pipeline
    programs    per multiprocessor
    heads_first the products have heads, not tokens, on their wide side
    """

    tile: int
    warps: int
    stages: int
    programs: int
    heads_first: bool


def power_of_2(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << (n - 1).bit_length()


class Strides(NamedTuple):
    """Of one factor (row or page, token, rank, feature): in elements, the row's in units of `unit` elements.

    `unit` divides the first address and every stride; up to 16 bytes.
    """

    row: int
    token: int
    rank: int
    unit: int


def strides(x: torch.Tensor) -> Strides:
    # The stride of a dimension of one says nothing; a row of one token may still grow.
    row = x.stride(0) if x.shape[0] > 1 else 0
    token = x.stride(1)
    rank = x.stride(2) if x.shape[2] > 1 else 0
    unit = math.gcd(x.data_ptr() // x.element_size(), row, token, rank, 16 // x.element_size())
    return Strides(row // unit, token, rank, unit)


def readable(H: int, strides: Strides) -> int:
    """Heads that may be read: to whole units, where the strides leave room for that."""
    whole = math.ceil(H / strides.unit) * strides.unit
    return whole if whole <= min((s for s in (strides.token, strides.rank) if s), default=H) else H


def padded(features: int) -> int:
    """The side of a matrix product: a power of 2 of at least 16."""
    return max(16, power_of_2(features))


def padded_row(b: int, c: int) -> tuple[int, int]:
    """Powers of 2 for a feature row of b features, times c further ones (0: there are none); at least 16 together."""
    if c == 0:
        return padded(b), 1
    return power_of_2(b), max(power_of_2(c), 16 // power_of_2(b))


def columns(T: int, H: int, widest: int) -> tuple[int, int]:
    """(query tokens, heads) of one program, powers of 2: their product is bounded by the registers of o."""
    most = max(32, min(256, 16384 // padded(widest)))
    heads = min(padded(H), most)
    if heads >= 64:
        most = 128
    return min(power_of_2(T), max(1, most // heads)), heads


def choose_launch(
    queries: int,
    heads: int,
    D: int,
    E: int,
    S: int,
    U: int,
    dtype: torch.dtype,
    turned: int,
    direct: bool,
) -> Launch:
    """By what a program must hold, never by batch or length; the limits are from measurements on an H100.

    `turned` features of each token's keys come with their partners, cosines and sines. `direct`: what the products take
    is what is cached, in loads of 8 bytes or more.
    """
    if dtype == torch.float32:
        # No tensor cores at full precision: small tiles, or the operands leave the registers.
        return Launch(tile=16, warps=4, stages=1, programs=2, heads_first=False)
    if max(padded(D), padded(E)) > 256:
        return Launch(tile=16, warps=4, stages=3, programs=2, heads_first=False)
    W = queries * heads
    heads_first = W >= 64
    token_bytes = (S * (padded(D) + heads) + U * (padded(E) + heads)) * dtype.itemsize
    token_bytes += turned * (S * dtype.itemsize + 8)
    # With heads on the wide side weights go through shared memory on their way to the second product, as wide as q.
    beside = W * max(padded(D), padded(E)) * dtype.itemsize if heads_first else 0
    most_bytes = min(SHARED_MEMORY, MOST_SHARED_MEMORY - beside)
    if W == 128 and heads == 64 and 3 * 32 * token_bytes <= most_bytes:
        # Of wider heads, four warps would keep a part of o outside their registers.
        wide = max(padded(D), padded(E)) > 64
        return Launch(tile=32, warps=8 if wide else 4, stages=3, programs=1, heads_first=True)
    if W == 128 and heads <= 32 and token_bytes <= 400:
        return Launch(tile=32, warps=4, stages=4, programs=2, heads_first=True)
    if direct and W == heads == 64 and max(padded(D), padded(E)) <= 64:
        # One program with more stages instead of two: nearly as many bytes on their way, and room for the merge beside.
        tile = next((n for n in (64, 32, 16) if n * token_bytes <= 33_000), 0)
        if tile:
            return Launch(tile, warps=4, stages=4, programs=1, heads_first=True)
    warps = 8 if W >= 128 else 4
    widest = 128 if not heads_first else 64 if W <= 128 else 32
    sizes = ((128, 50_000), (64, 50_000), (32, 74_000 if direct and not heads_first else 66_000))
    tile = next((n for n, most in sizes if n <= widest and n * token_bytes <= most), 16)
    stages = min(4 if direct and heads == 128 else 3, most_bytes // (tile * token_bytes))
    if stages < 2:
        # Too much at once for a pipeline: each factor is loaded when it is used.
        return Launch(tile=32, warps=warps, stages=1, programs=2, heads_first=heads_first)
    two_fit = 2 * (stages * tile * token_bytes + beside) <= SHARED_MEMORY
    programs = 2 if two_fit and warps == 4 and (heads_first or tile == 16) else 1
    return Launch(tile, warps, stages, programs, heads_first)


def even_programs(most: int, rows: int, columns: int) -> int:
    """How many programs share the cached tokens of all rows: `most`, or a little less.

    If it costs at most 4 % of them, a multiple of the rows: no program then has parts of two rows of equal length; best
    a power of 2 for each row. Not where the products of many columns take longer than reading (H100).
    """
    each = most // rows
    if not each or columns >= 128:
        return most
    candidates = (rows * (power_of_2(each + 1) // 2), rows * each)
    return next((even for even in candidates if most - even <= most // 25), most)
