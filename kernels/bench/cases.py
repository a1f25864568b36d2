"""What each operation's benchmark runs: inputs of the asked sizes, and one callable per row of the table.

Shapes: B batch, T query tokens, M cached tokens, H heads, G KV heads, D head dimension, R rank, C d_model,
V vocabulary, N tokens flattened.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from kernels.attention import attention, offsets
from kernels.bench.others import Reference
from kernels.contract import contract
from kernels.contract.qkv import Part, contract_qkv
from kernels.decode import MOST_QUERIES, decode
from kernels.linear import MOST_ROWS, linear
from kernels.linear import TRITON_DTYPES as HALVES
from kernels.loss import linear_cross_entropy, linear_cross_entropy_sum
from kernels.place import TRITON_IS_INSTALLED, is_hopper
from kernels.rope import rotate
from kernels.swiglu import swiglu
from kernels.swiglu.plain import swiglu as plain_swiglu

Sizes = dict[str, int]

# 34 heads: the small T6; 47: the medium one (table 9). Its ranks are 6 for Q, 2 for K and V.
CPU_SIZES: dict[str, Sizes] = {
    "decode": {"batch": 1, "context": 4096, "queries": 1, "heads": 34, "head_dim": 64, "rank": 2},
    "contract": {"batch": 1, "context": 1024, "heads": 34, "head_dim": 64, "rank": 6},
    "attention": {"batch": 1, "context": 512, "heads": 34, "head_dim": 64, "kv_heads": 34},
    "linear": {"batch": 16, "inputs": 1024, "outputs": 1024},
    "swiglu": {"batch": 1, "context": 1024, "hidden": 2048},
    "loss": {"batch": 2, "context": 512, "d_model": 128, "vocabulary": 8192},
}
GPU_SIZES: dict[str, Sizes] = {
    "decode": {"batch": 16, "context": 32768, "queries": 1, "heads": 47, "head_dim": 64, "rank": 2},
    "contract": {"batch": 16, "context": 1024, "heads": 47, "head_dim": 64, "rank": 6},
    "attention": {"batch": 16, "context": 1024, "heads": 47, "head_dim": 64, "kv_heads": 47},
    "linear": {"batch": 16, "inputs": 1024, "outputs": 2752},
    "swiglu": {"batch": 16, "context": 1024, "hidden": 2752},
    "loss": {"batch": 16, "context": 1024, "d_model": 1024, "vocabulary": 50304},
}


MOST_PLAIN_WEIGHT_BYTES = 6 * 2**30
PAPER_HEADS = {768: 34, 1024: 47, 1280: 61, 1600: 78}  # by d_model
FFN_WIDTHS = {768: 2048, 1024: 2752, 1280: 3456, 1600: 4288}  # 8/3 of d_model, rounded up to 64
# Of the paper's models with TPA (table 9), 16,384 tokens; linear: 16 rows.
PAPER_SIZES: dict[str, list[dict[str, int | None]]] = {
    "contract": [
        {"batch": 16, "context": 1024, "heads": heads, "head_dim": 64, "rank": rank}
        for heads in PAPER_HEADS.values()
        for rank in (6, 2)
    ],
    "attention": [
        {"batch": 16384 // context, "context": context, "heads": heads, "head_dim": 64, "kv_heads": None}
        for heads in PAPER_HEADS.values()
        for context in (1024, 2048)
    ],
    # What decoding of 16 rows multiplies: factors (ranks 6, 2 and 2), the output matrix, gate and up, down.
    "linear": [
        {"batch": 16, "inputs": inputs, "outputs": outputs}
        for d_model, heads in PAPER_HEADS.items()
        for inputs, outputs in (
            (d_model, 10 * (heads + 64)),
            (64 * heads, d_model),
            (d_model, FFN_WIDTHS[d_model]),
            (FFN_WIDTHS[d_model], d_model),
        )
    ],
    "swiglu": [{"batch": 16, "context": 1024, "hidden": hidden} for hidden in FFN_WIDTHS.values()],
    "loss": [
        {"batch": 16, "context": 1024, "d_model": d_model, "vocabulary": 50304} for d_model in PAPER_HEADS
    ],
}


@dataclass(frozen=True)
class Row:
    """One callable to time. `least_bytes`: what it must at least read and write, where that is the limit."""

    name: str
    mode: str
    run: Callable[[], object]
    least_bytes: int | None = None


@dataclass(frozen=True)
class Plan:
    operation: str
    device: torch.device
    dtype: torch.dtype
    sizes: Sizes
    rows: list[Row]


def plan(
    operation: str,
    given: dict[str, int | None],
    *,
    device: str | None,
    dtype: str | None,
    reference: Path | None = None,
) -> Plan:
    """The rows to time. Sizes, device and dtype that are None take what fits the device.

    With `reference`, a clone of the paper's public code, its kernel is one of the rows of "decode".

    Raises ValueError, in one sentence, for a device that is not there and for sizes that do not go together.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    defaults = (GPU_SIZES if where.type == "cuda" else CPU_SIZES)[operation]
    sizes = {**defaults, **{name: value for name, value in given.items() if value is not None}}
    if operation == "attention" and given["kv_heads"] is None:
        sizes["kv_heads"] = sizes["heads"]
    if sizes.get("head_dim", 2) % 2:
        raise ValueError(f"--head-dim must be even for RoPE, got {sizes['head_dim']}")
    if sizes.get("heads", 0) % sizes.get("kv_heads", 1):
        raise ValueError(f"--kv-heads {sizes['kv_heads']} must divide --heads {sizes['heads']}")
    precision = getattr(torch, dtype or ("bfloat16" if where.type == "cuda" else "float32"))

    torch.manual_seed(0)
    with torch.device(where):
        rows = BUILDERS[operation](sizes, precision)
    if reference is not None:
        rows.append(_reference_row(reference, sizes, where, precision))
    return Plan(operation, where, precision, sizes, rows)


def _reference_row(folder: Path, sizes: Sizes, where: torch.device, dtype: torch.dtype) -> Row:
    paper = Reference(folder)
    if where.type != "cuda" or dtype != torch.bfloat16 or sizes["queries"] > 1:
        raise ValueError(
            "--reference: the paper's kernel is timed on a CUDA device, in bfloat16, on one query"
        )
    B, M, H, D, R = (sizes[name] for name in ("batch", "context", "heads", "head_dim", "rank"))
    least_bytes = 2 * B * (M * 2 * R * (H + D) + 2 * H * D)
    return Row("the paper's kernel", "forward", paper.call(B, M, H, D, R, where), least_bytes)


def decode_rows(sizes: Sizes, dtype: torch.dtype) -> list[Row]:
    B, M, T, H = sizes["batch"], sizes["context"], sizes["queries"], sizes["heads"]
    D, R = sizes["head_dim"], sizes["rank"]
    q_BTHD = torch.randn(B, T, H, D, dtype=dtype)
    a_k, a_v = torch.randn(2, B, M, R, H, dtype=dtype)
    b_k, b_v = torch.randn(2, B, M, R, D, dtype=dtype)
    k_BMHD, v_BMHD = torch.randn(2, B, M, H, D, dtype=dtype)
    scale = D**-0.5
    q_and_o = 2 * _bytes(q_BTHD)

    def tpa(backend: str) -> Row:
        run = _without_gradients(lambda: decode(q_BTHD, a_k, b_k, a_v, b_v, scale=scale, backend=backend))
        return Row(backend, "forward", run, q_and_o + _bytes(a_k, b_k, a_v, b_v))

    mha = _without_gradients(lambda: attention(q_BTHD, k_BMHD, v_BMHD, scale=scale, causal=False))
    with_triton = q_BTHD.is_cuda and TRITON_IS_INSTALLED and T <= MOST_QUERIES
    return [
        tpa("sdpa"),
        tpa("plain"),
        *([tpa("triton")] if with_triton else []),
        Row("MHA over a full cache", "forward", mha, q_and_o + _bytes(k_BMHD, v_BMHD)),
    ]


def contract_rows(sizes: Sizes, dtype: torch.dtype) -> list[Row]:
    B, T, H, D, R = (sizes[name] for name in ("batch", "context", "heads", "head_dim", "rank"))
    a = torch.randn(B, T, R, H, dtype=dtype, requires_grad=True)
    b = torch.randn(B, T, R, D, dtype=dtype, requires_grad=True)
    angle = torch.arange(T)[:, None] * 1e4 ** (-2 * torch.arange(D // 2) / D)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    # Backward: the result's gradient and the factors are read, the factors' gradients written.
    factors, result = _bytes(a, b), B * T * H * D * a.element_size()
    least = (factors + result, 3 * factors + 2 * result)

    def separate_passes() -> torch.Tensor:
        return torch.einsum("btrh,btrd->bthd", a, rotate(b, cos, sin)) / R

    record, parts = _record((R, 2, 2), B, T, H, D, dtype)
    numbers, results = _bytes(record), 3 * result
    least_of_record = (numbers + results, 3 * numbers + 2 * results)

    def rows(backend: str) -> list[Row]:
        def of_record() -> tuple[torch.Tensor, ...]:
            return contract_qkv(record, parts, (cos, sin), (cos, sin), backend=backend)

        return [
            *_both_modes(backend, lambda: contract(a, b, cos, sin, backend=backend), [a, b], least),
            *_both_modes(f"{backend}, Q K V of {R}, 2, 2", of_record, [record], least_of_record),
        ]

    with_triton = a.is_cuda and TRITON_IS_INSTALLED
    return [
        *_both_modes("separate passes", separate_passes, [a, b], least),
        *rows("plain"),
        *(rows("triton") if with_triton else []),
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


def attention_rows(sizes: Sizes, dtype: torch.dtype) -> list[Row]:
    B, T, H, G, D = (sizes[name] for name in ("batch", "context", "heads", "kv_heads", "head_dim"))
    q = torch.randn(B, T, H, D, dtype=dtype, requires_grad=True)
    k = torch.randn(B, T, G, D, dtype=dtype, requires_grad=True)
    v = torch.randn(B, T, G, D, dtype=dtype, requires_grad=True)

    def rows(backend: str, **options: Any) -> list[Row]:
        name = backend + (", documents" if options else "")
        run = partial(attention, q, k, v, scale=D**-0.5, backend=backend, **options)
        return _both_modes(name, run, [q, k, v])

    on_gpu = []
    if q.is_cuda and dtype != torch.float32:
        # Documents of 256 tokens on average, packed.
        documents = offsets((torch.rand(B, T) < 1 / 256).cumsum(1))
        on_gpu = [
            *(row for name in ("flash", "cudnn") for row in rows(name)),
            *(rows("efficient") if G == H else []),
            *rows("varlen", documents=documents),
            *rows("sdpa", documents=documents),
        ]
    # It holds several tensors of all weights at once.
    plain_fits = 4 * B * H * T * T <= MOST_PLAIN_WEIGHT_BYTES
    return [*rows("sdpa"), *(rows("plain") if plain_fits else []), *on_gpu]


def linear_rows(sizes: Sizes, dtype: torch.dtype) -> list[Row]:
    B, K, N = (sizes[name] for name in ("batch", "inputs", "outputs"))
    x, residual = torch.randn(B, K, dtype=dtype), torch.randn(B, N, dtype=dtype)
    weight, gate = ((torch.randn(N, K) * K**-0.5).to(dtype) for _ in range(2))
    around = {
        "": {},
        ", residual": {"residual": residual},
        ", norm and SwiGLU": {"gate_NK": gate, "norm_eps": 1e-5},
    }

    def row(backend: str, name: str, more: dict[str, Any]) -> Row:
        run = _without_gradients(lambda: linear(x, weight, backend=backend, **more))
        read = [weight, x, *(part for part in more.values() if isinstance(part, torch.Tensor))]
        return Row(backend + name, "forward", run, _bytes(*read) + _bytes(residual))

    with_triton = x.is_cuda and TRITON_IS_INSTALLED and is_hopper() and B <= MOST_ROWS and dtype in HALVES
    backends = ("plain", "triton") if with_triton else ("plain",)
    return [row(backend, name, more) for name, more in around.items() for backend in backends]


def swiglu_rows(sizes: Sizes, dtype: torch.dtype) -> list[Row]:
    B, T, hidden = (sizes[name] for name in ("batch", "context", "hidden"))
    gate_up = torch.randn(B, T, 2 * hidden, dtype=dtype, requires_grad=True)
    backends = {"plain": partial(swiglu, gate_up, backend="plain")}
    if gate_up.is_cuda and TRITON_IS_INSTALLED:
        compiled = torch.compile(plain_swiglu)
        backends |= {
            "compiled": lambda: compiled(gate_up),
            "triton": partial(swiglu, gate_up, backend="triton"),
        }
    least = _bytes(gate_up) * 3 // 2
    # The backward pass reads its upstream gradient and the input, and writes that one's gradient.
    both = (least, least + _bytes(gate_up) * 5 // 2)
    return [row for name, run in backends.items() for row in _both_modes(name, run, [gate_up], both)]


def loss_rows(sizes: Sizes, dtype: torch.dtype) -> list[Row]:
    N, C, V = sizes["batch"] * sizes["context"], sizes["d_model"], sizes["vocabulary"]
    x = torch.randn(N, C, dtype=dtype, requires_grad=True)
    weight = (torch.randn(V, C) * C**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,))

    def all_logits() -> torch.Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), targets, reduction="none")

    rows = [
        *_both_modes("all logits", all_logits, [x, weight]),
        *_both_modes("plain (chunks)", lambda: linear_cross_entropy(x, weight, targets), [x, weight]),
        *_both_modes("sum", lambda: linear_cross_entropy_sum(x, weight, targets), [x, weight]),
    ]
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is not None:
        chunked = options()
        torch_own = getattr(F, "linear_cross_entropy")  # noqa: B009 (not in every supported torch)
        rows += _both_modes(
            "torch's chunks",
            lambda: torch_own(x, weight, targets, reduction="none", options=chunked),
            [x, weight],
        )
    return rows


BUILDERS: dict[str, Callable[[Sizes, torch.dtype], list[Row]]] = {
    "decode": decode_rows,
    "contract": contract_rows,
    "attention": attention_rows,
    "linear": linear_rows,
    "swiglu": swiglu_rows,
    "loss": loss_rows,
}


def _both_modes(
    name: str,
    forward: Callable[[], torch.Tensor | tuple[torch.Tensor, ...]],
    inputs: list[torch.Tensor],
    least_bytes: tuple[int, int] | tuple[None, None] = (None, None),
) -> list[Row]:
    """`least_bytes`: of the forward pass, and of both passes."""
    # Full tensors, as a next layer would send back: the stride-0 gradient of a sum times other code paths.
    found = _without_gradients(forward)()
    gradients = [torch.randn_like(x) for x in (found if isinstance(found, tuple) else [found])]

    def forward_and_backward() -> object:
        return torch.autograd.grad(forward(), inputs, gradients)

    return [
        Row(name, "forward", _without_gradients(forward), least_bytes[0]),
        Row(name, "forward+backward", forward_and_backward, least_bytes[1]),
    ]


def _without_gradients(forward: Callable[[], Any]) -> Callable[[], Any]:
    return torch.no_grad()(forward)


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
