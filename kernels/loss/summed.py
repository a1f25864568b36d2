"""Linear layer and summed cross-entropy: gradients are formed in the forward pass, chunk by chunk.

All that a caller can do with a sum is scale it, so its gradients are known as soon as the logits of a chunk are:
nothing is kept but the gradients themselves, and no product is computed twice.

Why not a library's: torch's F.linear_cross_entropy came after 2.11, breaks the graph under torch.compile and keeps
losses in half precision; Liger's adds up the weight's gradient in the weight's own dtype. `python -m kernels.bench
loss` times torch's beside this where torch has it.

Shapes: N tokens (flattened), C model dimension, V vocabulary.
"""

from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels.dispatch import product_dtype
from kernels.loss.plain import check_arguments, default_chunk_tokens
from kernels.loss.rows import cross_entropy_

# One chunk's logits on a GPU, in the dtype of the product: its matrix products have 4,096 rows or more.
GPU_CHUNK_LOGIT_BYTES = 512 * 2**20


def linear_cross_entropy_sum(
    x_NC: torch.Tensor,
    weight_VC: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
) -> torch.Tensor:
    """Σ -log softmax(x Wᵀ)[target] over the tokens that count: the sum of `linear_cross_entropy`, a scalar.

    Arguments, dtypes and errors as there; gradients of x and W can be taken once, not differentiated again. With
    gradients the forward pass holds one chunk of logits, dx in the product's dtype and dW in float32.
    """
    check_arguments("linear_cross_entropy_sum", x_NC, weight_VC, targets_N, chunk_tokens, ignore_index)
    dtype = product_dtype(x_NC, weight_VC)
    if chunk_tokens is None:
        N, V = x_NC.shape[0], weight_VC.shape[0]
        most = default_chunk_tokens(V)
        if x_NC.is_cuda:
            most = max(1, GPU_CHUNK_LOGIT_BYTES // (dtype.itemsize * V) // 128) * 128
        # Chunks of equal size: a short last one would run at a fraction of the speed.
        chunk_tokens = max(1, ceil(N / max(1, ceil(N / most)) / 128)) * 128
    result: torch.Tensor = _Sum.apply(x_NC, weight_VC, targets_N, ignore_index, chunk_tokens, dtype)  # pyright: ignore[reportAssignmentType]
    return result


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_NC: torch.Tensor,
        weight_VC: torch.Tensor,
        targets_N: torch.Tensor,
        ignore_index: int,
        chunk_tokens: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        weight = weight_VC.to(dtype)
        d_x_NC = torch.empty_like(x_NC, dtype=dtype) if needs_x else None
        d_weight_VC = torch.zeros_like(weight_VC, dtype=wide) if needs_weight else None
        total = torch.zeros((), dtype=wide, device=x_NC.device)
        for first in range(0, x_NC.shape[0], chunk_tokens):
            part = slice(first, first + chunk_tokens)
            x = x_NC[part].to(dtype)
            logits_NV = F.linear(x, weight)
            losses_N, d_logits_NV = cross_entropy_(
                logits_NV, targets_N[part], ignore_index, needs_x or needs_weight
            )
            total += losses_N.sum()
            if d_x_NC is not None:
                torch.mm(d_logits_NV, weight, out=d_x_NC[part])
            if d_weight_VC is not None:
                _add_product_(d_weight_VC, d_logits_NV.t(), x)
        ctx.save_for_backward(d_x_NC, d_weight_VC)
        ctx.dtypes = x_NC.dtype, weight_VC.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, upstream: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        scaled = (
            None if gradient is None else (gradient * upstream).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None, None, None)


def _add_product_(total: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
    """total += x y, where total may be wider than the factors."""
    if total.dtype == x.dtype:
        total.addmm_(x, y)
    elif total.is_cuda:
        torch.addmm(total, x, y, out_dtype=total.dtype, out=total)  # pyright: ignore[reportCallIssue]
    else:
        total += x @ y
