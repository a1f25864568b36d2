"""Benchmark rows of `kernels.linear`; what each name means: `kernels.bench.operations`.

Shapes: B rows, K features of a row, N features of the result.
"""

from typing import Any

import torch

from kernels.bench.paper import FFN_WIDTHS, HEADS
from kernels.bench.plan import Row, Sizes, n_bytes, without_gradients
from kernels.linear import MOST_ROWS, TRITON_DTYPES, linear
from kernels.place import TRITON_IS_INSTALLED, is_hopper

WHAT = "a linear layer of a few rows, alone and with what stands around it in decoding"
OPTIONS = {"batch": "rows", "inputs": "features of a row", "outputs": "features of the result"}
CPU_SIZES = {"batch": 16, "inputs": 1024, "outputs": 1024}
GPU_SIZES = {"batch": 16, "inputs": 1024, "outputs": 2752}
# The products of one decoding step: factors (ranks 6, 2 and 2), the output matrix, gate and up, down.
PAPER_SIZES = [
    {"batch": 16, "inputs": inputs, "outputs": outputs}
    for d_model, heads in HEADS.items()
    for inputs, outputs in (
        (d_model, 10 * (heads + 64)),
        (64 * heads, d_model),
        (d_model, FFN_WIDTHS[d_model]),
        (FFN_WIDTHS[d_model], d_model),
    )
]


def rows(sizes: Sizes, dtype: torch.dtype) -> list[Row]:
    B, K, N = (sizes[name] for name in ("batch", "inputs", "outputs"))
    x, residual = torch.randn(B, K, dtype=dtype), torch.randn(B, N, dtype=dtype)
    weight, gate = ((torch.randn(N, K) * K**-0.5).to(dtype) for _ in range(2))
    around = {
        "": {},
        ", residual": {"residual": residual},
        ", norm and SwiGLU": {"gate_NK": gate, "norm_eps": 1e-5},
    }

    def row(backend: str, name: str, more: dict[str, Any]) -> Row:
        run = without_gradients(lambda: linear(x, weight, backend=backend, **more))
        read = [weight, x, *(part for part in more.values() if isinstance(part, torch.Tensor))]
        return Row(backend + name, "forward", run, n_bytes(*read) + n_bytes(residual))

    with_triton = (
        x.is_cuda and TRITON_IS_INSTALLED and is_hopper() and B <= MOST_ROWS and dtype in TRITON_DTYPES
    )
    backends = ("plain", "triton") if with_triton else ("plain",)
    return [row(backend, name, more) for name, more in around.items() for backend in backends]
