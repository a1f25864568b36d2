"""Factor contraction: queries, keys or values from their factors.

Shapes: B batch, T tokens, R rank, H heads, D head dimension.
"""

from collections.abc import Sequence

import torch

from kernels.contract import plain
from kernels.contract.plain import outer
from kernels.dispatch import check_floats, choose, product_dtype, why_no_derivative, why_no_tangent
from kernels.operators import differentiate_once
from kernels.place import why_no_triton_at
from kernels.rope import check_pairing, check_tables

# The Triton kernel: wider heads or higher ranks leave no room for a block of them on the chip.
WIDEST_HEAD = 256
HIGHEST_RANK = 64
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def contract(
    a_BTRH: torch.Tensor,
    b_BTRD: torch.Tensor,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    *,
    pairing: str = "halves",
    backend: str = "auto",
) -> torch.Tensor:
    """Q_t = (1/R) Σ_r a_r ⊗ RoPE(b_r), eq. 3.1 and 3.2; without cos and sin nothing is rotated (V).

    a_BTRH    (B, T, R, H) head factors
    b_BTRD    (B, T, R, D) feature factors
    cos, sin  (T, W/2) or (B, T, W/2), both or neither; W <= D dimensions turn, as `kernels.rope.rotate` says
    pairing   which dimensions RoPE pairs: "halves" or "interleaved"
    backend   "auto", "triton" or "plain"
    returns   (B, T, H, D), in autocast's dtype inside autocast

    Factors may be any views. "triton" reads the factors and writes the result once, in both directions; it saves
    the factors alone for the backward pass, and is one operator to torch.compile; its gradients can be taken once, not
    differentiated again (RuntimeError), and not in forward mode.

    Raises ValueError for factors of different B, T or R or without a rank, for one table without the other, for tables
    that do not fit, and for a pairing or backend that is unknown or cannot run.
    """
    if a_BTRH.dim() != 4 or b_BTRD.dim() != 4 or a_BTRH.shape[2] < 1:
        raise ValueError(
            "contract: factors must be (B, T, R, H) and (B, T, R, D) of at least one rank: a is"
            f" {tuple(a_BTRH.shape)}, b {tuple(b_BTRD.shape)}"
        )
    check_floats("contract", {"a": a_BTRH, "b": b_BTRD})
    if a_BTRH.shape[:3] != b_BTRD.shape[:3]:
        raise ValueError(
            f"contract: factors must agree in B, T and R: a is {tuple(a_BTRH.shape)}, b {tuple(b_BTRD.shape)}"
        )
    if (cos is None) != (sin is None):
        raise ValueError("contract: give both cos and sin, or neither")
    check_pairing("contract", pairing)
    why_not = why_not_triton(a_BTRH, b_BTRD, cos, sin)
    run = choose(
        "contract", backend, _fastest_first(a_BTRH.device.type), {"triton": why_not} if why_not else None
    )
    return run(a_BTRH, b_BTRD, cos, sin, pairing)


def _triton(
    a_BTRH: torch.Tensor,
    b_BTRD: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    pairing: str,
) -> torch.Tensor:
    cos, sin = tables_that_turn(cos, sin, b_BTRD.shape, pairing)
    dtype = product_dtype(a_BTRH, b_BTRD)
    return torch.ops.t6_lightning.contract(a_BTRH.to(dtype), b_BTRD.to(dtype), cos, sin, pairing)


def tables_that_turn(
    cos: torch.Tensor | None, sin: torch.Tensor | None, b_shape: Sequence[int], pairing: str
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The tables, None where they turn nothing; ValueError where they do not fit b (B, T, R, D)."""
    if cos is None or sin is None:
        return None, None
    check_tables("contract", cos, sin, b_shape, pairing)
    return (cos, sin) if cos.shape[-1] else (None, None)


def why_not_triton(a: torch.Tensor, b: torch.Tensor, *tables: torch.Tensor | None) -> str | None:
    """One sentence, or None where the Triton kernel runs."""
    why = why_no_triton_at(a) or why_no_tangent(a, b)
    if why:
        return why
    if why_no_derivative(*(table for table in tables if table is not None)):
        return "it has no derivatives of cos and sin"
    if product_dtype(a, b) not in TRITON_DTYPES:
        return "it computes in float16, bfloat16 or float32"
    if b.shape[-1] % 2:
        return "it takes heads of an even number of features"
    if b.shape[-1] > WIDEST_HEAD:
        return f"it takes heads of at most {WIDEST_HEAD} features"
    if b.shape[2] > HIGHEST_RANK:
        return f"it takes ranks of at most {HIGHEST_RANK}"
    return None


def _fastest_first(device: str) -> dict:
    if device == "cpu":
        # Triton's interpreter is for tests: by name only.
        return {"plain": plain.contract, "triton": _triton}
    return {"triton": _triton, "plain": plain.contract}


# The operators, so that torch.compile keeps a block in one graph. The package that they call is absent on most
# machines without a GPU, so it is imported when they run.


def _run_forward(a, b, cos, sin, pairing):
    from kernels.contract import triton

    return triton.forward(a, b, cos, sin, pairing)


def _run_backward(d_out, a, b, cos, sin, pairing):
    from kernels.contract import triton

    return triton.backward(d_out, a, b, cos, sin, pairing)


def _save(ctx, inputs, output):
    *tensors, ctx.pairing = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, d_out):
    d_a, d_b = torch.ops.t6_lightning.contract_backward(d_out, *ctx.saved_tensors, ctx.pairing)
    return d_a, d_b, None, None, None


_library = torch.library.Library("t6_lightning", "FRAGMENT")
_library.define("contract(Tensor a, Tensor b, Tensor? cos, Tensor? sin, str pairing) -> Tensor")
_library.define(
    "contract_backward(Tensor d_out, Tensor a, Tensor b, Tensor? cos, Tensor? sin, str pairing)"
    " -> (Tensor, Tensor)"
)
for _device in ("CUDA", "CPU"):
    _library.impl("contract", _run_forward, _device)
    _library.impl("contract_backward", _run_backward, _device)
torch.library.register_fake(
    "t6_lightning::contract",
    lambda a, b, *_: a.new_empty(*a.shape[:2], a.shape[-1], b.shape[-1]),
    lib=_library,
)
torch.library.register_fake(
    "t6_lightning::contract_backward",
    lambda d_out, a, b, *_: (a.new_empty(a.shape), b.new_empty(b.shape)),
    lib=_library,
)
differentiate_once(_library, "contract", _save, _differentiate)


__all__ = ["contract", "outer"]
