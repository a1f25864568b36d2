"""Benchmark rows of `kernels.attention`; what each name means: `kernels.bench.operations`.

Shapes: B batch, T tokens, H heads, G KV heads, D head dimension.
"""

from functools import partial
from typing import Any

import torch

from kernels.attention import attention, offsets
from kernels.bench.paper import HEADS
from kernels.bench.plan import Row, Sizes, both_modes

WHAT = "causal attention over full keys and values"
OPTIONS = {
    "batch": "sequences",
    "context": "tokens per sequence",
    "heads": "attention heads",
    "head_dim": "features per head",
    "kv_heads": "heads of keys and values",
}
CPU_SIZES = {"batch": 1, "context": 512, "heads": 34, "head_dim": 64, "kv_heads": "heads"}
GPU_SIZES = {"batch": 16, "context": 1024, "heads": 47, "head_dim": 64, "kv_heads": "heads"}
PAPER_SIZES = [
    {"batch": 16384 // context, "context": context, "heads": heads, "head_dim": 64}
    for heads in HEADS.values()
    for context in (1024, 2048)
]

MOST_PLAIN_WEIGHT_BYTES = 6 * 2**30


def rows(sizes: Sizes, dtype: torch.dtype) -> list[Row]:
    B, T, H, G, D = (sizes[name] for name in ("batch", "context", "heads", "kv_heads", "head_dim"))
    if H % G:
        raise ValueError(f"--kv-heads {G} must divide --heads {H}")
    q = torch.randn(B, T, H, D, dtype=dtype, requires_grad=True)
    k = torch.randn(B, T, G, D, dtype=dtype, requires_grad=True)
    v = torch.randn(B, T, G, D, dtype=dtype, requires_grad=True)

    def backend_rows(backend: str, **options: Any) -> list[Row]:
        name = backend + (", documents" if options else "")
        run = partial(attention, q, k, v, scale=D**-0.5, backend=backend, **options)
        return both_modes(name, run, [q, k, v])

    on_gpu = []
    if q.is_cuda and dtype != torch.float32:
        # Documents of 256 tokens on average, packed.
        documents = offsets((torch.rand(B, T) < 1 / 256).cumsum(1))
        on_gpu = [
            *(row for name in ("flash", "cudnn") for row in backend_rows(name)),
            *(backend_rows("efficient") if G == H else []),
            *backend_rows("varlen", documents=documents),
            *backend_rows("sdpa", documents=documents),
        ]
    # It holds several tensors of all weights at once.
    plain_fits = 4 * B * H * T * T <= MOST_PLAIN_WEIGHT_BYTES
    return [*backend_rows("sdpa"), *(backend_rows("plain") if plain_fits else []), *on_gpu]
