"""The decode kernel over heads, ranks, lengths and layouts in one run: `python -m kernels.bench decode --table`.

Every time is of CUDA graph replays, per call. A graph's calls go round caches of more than 256 MB together, so that
none finds its cache in L2, and each call appends one token to its rows. Both launches and the append count.

Shapes: B batch, T query tokens, M cached tokens, H heads, G KV heads, D head dimension, R rank of K and V.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from kernels.bench import others
from kernels.bench.others import Reference
from kernels.bench.report import environment
from kernels.bench.timing import copy_bandwidth, event_seconds, graph_times, median, quantile
from kernels.decode import decode, layout
from kernels.decode.grouped import decode_grouped

HELP = "the Triton kernel over heads, ranks, lengths and layouts beside SDPA (needs a GPU)"
FOLDERS = ("reference",)

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


def run(
    device: torch.device, *, chosen: list[Case] | None = None, reference: Path | None = None
) -> dict[str, Any]:
    """Times the cases, beside them the paper's kernel from the clone `reference`; seconds and bytes per second.

    Raises AssertionError when a longer cache, another batch or another capacity compiles a kernel again, and
    ValueError, in one sentence, for a folder without the paper's kernel.
    """
    from kernels.decode import triton as kernel

    paper = None if reference is None else Reference(reference)
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "operation": "decode",
        "dtype": "bfloat16",
        "copy_bytes_per_second": copy_bandwidth(device),
        **environment(device),
        "triton": kernel.triton.__version__,
        "recompilations": _recompilations(device),
        "rows": [],
    }
    baselines: dict[tuple[int, ...], dict[str, Any]] = {}
    for case in chosen or cases():
        times = _tpa_times(case, device)
        key = (case.heads, case.head_dim, case.batch, case.tokens, case.queries)
        if key not in baselines:
            baselines[key] = _baselines(case, device, paper)
        row = {
            **asdict(case),
            "cache_bytes": case.n_bytes,
            "median_s": median(times),
            "quartiles_s": [quantile(times, 0.25), quantile(times, 0.75)],
            "share_of_copy_bandwidth": case.n_bytes / median(times) / result["copy_bytes_per_second"],
            **baselines[key],
        }
        result["rows"].append(row)
        # As it goes: of a run that is stopped, this is what is left.
        print(
            f"{case.heads}, {case.head_dim}, {case.rank}; {case.batch} x {case.tokens:,}, {case.queries}, {case.how}:"
            f" {row['median_s'] * 1e6:.1f} µs, {row['share_of_copy_bandwidth']:.1%}",
            file=sys.stderr,
            flush=True,
        )
    result["others"] = [] if chosen else _others(device, result["copy_bytes_per_second"])
    by_case = {tuple(row[name] for name in Case.__dataclass_fields__): row for row in result["rows"]}
    for row in result["rows"]:
        # The same work by one query, or dense: what several queries, ragged rows and pages cost.
        twin = {name: row[name] for name in Case.__dataclass_fields__}
        twin |= {"queries": 1, "lengths": "even", "pages": 0}
        candidates = [by_case.get(tuple((twin | {"group": group}).values())) for group in _groups(result)]
        base = next((found for found in candidates if found is not None and found is not row), None)
        row["times_one_dense_query"] = row["median_s"] / base["median_s"] if base else None
    return result


def table(result: dict[str, Any]) -> str:
    """Markdown, one row a case."""
    lines = [
        f"{where(result)}; {result['recompilations']} recompilations",
    ]
    for group in _groups(result):
        lines += [
            "",
            f"**{group}**",
            "",
            "| h, d_h, R | B | tokens | T | layout | MB | µs | of copy | plain | GQA-8 | MQA | paper's | to one dense"
            " query |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in result["rows"]:
            if row["group"] != group:
                continue
            how = Case(**{name: row[name] for name in Case.__dataclass_fields__ if name in row}).how
            ratios = [
                f"{row[name] / row['median_s']:.2f}×" if row.get(name) else ""
                for name in ("plain_s", "gqa8_s", "mqa_s", "reference_s")
            ]
            to_one = row["times_one_dense_query"]
            lines.append(
                f"| {row['heads']}, {row['head_dim']}, {row['rank']} | {row['batch']} | {row['tokens']:,} |"
                f" {row['queries']} | {how} | {row['cache_bytes'] / 1e6:.0f} |"
                f" {row['median_s'] * 1e6:.1f} | {row['share_of_copy_bandwidth']:.1%} | {' | '.join(ratios)} |"
                f" {f'{to_one:.2f}×' if to_one else ''} |"
            )
    if result.get("others"):
        lines += [
            "",
            "**other mechanisms**",
            "",
            "| what | B | tokens | MB | µs | of copy |",
            "| --- " * 6 + "|",
        ]
        lines += map(_other_line, result["others"])
    return "\n".join(lines)


def where(result: dict[str, Any]) -> str:
    """Device, versions, commit, date and the copy's bandwidth."""
    return (
        f"{result['device']}, torch {result['torch']}, Triton {result['triton']}, {result['dtype']}, commit"
        f" {result['git_commit'] or 'unknown'}, {result['date']}; copy"
        f" {result['copy_bytes_per_second'] / 1e9:.0f} GB/s"
    )


def _other_line(row: dict[str, Any]) -> str:
    case = f"| {row['what']} | {row['batch']} | {row['tokens']:,} |"
    if "why_not" in row:
        return f"{case} | {row['why_not']} | |"
    share = row["share_of_copy_bandwidth"]
    return f"{case} {row['cache_bytes'] / 1e6:.0f} | {row['median_s'] * 1e6:.1f} | {share:.1%} |"


def _others(device: torch.device, bandwidth: float) -> list[dict[str, Any]]:
    """Other mechanisms by our kernel, and MLA and GQA by FlashInfer where it is installed."""
    # name, elements of a token, how to make a call
    mechanisms: list[tuple[str, int, Callable[[int, int], Callable[[], torch.Tensor]]]] = [
        (f"{what}, Triton", elements, partial(_ours, q_heads, kv_heads, *widths, device))
        for what, elements, q_heads, kv_heads, widths in (
            ("MLA of 256 + 32", 288, 32, 1, (288, 256)),
            ("MLA of 512 + 64", 576, 32, 1, (576, 512)),
            ("GQA of 3 x 74", 444, 24, 3, (74, 74)),
            ("GQA of 8 x 64", 1024, 32, 8, (64, 64)),
            ("MHA of 16 x 64", 2048, 16, 16, (64, 64)),
        )
    ]
    if others.FLASHINFER_IS_INSTALLED:
        mechanisms += [
            (
                "MLA of 512 + 64, FlashInfer",
                576,
                lambda batch, tokens: others.flashinfer_mla(batch, tokens, 32, device),
            ),
            (
                "GQA of 8 x 64, FlashInfer",
                1024,
                lambda batch, tokens: others.flashinfer_grouped(batch, tokens, 32, 8, 64, device),
            ),
        ]
    rows = []
    for batch, tokens in ((16, 65536), (1, 65536)):
        for what, elements, make in mechanisms:
            torch.cuda.empty_cache()
            size = batch * tokens * elements * 2
            row: dict[str, Any] = {"what": what, "batch": batch, "tokens": tokens, "cache_bytes": size}
            try:
                n_caches = max(1, math.ceil(ROTATED_BYTES / size))
                made = [make(batch, tokens) for _ in range(n_caches)]
                calls = [made[i % n_caches] for i in range(max(FEWEST_CALLS, n_caches))]
                row["median_s"] = median(graph_times(calls))
                row["share_of_copy_bandwidth"] = size / row["median_s"] / bandwidth
            # A library that builds itself at its first call can fail in any way: the table goes on without it.
            except Exception as error:
                row["why_not"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            rows.append(row)
    return rows


def _ours(H: int, G: int, D: int, E: int, device: torch.device, B: int, M: int) -> Callable[[], torch.Tensor]:
    """One query token of H heads over G KV heads; values narrower than keys are their first features."""
    k = torch.randn(B, M, G, D, device=device, dtype=torch.bfloat16)
    v = k[..., :E] if E < D else torch.randn(B, M, G, E, device=device, dtype=torch.bfloat16)
    q = torch.randn(B, 1, H, D, device=device, dtype=torch.bfloat16)
    lengths = torch.full((B,), M, device=device)
    return lambda: decode_grouped(q, k, v, scale=D**-0.5, lengths=lengths, backend="triton")


def _groups(result: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["group"] for row in result["rows"]))


def _factors(case: Case, device: torch.device, rows: int, tokens: int) -> list[torch.Tensor]:
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


def _lengths(case: Case, n_calls: int, device: torch.device) -> tuple[list[torch.Tensor], int]:
    """Lengths (B,) of each call, growing by one, their mean about `tokens`; and the capacity that holds them."""
    if case.lengths == "even":
        last = torch.full((case.batch,), case.tokens)
    else:
        draw = torch.rand(case.batch)
        last = (draw / draw.mean() * case.tokens).long().clamp_min(GROWTH + case.queries)
    capacity = math.ceil(int(last.max()) / 128) * 128
    growth = min(GROWTH, case.tokens // 64)
    return [(last - min(growth, n_calls - i)).to(device) for i in range(n_calls)], capacity


def _tpa_times(case: Case, device: torch.device) -> list[float]:
    return graph_times(tpa_calls(case, device))


def tpa_calls(case: Case, device: torch.device) -> list[Callable[[], torch.Tensor]]:
    """Calls of the Triton kernel with lengths that grow, round caches of more than 256 MB together."""
    torch.cuda.empty_cache()
    n_caches = max(1, math.ceil(ROTATED_BYTES / case.n_bytes))
    n_calls = min(MOST_CALLS, max(FEWEST_CALLS, n_caches))
    n_caches = min(n_caches, MOST_CALLS)
    lengths, capacity = _lengths(case, n_calls, device)
    q = torch.randn(case.batch, case.queries, case.heads, case.head_dim, device=device, dtype=torch.bfloat16)
    pages = None
    if case.pages:
        per_row = capacity // case.pages
        pages = torch.randperm(case.batch * per_row, device=device).int().view(case.batch, per_row)
        caches = [_factors(case, device, pages.numel(), case.pages) for _ in range(n_caches)]
    else:
        caches = [_factors(case, device, case.batch, capacity) for _ in range(n_caches)]
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


def _baselines(case: Case, device: torch.device, reference: Reference | None) -> dict[str, float | None]:
    """Seconds of one call: the plain twin, SDPA over as many tokens with 8 and with 1 KV heads, the paper's kernel."""
    found: dict[str, float | None] = {"plain_s": None, "gqa8_s": None, "mqa_s": None, "reference_s": None}
    torch.cuda.empty_cache()
    B, T, H, D, M = case.batch, case.queries, case.heads, case.head_dim, case.tokens
    q_BHTD = torch.randn(B, H, T, D, device=device, dtype=torch.bfloat16)
    for name, G in (("gqa8_s", 8), ("mqa_s", 1)):
        if H % G or T > 1:
            continue
        n_caches = max(1, math.ceil(ROTATED_BYTES / (B * M * G * D * 4)))
        n_calls = min(MOST_CALLS, max(FEWEST_CALLS, n_caches))
        caches = [
            torch.randn(2, B, G, M, D, device=device, dtype=torch.bfloat16)
            for _ in range(min(n_caches, MOST_CALLS))
        ]
        turns = [caches[i % len(caches)] for i in range(n_calls)]
        calls = [
            lambda k=k, v=v: F.scaled_dot_product_attention(q_BHTD, k, v, enable_gqa=True) for k, v in turns
        ]
        found[name] = median(graph_times(calls))
    if T == 1 and reference is not None:
        torch.cuda.empty_cache()
        size = B * M * 2 * case.rank * (H + D) * 2
        n_caches = min(MOST_CALLS, max(1, math.ceil(ROTATED_BYTES / size)))
        try:
            made = [reference.call(B, M, H, D, case.rank, device) for _ in range(n_caches)]
            calls = [made[i % n_caches] for i in range(max(FEWEST_CALLS, n_caches))]
            found["reference_s"] = median(graph_times(calls))
        except Exception as error:  # not all sizes compile
            print(f"the paper's kernel at {case}: {type(error).__name__}", file=sys.stderr)
    if T == 1 and case.group not in ("by length", "rows made on the chip"):
        factors = _factors(replace(case, layout="split"), device, B, M)
        q_BTHD = q_BHTD.transpose(1, 2)
        run = torch.no_grad()(lambda: decode(q_BTHD, *factors, scale=D**-0.5, backend="plain"))
        run()
        found["plain_s"] = median([event_seconds(run) for _ in range(3)])
    return found


def _recompilations(device: torch.device) -> int:
    """Kernels compiled while lengths, capacity and batch change; must be 0."""
    from kernels.decode import triton as kernel

    def grow(batch: int, capacity: int, lengths: list[int]) -> None:
        case = Case(47, 64, 2, batch, capacity)
        factors = _factors(case, device, batch, capacity)
        q = torch.randn(batch, 1, 47, 64, device=device, dtype=torch.bfloat16)
        for length in lengths:
            rows = torch.full((batch,), length, device=device)
            decode(q, *factors, scale=0.125, lengths=rows, backend="triton")

    # The second kernel comes in a few widths, by how many rows share the programs.
    batches = (1, 2, 3, 5, 16, 33, 70, 140, 300)
    for batch in batches:
        grow(batch, 256, [256])
    before = kernel.n_compiled()
    for batch in batches:
        for capacity in (1, 16, 17, 255, 1000):
            grow(batch, capacity, [1, capacity // 2, capacity])
    after = kernel.n_compiled()
    if after != before:
        raise AssertionError(f"{after - before} kernels were compiled again while a sequence grew")
    return after - before
