"""What `bench_table.py` times beside the Triton kernel of `kernels.decode`: other ways to do the same work.

Shapes: B batch, T query tokens, M cached tokens, H heads, G KV heads, D head dimension, R rank of K and V.
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from kernels.bench import others
from kernels.bench.others import Reference
from kernels.bench.timing import event_seconds, graph_times, median
from kernels.decode import decode
from kernels.decode.bench_cases import FEWEST_CALLS, MOST_CALLS, ROTATED_BYTES, Case, factors
from kernels.decode.grouped import decode_grouped

NAMES = ("plain_s", "gqa8_s", "mqa_s", "reference_s", "reference_settings_left_out")
# Groups of cases without the plain twin: it makes full keys and values, and other groups time it at these sizes.
WITHOUT_PLAIN = ("by length", "rows made on the chip")


class Baselines:
    """Seconds of one call of the plain twin, of SDPA with 8 and with 1 KV heads, and of the paper's kernel.

    Each is measured once for all cases that it does the same work for. "reference_settings_left_out": how many settings
    of the paper's kernel its autotuner did not come to.
    """

    def __init__(self, device: torch.device, reference: Reference | None) -> None:
        self._device = device
        self._reference = reference
        self._known: dict[tuple[str, Case], float | None] = {}

    def of(self, case: Case) -> dict[str, float | None]:
        """Name -> figure, None for what does not run on this case."""
        found: dict[str, float | None] = dict.fromkeys(NAMES)
        if case.queries > 1:
            return found
        # One query token over dense rows of two whole factors, however this case stores them.
        dense = replace(
            case, layout="split", lengths="even", pages=0, further=0, shared_b=False, group="baseline"
        )
        full = replace(dense, rank=1)  # keys and values of SDPA have no rank
        for name, G in (("gqa8_s", 8), ("mqa_s", 1)):
            if case.heads % G == 0:
                found[name] = self._once(name, full, partial(_sdpa_seconds, G=G))
        if self._reference is not None:
            found["reference_s"] = self._once(
                "reference_s", dense, partial(_reference_seconds, reference=self._reference)
            )
            # Of the tuning that has just ended, where it was not known already.
            left_out = self._reference.tuning.left_out
            found["reference_settings_left_out"] = self._once(
                "reference_settings_left_out", dense, lambda *_: left_out
            )
        if case.group not in WITHOUT_PLAIN:
            found["plain_s"] = self._once("plain_s", dense, _plain_seconds)
        return found

    def _once(
        self, name: str, case: Case, measure: Callable[[Case, torch.device], float | None]
    ) -> float | None:
        """The key is all of what is measured: `name`, and every field of a case that stands for the others."""
        if (name, case) not in self._known:
            torch.cuda.empty_cache()
            self._known[name, case] = measure(case, self._device)
        return self._known[name, case]


def _sdpa_seconds(case: Case, device: torch.device, *, G: int) -> float:
    B, H, D, M = case.batch, case.heads, case.head_dim, case.tokens
    q_BHTD = torch.randn(B, H, 1, D, device=device, dtype=torch.bfloat16)
    n_caches = max(1, math.ceil(ROTATED_BYTES / (B * M * G * D * 4)))
    n_calls = min(MOST_CALLS, max(FEWEST_CALLS, n_caches))
    caches = [
        torch.randn(2, B, G, M, D, device=device, dtype=torch.bfloat16)
        for _ in range(min(n_caches, MOST_CALLS))
    ]
    pairs = [caches[i % len(caches)] for i in range(n_calls)]
    calls = [lambda k=k, v=v: F.scaled_dot_product_attention(q_BHTD, k, v, enable_gqa=True) for k, v in pairs]
    return median(graph_times(calls))


def _reference_seconds(case: Case, device: torch.device, *, reference: Reference) -> float | None:
    B, H, D, R, M = case.batch, case.heads, case.head_dim, case.rank, case.tokens
    n_caches = min(MOST_CALLS, max(1, math.ceil(ROTATED_BYTES / case.n_bytes)))
    try:
        made = [reference.call(B, M, H, D, R, device) for _ in range(n_caches)]
        calls = [made[i % n_caches] for i in range(max(FEWEST_CALLS, n_caches))]
        return median(graph_times(calls))
    except Exception as error:  # not all sizes compile
        print(f"the paper's kernel at {case}: {type(error).__name__}", file=sys.stderr)
        return None


def _plain_seconds(case: Case, device: torch.device) -> float:
    B, H, D, M = case.batch, case.heads, case.head_dim, case.tokens
    q_BTHD = torch.randn(B, 1, H, D, device=device, dtype=torch.bfloat16)
    a_k, b_k, a_v, b_v = factors(case, device, B, M)
    run = torch.no_grad()(lambda: decode(q_BTHD, a_k, b_k, a_v, b_v, scale=D**-0.5, backend="plain"))
    run()
    return median([event_seconds(run) for _ in range(3)])


def other_mechanisms(device: torch.device, bandwidth: float) -> Iterator[dict[str, Any]]:
    """Other mechanisms by our kernel, and MLA and GQA by FlashInfer where it is installed."""
    # name, elements of a token, how to make a call
    mechanisms: list[tuple[str, int, Callable[[int, int], Callable[[], torch.Tensor]]]] = [
        (f"{what}, Triton", elements, partial(_grouped_call, q_heads, kv_heads, *widths, device))
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
            yield row


def _grouped_call(
    H: int, G: int, D: int, E: int, device: torch.device, B: int, M: int
) -> Callable[[], torch.Tensor]:
    """One query token of H heads over G KV heads; values narrower than keys are their first features."""
    k = torch.randn(B, M, G, D, device=device, dtype=torch.bfloat16)
    v = k[..., :E] if E < D else torch.randn(B, M, G, E, device=device, dtype=torch.bfloat16)
    q = torch.randn(B, 1, H, D, device=device, dtype=torch.bfloat16)
    lengths = torch.full((B,), M, device=device)
    return lambda: decode_grouped(q, k, v, scale=D**-0.5, lengths=lengths, backend="triton")
