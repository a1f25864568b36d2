"""The cases of `bench_table.py` and `bench_launches.py`, and calls of the Triton kernel on each.

A graph's calls go round caches of more than 256 MB together, so that none finds its cache in L2, and each call appends
one token to its rows. Both launches and the append count.

Shapes: B batch, T query tokens, M cached tokens, H heads, D head dimension, R rank of K and V.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from kernels.decode import decode, layout

ROTATED_BYTES = 2.56e8
# Calls of one graph: what it takes to start the graph is shared by all of them.
FEWEST_CALLS, MOST_CALLS = 16, 64
# What growing lengths shorten the first call by, at most.
GROWTH = MOST_CALLS


@dataclass(frozen=True)
class Case:
    """bf16. `layout`: entries (B, M, R, H) "split", the same with ranks of A "padded", or one "record" per token.

    `lengths`: "even", or "ragged" (drawn from 1 to twice the mean). `pages`: tokens of a page, 0 for none.
    `further`: features of c (order 3; b has head_dim / further), 0 for none. `shared_b`: V has K's b, which turns when
    it is read.
    """

    heads: int
    head_dim: int
    rank: int
    batch: int
    tokens: int
    queries: int = 1
    layout: str = "padded"
    lengths: str = "even"
    pages: int = 0
    further: int = 0
    shared_b: bool = False
    group: str = "256 MB and more"

    @property
    def n_bytes(self) -> int:
        """Of the cache, unpadded."""
        features = self.head_dim // self.further + self.further if self.further else self.head_dim
        elements = 2 * (self.heads + features) - (self.head_dim if self.shared_b else 0)
        return self.batch * self.tokens * self.rank * elements * 2

    @property
    def how(self) -> str:
        """All that differs from even rows of two whole factors, and the layout."""
        said = [self.layout, self.lengths * (self.lengths != "even"), "paged" * (self.pages > 0)]
        said += [f"order 3 ({self.head_dim // self.further} × {self.further})" if self.further else ""]
        return " ".join(filter(None, [*said, "shared b" * self.shared_b]))


def cases() -> list[Case]:
    """Issue by issue of what decoding must be fast at."""
    large = [
        Case(heads, head_dim, rank, 16, 65536 // rank)
        for head_dim in (64, 128)
        for heads in (16, 32, 48, 64)
        for rank in (1, 2, 4)
    ]
    odd = [
        Case(heads, 64, 2, 16, 32768, layout=name, group="odd head counts")
        for heads in (34, 47, 61, 78)
        for name in ("padded", "record", "split")
    ]
    medium = [
        Case(32, 64, 1, 16, 16384, group="16 to 256 MB"),
        Case(32, 64, 1, 1, 65536, group="16 to 256 MB"),
        Case(32, 64, 2, 16, 8192, group="16 to 256 MB"),
        Case(47, 64, 2, 32, 8192, group="16 to 256 MB"),
        Case(32, 128, 1, 1, 262144, group="16 to 256 MB"),
    ]
    small = [
        Case(32, 64, 1, 1, 4096, group="one row, 4,096 tokens"),
        Case(47, 64, 2, 1, 4096, group="one row, 4,096 tokens"),
        Case(32, 64, 1, 1, 512, group="one row, 4,096 tokens"),
    ]
    lengths = [
        Case(heads, 64, rank, batch, tokens, group="by length")
        for heads, rank, batch, longest in ((32, 1, 16, 262144), (47, 2, 16, 65536), (32, 1, 1, 262144))
        for tokens in (1024, 4096, 16384, 65536, 262144)
        if tokens <= longest
    ]
    one = [Case(32, 64, 1, 16, 65536), Case(32, 64, 2, 16, 32768), Case(47, 64, 2, 16, 32768)]
    lengths.append(Case(32, 64, 2, 16, 65536, group="by length"))
    several = [replace(case, queries=4, group="query tokens") for case in one]
    several += [replace(one[1], queries=queries, group="query tokens") for queries in (2, 8, 16)]
    other = [
        replace(case, group="ragged and paged", **changes)
        for case in one[:2]
        for changes in ({"lengths": "ragged"}, {"pages": 64}, {"lengths": "ragged", "pages": 64})
    ]
    made = [
        replace(case, group="rows made on the chip", **changes)
        for case in (one[1], one[2])
        for changes in ({"further": 8}, {"further": 4}, {"shared_b": True})
    ]
    return large + odd + medium + small + several + other + made + lengths


def factors(case: Case, device: torch.device, rows: int, tokens: int) -> list[torch.Tensor]:
    """a_k, b_k, a_v, b_v and, at order 3, c_k, c_v."""
    H, D, R = case.heads, case.head_dim, case.rank
    if case.layout == "record":
        width = layout.record_width(H, D, D, R, R, 2)
        records = torch.randn(rows, tokens, width, device=device, dtype=torch.bfloat16)
        return list(layout.views(records, H, D, D, R, R))
    stored = layout.padded_heads(H, D, D, R, R, 2) if case.layout == "padded" else H
    P = D // case.further if case.further else D
    widths = [
        (stored, H),
        (P, P),
        (stored, H),
        (P, P),
        *[(case.further, case.further)] * (2 if case.further else 0),
    ]
    factors = [
        torch.randn(rows, tokens, R, kept, device=device, dtype=torch.bfloat16)[..., :used]
        for kept, used in widths
    ]
    if case.shared_b:
        factors[3] = factors[1]
    return factors


def lengths_of_calls(case: Case, n_calls: int, device: torch.device) -> tuple[list[torch.Tensor], int]:
    """Lengths (B,) of each call, growing by one, their mean about `tokens`; and the capacity that holds them."""
    if case.lengths == "even":
        last = torch.full((case.batch,), case.tokens)
    else:
        draw = torch.rand(case.batch)
        last = (draw / draw.mean() * case.tokens).long().clamp_min(GROWTH + case.queries)
    capacity = math.ceil(int(last.max()) / 128) * 128
    growth = min(GROWTH, case.tokens // 64)
    return [(last - min(growth, n_calls - i)).to(device) for i in range(n_calls)], capacity


def tpa_calls(case: Case, device: torch.device) -> list[Callable[[], torch.Tensor]]:
    """Calls of the Triton kernel with lengths that grow, round caches of more than 256 MB together."""
    torch.cuda.empty_cache()
    n_caches = max(1, math.ceil(ROTATED_BYTES / case.n_bytes))
    n_calls = min(MOST_CALLS, max(FEWEST_CALLS, n_caches))
    n_caches = min(n_caches, MOST_CALLS)
    lengths, capacity = lengths_of_calls(case, n_calls, device)
    q = torch.randn(case.batch, case.queries, case.heads, case.head_dim, device=device, dtype=torch.bfloat16)
    pages = None
    if case.pages:
        per_row = capacity // case.pages
        pages = torch.randperm(case.batch * per_row, device=device).int().view(case.batch, per_row)
        caches = [factors(case, device, pages.numel(), case.pages) for _ in range(n_caches)]
    else:
        caches = [factors(case, device, case.batch, capacity) for _ in range(n_caches)]
    shapes = [(case.batch, case.queries, *factor.shape[2:]) for factor in caches[0]]
    new: list[torch.Tensor | None] = [
        torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes
    ]
    turn = None
    if case.shared_b:
        new[3] = None
        angles = torch.randn(capacity, case.head_dim // 2, device=device)
        turn = angles.cos(), angles.sin()

    def call(i: int) -> torch.Tensor:
        a_k, b_k, a_v, b_v, *further = caches[i % n_caches]
        return decode(
            q,
            a_k,
            b_k,
            a_v,
            b_v,
            scale=case.head_dim**-0.5,
            lengths=lengths[i],
            pages=pages,
            new=tuple(new),
            c_k=further[0] if further else None,
            c_v=further[1] if further else None,
            turn=turn,
            backend="triton",
        )

    return [partial(call, i) for i in range(n_calls)]
