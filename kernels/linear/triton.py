"""A linear layer on a few rows in one launch, with what stands before and after it in a transformer block.

Shapes: B rows, K inputs, N outputs; J outputs of a program, S slices of the inputs, one for each warp.

With 16 rows the time is that of reading the weights. A program takes J outputs and all inputs, each warp a slice of
them, so that no second launch adds parts up. RMSNorm without a weight only scales rows: it comes after the product,
from sums of squares taken on the way. While the kernel before drains, the weights are brought to L2.
"""

# Triton's own language is not Python's to a type checker, and the package may be absent.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportMissingImports=false

import os

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
OVERLAP = not INTERPRETED
ROWS = 16
# With the numbers of outputs below the fastest or close to it of 51 launches, for three layers of the medium model
# (H100): projection 2.9, output 5.0, gate and up 8.5 µs, where cuBLAS takes 4.8, 9.7 with the residual, and 16.3 with
# norm and SwiGLU. The FFN's last layer was not among them.
WARPS = 4
# Inputs of a slice at a time.
CHUNK = 64
STAGES = 4


@triton.jit
def _to_l2(ptr, bytes_each, live, LANES: tl.constexpr):
    """One run of bytes for each lane."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $3; mov.u32 $0, 0; }",
        "=r,l,r,r", [ptr, live, bytes_each], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _early(w_ptr, first, N, K: tl.constexpr, J: tl.constexpr, LANES: tl.constexpr):
    """This program's J rows of weights to L2: they lie next to each other."""
    SHARE: tl.constexpr = ((J * K * 2 + LANES - 1) // LANES + 15) // 16 * 16
    lanes = tl.arange(0, LANES)
    start = first.to(tl.int64) * K * 2
    end = tl.minimum((first + J).to(tl.int64), N) * K * 2
    at = (w_ptr.to(tl.uint64, bitcast=True) + (start + lanes * SHARE).to(tl.uint64)) & 0xFFFFFFFFFFFFFFF0
    live = (start + (lanes + 1) * SHARE <= end).to(tl.int32)
    _to_l2(at, tl.full((LANES,), SHARE, tl.int32), live, LANES)


@triton.jit(do_not_specialize=["n_rows"])
def _linear(
    x_ptr, w_ptr, gate_ptr, residual_ptr, y_ptr, n_rows, x_row, residual_row, y_row, N, eps,
    K: tl.constexpr, J: tl.constexpr, S: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr, UPCAST: tl.constexpr, OVERLAP: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * J
    if OVERLAP:
        _early(w_ptr, first, N, K, J, 32 * S)
        if GATED:
            _early(gate_ptr, first, N, K, J, 32 * S)
        gdc_wait()
        gdc_launch_dependents()
    rows_B = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live_B = rows_B < n_rows
    outputs_J = first + tl.arange(0, J)
    live_J = outputs_J < N
    slices = tl.arange(0, S)
    inputs = tl.arange(0, CHUNK)
    x_SBC = x_ptr + rows_B[None, :, None] * x_row + slices[:, None, None] * CHUNK + inputs[None, None, :]
    w_at = outputs_J[None, None, :] * K + slices[:, None, None] * CHUNK + inputs[None, :, None]
    acc_SBJ = tl.zeros((S, ROWS, J), tl.float32)
    gated_SBJ = tl.zeros((S, ROWS, J), tl.float32)
    squares_SB = tl.zeros((S, ROWS), tl.float32)
    for start in tl.range(0, K, S * CHUNK, num_stages=STAGES):
        left = K - start - slices * CHUNK
        live_SC = inputs[None, :] < left[:, None]
        x = tl.load(x_SBC + start, mask=live_B[None, :, None] & live_SC[:, None, :], other=0.0)
        live_w = live_SC[:, :, None] & live_J[None, None, :]
        w = tl.load(w_ptr + w_at + start, mask=live_w, other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        acc_SBJ = tl.dot(x, w, acc_SBJ, input_precision="ieee")
        if GATED:
            g = tl.load(gate_ptr + w_at + start, mask=live_w, other=0.0)
            if UPCAST:
                g = g.to(tl.float32)
            gated_SBJ = tl.dot(x, g, gated_SBJ, input_precision="ieee")
        if NORM:
            squares_SB += tl.sum(x.to(tl.float32) * x.to(tl.float32), 2)
    y_BJ = tl.sum(acc_SBJ, 0)
    if NORM:
        scale_B = tl.rsqrt(tl.sum(squares_SB, 0) / K + eps)
        y_BJ *= scale_B[:, None]
    if GATED:
        gate_BJ = tl.sum(gated_SBJ, 0)
        if NORM:
            gate_BJ *= scale_B[:, None]
        y_BJ *= gate_BJ / (1 + tl.exp(-gate_BJ))
    live_BJ = live_B[:, None] & live_J[None, :]
    if RESIDUAL:
        at = residual_ptr + rows_B[:, None] * residual_row + outputs_J[None, :]
        y_BJ += tl.load(at, mask=live_BJ, other=0.0).to(tl.float32)
    tl.store(
        y_ptr + rows_B[:, None] * y_row + outputs_J[None, :], y_BJ.to(y_ptr.dtype.element_ty), mask=live_BJ
    )


def linear(
    x_BK: torch.Tensor,
    weight_NK: torch.Tensor,
    gate_NK: torch.Tensor | None,
    residual_BN: torch.Tensor | None,
    norm_eps: float | None,
) -> torch.Tensor:
    """See `kernels.linear.linear`; x and residual with any row stride, weights contiguous."""
    B, K = x_BK.shape
    N = len(weight_NK)
    # Rows begin at multiples of 16 bytes, for the next layer's loads.
    y_BN = torch.empty((B, -(-N // 8) * 8), dtype=x_BK.dtype, device=x_BK.device)[:, :N]
    # The more inputs, the fewer outputs: a program does not take long, and all multiprocessors have some.
    J = 32 if gate_NK is not None else 16 if K < 2048 else 8
    _linear[(triton.cdiv(N, J), triton.cdiv(B, ROWS))](
        x_BK, weight_NK, weight_NK if gate_NK is None else gate_NK, x_BK if residual_BN is None else residual_BN, y_BN,
        B, x_BK.stride(0), 0 if residual_BN is None else residual_BN.stride(0), y_BN.stride(0), N, norm_eps or 0.0,
        K=K, J=J, S=WARPS, CHUNK=CHUNK, ROWS=ROWS, NORM=norm_eps is not None, GATED=gate_NK is not None,
        RESIDUAL=residual_BN is not None, UPCAST=INTERPRETED, OVERLAP=OVERLAP, STAGES=STAGES,
        num_warps=WARPS, **({"launch_pdl": True} if OVERLAP else {}),
    )  # fmt: skip
    return y_BN
