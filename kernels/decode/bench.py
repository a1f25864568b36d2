"""Benchmark rows of `kernels.decode`; what each name means: `kernels.bench.operations`.

Shapes: B batch, T query tokens, M cached tokens, H heads, D head dimension, R rank of K and of V.
"""

from pathlib import Path

import torch

from kernels.attention import attention
from kernels.bench.others import Reference
from kernels.bench.plan import Row, Sizes, n_bytes, without_gradients
from kernels.decode import MOST_QUERIES, decode
from kernels.place import TRITON_IS_INSTALLED

WHAT = "TPA attention over a cache of factors, and MHA over a full cache"
OPTIONS = {
    "batch": "sequences",
    "context": "cached tokens",
    "queries": "new tokens",
    "heads": "attention heads",
    "head_dim": "features per head",
    "rank": "rank of K and of V",
}
FOLDERS = {
    "reference": "a clone of the paper's public code, whose kernel is timed too (needs a GPU); its autotuner gets"
    " 10 s for each size"
}
# 34 heads: the small T6; 47: the medium one (table 9).
CPU_SIZES = {"batch": 1, "context": 4096, "queries": 1, "heads": 34, "head_dim": 64, "rank": 2}
GPU_SIZES = {"batch": 16, "context": 32768, "queries": 1, "heads": 47, "head_dim": 64, "rank": 2}


def rows(sizes: Sizes, dtype: torch.dtype, *, reference: Path | None = None) -> list[Row]:
    B, M, T, H = sizes["batch"], sizes["context"], sizes["queries"], sizes["heads"]
    D, R = sizes["head_dim"], sizes["rank"]
    q_BTHD = torch.randn(B, T, H, D, dtype=dtype)
    a_k, a_v = torch.randn(2, B, M, R, H, dtype=dtype)
    b_k, b_v = torch.randn(2, B, M, R, D, dtype=dtype)
    k_BMHD, v_BMHD = torch.randn(2, B, M, H, D, dtype=dtype)
    scale = D**-0.5
    q_and_o = 2 * n_bytes(q_BTHD)

    def tpa(backend: str) -> Row:
        run = without_gradients(lambda: decode(q_BTHD, a_k, b_k, a_v, b_v, scale=scale, backend=backend))
        return Row(backend, "forward", run, q_and_o + n_bytes(a_k, b_k, a_v, b_v))

    mha = without_gradients(lambda: attention(q_BTHD, k_BMHD, v_BMHD, scale=scale, causal=False))
    with_triton = q_BTHD.is_cuda and TRITON_IS_INSTALLED and T <= MOST_QUERIES
    return [
        tpa("sdpa"),
        tpa("plain"),
        *([tpa("triton")] if with_triton else []),
        Row("MHA over a full cache", "forward", mha, q_and_o + n_bytes(k_BMHD, v_BMHD)),
        *([_reference_row(reference, sizes, q_BTHD.device, dtype)] if reference is not None else []),
    ]


def _reference_row(folder: Path, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Row:
    paper = Reference(folder)
    if device.type != "cuda" or dtype != torch.bfloat16 or sizes["queries"] > 1:
        raise ValueError(
            "--reference: the paper's kernel is timed on a CUDA device, in bfloat16, on one query"
        )
    B, M, H, D, R = (sizes[name] for name in ("batch", "context", "heads", "head_dim", "rank"))
    least_bytes = 2 * B * (M * 2 * R * (H + D) + 2 * H * D)
    return Row("the paper's kernel", "forward", paper.call(B, M, H, D, R, device), least_bytes)
