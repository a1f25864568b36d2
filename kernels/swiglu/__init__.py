"""SwiGLU of gate and up side by side, as one matrix product makes them: one pass each way.

The compiler puts the gradient together from two halves, and reads what both need twice.

Shapes: F hidden size; leading dimensions of any number.
"""

import torch

from kernels.dispatch import check_floats, choose, why_no_tangent
from kernels.operators import differentiate_once
from kernels.place import why_no_triton_at
from kernels.swiglu import plain

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def swiglu(gate_up: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """silu(gate) ⊙ up (Shazeer, 2020).

    gate_up  (..., 2 F): gate, then up
    backend  "auto", "triton" or "plain"
    returns  (..., F); by "triton" its gradient can be taken once, not differentiated again (RuntimeError), and not in
             forward mode

    Raises ValueError for a last dimension that is not even, and for a backend that is unknown or cannot run.
    """
    check_floats("swiglu", {"gate_up": gate_up})
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu: gate_up is {tuple(gate_up.shape)}; its last dimension must be even")
    why_not = why_no_triton_at(gate_up) or why_no_tangent(gate_up)
    if why_not is None and gate_up.dtype not in TRITON_DTYPES:
        why_not = "it computes in float16, bfloat16 or float32"
    candidates = {"triton": torch.ops.t6_lightning.swiglu, "plain": plain.swiglu}
    if gate_up.device.type == "cpu":  # Triton's interpreter is for tests: by name only
        candidates = {"plain": plain.swiglu, "triton": torch.ops.t6_lightning.swiglu}
    return choose("swiglu", backend, candidates, {"triton": why_not} if why_not else None)(gate_up)


# The operators, as in kernels/contract/__init__.py.


def _run_forward(gate_up):
    from kernels.swiglu import triton

    return triton.forward(gate_up)


def _run_backward(d_y, gate_up):
    from kernels.swiglu import triton

    return triton.backward(d_y, gate_up)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, d_y):
    return torch.ops.t6_lightning.swiglu_backward(d_y, *ctx.saved_tensors)


_library = torch.library.Library("t6_lightning", "FRAGMENT")
_library.define("swiglu(Tensor gate_up) -> Tensor")
_library.define("swiglu_backward(Tensor d_y, Tensor gate_up) -> Tensor")
for _device in ("CUDA", "CPU"):
    _library.impl("swiglu", _run_forward, _device)
    _library.impl("swiglu_backward", _run_backward, _device)
torch.library.register_fake(
    "t6_lightning::swiglu", lambda x: x.new_empty(*x.shape[:-1], x.shape[-1] // 2), lib=_library
)
torch.library.register_fake(
    "t6_lightning::swiglu_backward", lambda d_y, x: x.new_empty(x.shape), lib=_library
)
differentiate_once(_library, "swiglu", _save, _differentiate)
