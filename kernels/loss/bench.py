"""Benchmark rows of `kernels.loss`; what each name means: `kernels.bench.operations`.

Shapes: N tokens flattened, C d_model, V vocabulary.
"""

import torch
import torch.nn.functional as F

from kernels.bench.paper import HEADS
from kernels.bench.plan import Row, Sizes, both_modes
from kernels.loss import linear_cross_entropy, linear_cross_entropy_sum

WHAT = "linear layer and cross-entropy"
OPTIONS = {
    "batch": "sequences",
    "context": "tokens per sequence",
    "d_model": "hidden size",
    "vocabulary": "classes",
}
CPU_SIZES = {"batch": 2, "context": 512, "d_model": 128, "vocabulary": 8192}
GPU_SIZES = {"batch": 16, "context": 1024, "d_model": 1024, "vocabulary": 50304}
PAPER_SIZES = [{"batch": 16, "context": 1024, "d_model": d_model, "vocabulary": 50304} for d_model in HEADS]


def rows(sizes: Sizes, dtype: torch.dtype) -> list[Row]:
    N, C, V = sizes["batch"] * sizes["context"], sizes["d_model"], sizes["vocabulary"]
    x = torch.randn(N, C, dtype=dtype, requires_grad=True)
    weight = (torch.randn(V, C) * C**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,))

    def all_logits() -> torch.Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), targets, reduction="none")

    found = [
        *both_modes("all logits", all_logits, [x, weight]),
        *both_modes("plain (chunks)", lambda: linear_cross_entropy(x, weight, targets), [x, weight]),
        *both_modes("sum", lambda: linear_cross_entropy_sum(x, weight, targets), [x, weight]),
    ]
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is not None:
        chunked = options()
        torch_own = getattr(F, "linear_cross_entropy")  # noqa: B009 (not in every supported torch)
        found += both_modes(
            "torch's chunks",
            lambda: torch_own(x, weight, targets, reduction="none", options=chunked),
            [x, weight],
        )
    return found
