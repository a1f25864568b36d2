"""How the Triton decode kernel is cut up, in numbers alone: nothing here needs Triton.

Shapes: see kernels/decode/triton.py; W columns, one for each (query token, head) of a program.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

# Bytes of a multiprocessor for load pipelines; the rest of its 227 KB is for queries and conversions.
SHARED_MEMORY = 222_000
# What one program may have of it at most, with a little to spare.
MOST_SHARED_MEMORY = 226 * 1024
# Who takes so much is alone on a multiprocessor.
ALONE = 116_000


@dataclass(frozen=True)
class Launch:
    """How the first kernel is cut up.

    tile        cached tokens at a time
    warps       of a program
    stages      of the load pipeline
    programs    per multiprocessor
    heads_first the products have heads, not tokens, on their wide side
    overlap     it starts while the kernel in front of it ends
    """

    tile: int
    warps: int
    stages: int
    programs: int
    heads_first: bool
    overlap: bool = True


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
    width = padded(widest)
    queries, heads = power_of_2(T), padded(H)
    if queries == 1:
        return 1, min(heads, max(32, min(256, 16384 // width)))
    if heads <= 32 and queries * heads <= min(128, 16384 // width):
        return queries, heads
    # Of several programs each takes many queries of a few heads, whose factors they share: 4 queries of 47 heads of
    # 64 take 241 µs instead of 276 with 2 queries of 64 heads at rank 2, 298 instead of 738 at rank 4 (H100).
    most = max(16, min(128, 8192 // width))
    heads = min(heads, 32, max(16, most // queries))
    return min(queries, most // heads), heads


@dataclass(frozen=True)
class Work:
    """What the first kernel is to be cut up for.

    queries, heads  of a program's columns
    groups          of columns that go over the same tokens
    widths          padded features of keys and values in the products
    cached          of each rank in the cache: less, where rows are made with a further factor
    ranks           of K and V
    dtype           of the cache
    turned          features of each token's keys that come with their partners, cosines and sines
    wide            all loads are of 8 bytes or more
    page            tokens of a page, a multiple of 64; 0 for none
    """

    queries: int
    heads: int
    groups: int
    widths: tuple[int, int]
    cached: tuple[int, int]
    ranks: tuple[int, int]
    dtype: torch.dtype
    turned: int = 0
    wide: bool = True
    page: int = 0

    @property
    def columns(self) -> int:
        return self.queries * self.heads

    @property
    def heads_first(self) -> bool:
        return self.columns >= 64

    @property
    def beside(self) -> int:
        """Bytes beside the tiles: with heads first, weights go to the second product as wide as q."""
        return self.columns * max(self.widths) * self.dtype.itemsize if self.heads_first else 0

    def token_bytes(self, features: tuple[int, int]) -> int:
        elements = sum(rank * (self.heads + width) for rank, width in zip(self.ranks, features, strict=True))
        return elements * self.dtype.itemsize + self.turned * (self.ranks[0] * self.dtype.itemsize + 2)

    def tile(self, *most_bytes: tuple[int, int]) -> int:
        """The first (tile, most bytes) that holds, as its tokens are in the products; else 16."""
        token_bytes = self.token_bytes(self.widths)
        return next((tile for tile, most in most_bytes if tile * token_bytes <= most), 16)

    def fits(self, tile: int, warps: int, stages: int, programs: int) -> bool:
        tiles = stages * tile * self.token_bytes(self.cached)
        if self.heads_first:
            # As Triton 3.6 and 3.7 keep what turns, by compiling for sm_90.
            more = 12 - 4 * self.ranks[0] if stages > 2 else 4 - 2 * self.ranks[0]
            tiles += tile * self.turned * max(0, more)
        if programs == 1:
            return tiles <= min(SHARED_MEMORY, MOST_SHARED_MEMORY - self.beside)
        return programs * (tiles + self.beside) <= SHARED_MEMORY


# (tile, warps, stages, programs)
Wanted = list[tuple[int, int, int, int]]


def choose_launch(work: Work) -> Launch:
    """By what a program must hold, never by batch or length; the choices are from measurements on an H100."""
    if work.dtype == torch.float32:
        # No tensor cores at full precision: small tiles, or the operands leave the registers.
        return Launch(tile=16, warps=4, stages=1, programs=2, heads_first=False, overlap=False)
    wanted: Wanted = []
    if max(work.widths) > 256:
        pass  # the smallest tile
    elif work.columns >= 128:
        wanted = _for_many_columns(work)
    elif work.cached != work.widths:
        wanted = _for_made_rows(work)
    elif work.turned:
        wanted = _for_turned_rows(work)
    elif work.heads_first:
        wanted = _for_many_columns(work)
    else:
        wanted = _for_few_columns(work)
    wanted += [(16, 4, 3, 2), (16, 4, 2, 2), (16, 4, 3, 1), (16, 4, 2, 1)]
    # Too much at once for a pipeline: each factor is loaded when it is used.
    unstaged = (32, 8, 1, 1) if wanted[0][1] == 8 else (32, 4, 1, 2)
    launch = Launch(*next((x for x in wanted if work.fits(*x)), unstaged), work.heads_first)
    if work.page % launch.tile:
        # Half the tile: as much on its way with twice the programs.
        launch = replace(launch, tile=64, programs=2 * launch.programs)
    return replace(launch, overlap=not leaves_room(work, launch))


def leaves_room(work: Work, launch: Launch) -> bool:
    """Whether one program more than there are would fit on a multiprocessor.

    While the kernel in front still has some of them, the hardware then puts programs together and leaves others
    without: 32 heads of 128, rank 2, take 228 µs, or 245 to 260; 32 heads with a shared b, one program where two fit,
    took 297 or 459. Not to overlap costs half a microsecond. Programs of many columns, and those that make or turn
    rows, have too many registers for one more.
    """
    if work.heads_first or work.turned or work.cached != work.widths:
        return False
    if launch.warps == 2 or launch.stages == 1 or not work.wide:
        return True
    # Triton keeps less than all factors of a small tile on their way.
    kept = {128: 0.98, 64: 0.94}.get(launch.tile, 0.81)
    taken = kept * launch.stages * launch.tile * work.token_bytes(work.cached) + 1024
    return (launch.programs + 1) * taken <= 228 * 1024


def _for_made_rows(work: Work) -> Wanted:
    """b and c are narrow: what bounds a tile is the rows that it makes of them."""
    if work.heads_first:
        tile = work.tile((64, 66_000), (32, 66_000))
        return [(tile, 4, 3, 2), (tile, 4, 2, 2)]
    if work.heads == 16 and max(work.widths) == 64 and max(work.cached) <= 16 and max(work.ranks) <= 2:
        # Of wider rows three have too many registers.
        return [(work.tile((128, 41_000), (64, 41_000)), 4, 2, 3)]
    return [(work.tile((128, 100_000), (64, 100_000), (32, 100_000)), 4, 2, 2)]


def _for_turned_rows(work: Work) -> Wanted:
    most = 62_000 if work.heads == 16 else 45_500
    tile = work.tile((64, most), (32, most))
    deep = work.heads_first or work.ranks[0] > 1
    return [(tile, 4, 3, 2)] * deep + [(tile, 4, 2, 2)]


def _for_many_columns(work: Work) -> Wanted:
    if work.columns > 128 or work.heads == 128:
        tile = work.tile((32, 66_000)) if work.columns > 128 else work.tile((64, 66_000), (32, 66_000))
        return [(tile, 8, 3, 1), (tile, 8, 2, 1)]
    if work.queries > 1 and (work.columns == 64 or work.groups > 1):
        tile = work.tile((64, 25_000), (32, 25_000))
        return [(tile, 4, 3, 2), (tile, 4, 2, 2)]
    if work.columns == 128:
        if work.token_bytes(work.widths) <= 400:
            return [(32, 4, 4, 2)]
        tile = work.tile((64, 50_000), (32, 66_000))
        return [(tile, 8, 3, 1), (tile, 8, 2, 1)]
    if work.wide and max(work.widths) <= 64:
        # One program with more stages instead of two: as many bytes on their way, and room for the merge beside.
        tile = work.tile((64, 33_000), (32, 33_000))
        alone = 4 * tile * work.token_bytes(work.widths) >= ALONE
        return [(tile, 4, 4, 1) if alone else (tile, 4, 3, 2)]
    tile = work.tile((64, 50_000), (32, 66_000))
    return [(tile, 4, 3, 2), (tile, 4, 3, 1), (tile, 4, 2, 1)]


def _for_few_columns(work: Work) -> Wanted:
    if not work.wide:
        tile = work.tile((128, 50_000), (64, 50_000), (32, 66_000))
        return [(tile, 4, 3, 1), (tile, 4, 2, 1)]
    if max(work.widths) <= 32:
        tile = work.tile((128, 50_000), (64, 50_000), (32, 50_000))
        return [(tile, 4, 3, 2), (tile, 4, 2, 2)]
    tile = work.tile((128, 50_000), (64, 62_000), (32, 74_000))
    if work.heads == 16 and tile == 16 and max(work.widths) <= 128:
        # Too little for four warps.
        return [(16, 2, 2, 2)]
    if work.heads == 32 and tile == 32 and max(work.widths) <= 128 and work.tile((32, 46_000)) == 32:
        return [(16, 4, 3, 2)]
    return [(tile, 4, 3, 1), (tile, 4, 2, 1)]


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
