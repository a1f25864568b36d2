"""Benchmark rows of `kernels.contract`; what each name means: `kernels.bench.operations`.

Shapes: B batch, T tokens, H heads, D head dimension, R rank.
"""

import torch

from kernels.bench.paper import HEADS
from kernels.bench.plan import Row, Sizes, both_modes, n_bytes
from kernels.contract import contract
from kernels.contract.qkv import Part, contract_qkv
from kernels.place import TRITON_IS_INSTALLED
from kernels.rope import rotate

WHAT = "queries, keys or values from their factors, RoPE included"
OPTIONS = {
    "batch": "sequences",
    "context": "tokens per sequence",
    "heads": "attention heads",
    "head_dim": "features per head",
    "rank": "rank",
}
CPU_SIZES = {"batch": 1, "context": 1024, "heads": 34, "head_dim": 64, "rank": 6}
GPU_SIZES = {"batch": 16, "context": 1024, "heads": 47, "head_dim": 64, "rank": 6}
# Rank 6 for Q, 2 for K and V.
PAPER_SIZES = [
    {"batch": 16, "context": 1024, "heads": heads, "head_dim": 64, "rank": rank}
    for heads in HEADS.values()
    for rank in (6, 2)
]


def rows(sizes: Sizes, dtype: torch.dtype) -> list[Row]:
    B, T, H, D, R = (sizes[name] for name in ("batch", "context", "heads", "head_dim", "rank"))
    a = torch.randn(B, T, R, H, dtype=dtype, requires_grad=True)
    b = torch.randn(B, T, R, D, dtype=dtype, requires_grad=True)
    angle = torch.arange(T)[:, None] * 1e4 ** (-2 * torch.arange(D // 2) / D)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    # Backward: the result's gradient and the factors are read, the factors' gradients written.
    factors, result = n_bytes(a, b), B * T * H * D * a.element_size()
    least = (factors + result, 3 * factors + 2 * result)

    def separate_passes() -> torch.Tensor:
        return torch.einsum("btrh,btrd->bthd", a, rotate(b, cos, sin)) / R

    record, parts = _record((R, 2, 2), B, T, H, D, dtype)
    numbers, results = n_bytes(record), 3 * result
    least_of_record = (numbers + results, 3 * numbers + 2 * results)

    def backend_rows(backend: str) -> list[Row]:
        def of_record() -> tuple[torch.Tensor, ...]:
            return contract_qkv(record, parts, (cos, sin), (cos, sin), backend=backend)

        return [
            *both_modes(backend, lambda: contract(a, b, cos, sin, backend=backend), [a, b], least),
            *both_modes(f"{backend}, Q K V of {R}, 2, 2", of_record, [record], least_of_record),
        ]

    with_triton = a.is_cuda and TRITON_IS_INSTALLED
    return [
        *both_modes("separate passes", separate_passes, [a, b], least),
        *backend_rows("plain"),
        *(backend_rows("triton") if with_triton else []),
    ]


def _record(
    ranks: tuple[int, int, int], B: int, T: int, H: int, D: int, dtype: torch.dtype
) -> tuple[torch.Tensor, list[Part]]:
    """Factors of Q, K and V side by side, laid out as in the model on a GPU."""
    parts, end = [], 0
    for rank in ranks:
        b = -(-(end + rank * H) // 16) * 16
        parts.append(Part(end, b, rank, H, D))
        end = -(-(b + rank * D) // 16) * 16
    return torch.randn(B, T, -(-end // 64) * 64, dtype=dtype, requires_grad=True), parts
