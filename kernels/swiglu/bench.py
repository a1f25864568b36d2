"""Benchmark rows of `kernels.swiglu`; what each name means: `kernels.bench.operations`.

Shapes: B batch, T tokens.
"""

from functools import partial

import torch

from kernels.bench.paper import FFN_WIDTHS
from kernels.bench.plan import Row, Sizes, both_modes, n_bytes
from kernels.place import TRITON_IS_INSTALLED
from kernels.swiglu import plain, swiglu

WHAT = "SwiGLU of gate and up side by side, in training"
OPTIONS = {
    "batch": "sequences",
    "context": "tokens per sequence",
    "hidden": "hidden size of the FFN",
}
CPU_SIZES = {"batch": 1, "context": 1024, "hidden": 2048}
GPU_SIZES = {"batch": 16, "context": 1024, "hidden": 2752}
PAPER_SIZES = [{"batch": 16, "context": 1024, "hidden": hidden} for hidden in FFN_WIDTHS.values()]


def rows(sizes: Sizes, dtype: torch.dtype) -> list[Row]:
    B, T, hidden = (sizes[name] for name in ("batch", "context", "hidden"))
    gate_up = torch.randn(B, T, 2 * hidden, dtype=dtype, requires_grad=True)
    backends = {"plain": partial(swiglu, gate_up, backend="plain")}
    if gate_up.is_cuda and TRITON_IS_INSTALLED:
        compiled = torch.compile(plain.swiglu)
        backends |= {
            "compiled": lambda: compiled(gate_up),
            "triton": partial(swiglu, gate_up, backend="triton"),
        }
    least = n_bytes(gate_up) * 3 // 2
    # The backward pass reads its upstream gradient and the input, and writes that one's gradient.
    both = (least, least + n_bytes(gate_up) * 5 // 2)
    return [row for name, run in backends.items() for row in both_modes(name, run, [gate_up], both)]
