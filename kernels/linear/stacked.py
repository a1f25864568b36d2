"""A linear layer of several weights, trained: one product makes all outputs, and float32 gradients of the weights.

Under autocast torch makes gradients of weights in half precision and widens them in a further pass.

Shapes: K inputs, N outputs; leading dimensions of any number.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels.dispatch import product_dtype


def stack(weights: Sequence[torch.Tensor], rows: Sequence[int]) -> torch.Tensor:
    """The weights (N_i, K) below each other, each with zeros below it to rows[i]: (Σ rows, K)."""
    padded = [
        weight if n == len(weight) else F.pad(weight, (0, 0, 0, n - len(weight)))
        for weight, n in zip(weights, rows, strict=True)
    ]
    return torch.cat(padded) if len(padded) > 1 else padded[0]


def stacked_linear(
    x: torch.Tensor, weights: Sequence[torch.Tensor], rows: Sequence[int] | None = None
) -> torch.Tensor:
    """x `stack(weights, rows)`ᵀ, in autocast's dtype inside autocast.

    x        (..., K)
    weights  (N_i, K) each
    rows     of each in the result, N_i or more; N_i where it is not given
    returns  (..., Σ rows)

    Raises ValueError for weights or rows that do not go together.

    With gradients, in half precision of float32 weights on a GPU: their gradients are views of one float32 tensor,
    which the product itself writes. Gradients can then be taken once, not differentiated again.
    """
    lengths = [len(weight) for weight in weights]
    rows = lengths if rows is None else list(rows)
    if not weights or len(rows) != len(weights) or any(n < m for n, m in zip(rows, lengths, strict=True)):
        raise ValueError(
            f"stacked_linear: weights of {lengths} rows in {rows}; allowed: as many for each, or more"
        )
    if any(weight.dim() != 2 or weight.shape[1:] != x.shape[-1:] for weight in weights):
        shapes = ", ".join(str(tuple(weight.shape)) for weight in weights)
        raise ValueError(
            f"stacked_linear: x {tuple(x.shape)}, weights {shapes}; allowed: x (..., K), weights (N, K)"
        )
    dtype = product_dtype(x, weights[0])
    halves = dtype.itemsize == 2 and all(weight.dtype == torch.float32 for weight in weights)
    if not (halves and torch.is_grad_enabled() and widens(x)):
        return F.linear(x, stack(weights, rows))
    y: torch.Tensor = _StackedLinear.apply(x.to(dtype), rows, *weights)  # pyright: ignore[reportAssignmentType]
    return y


class _StackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: list[int], *weights: torch.Tensor) -> torch.Tensor:
        half_NK = stack(weights, rows).to(x.dtype)
        ctx.save_for_backward(x, half_NK)
        ctx.rows, ctx.lengths = rows, [len(weight) for weight in weights]
        return F.linear(x, half_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, half_NK = ctx.saved_tensors
        d_x = d_y @ half_NK if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[2:]):
            return d_x, None, *(None for _ in ctx.rows)
        N, K = half_NK.shape
        parts = wide_product(d_y.reshape(-1, N).t(), x.reshape(-1, K)).split(ctx.rows)
        return d_x, None, *(part[:n] for part, n in zip(parts, ctx.lengths, strict=True))


def widens(x: torch.Tensor) -> bool:
    """Whether a product on the device of `x` can give more precise numbers than it takes."""
    return x.is_cuda


def wide_product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x y in float32, of matrices in half precision."""
    if not widens(x):
        return (x @ y).float()
    return torch.mm(x, y, out_dtype=torch.float32)  # pyright: ignore[reportCallIssue]
