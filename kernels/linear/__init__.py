"""A linear layer with what stands before and after it in a transformer block; on a few rows one launch does all.

Shapes: K inputs, N outputs; leading dimensions of any number.
"""

import torch

from kernels.dispatch import check_floats, choose, one_dtype, why_no_derivative
from kernels.linear import plain
from kernels.place import lies_side_by_side, why_no_triton_at

# More rows are a matrix product for cuBLAS.
MOST_ROWS = 32
TRITON_DTYPES = (torch.float16, torch.bfloat16)


def linear(
    x: torch.Tensor,
    weight_NK: torch.Tensor,
    *,
    gate_NK: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm_eps: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """residual + silu(n(x) Gᵀ) ⊙ (n(x) Wᵀ), where gate and residual may be missing and n may be nothing.

    x          (..., K)
    weight_NK  (N, K), W
    gate_NK    (N, K), G of SwiGLU
    residual   (..., N), added at the end
    norm_eps   n is RMSNorm over K without a weight, with this eps; None for none
    backend    "auto", "triton" or "plain"
    returns    (..., N) in x's dtype; in autocast's inside autocast, and as wide as the residual

    "triton" takes up to 32 rows in half precision on an H100 or later, for decoding; it has no backward pass.
    Raises ValueError for shapes and dtypes that do not fit, a negative eps, and for a backend that is unknown or cannot
    run.
    """
    _check_shapes(x, weight_NK, gate_NK, residual)
    _check_floats(x, weight_NK, gate_NK, residual)
    if norm_eps is not None and not norm_eps >= 0:
        raise ValueError(f"linear: norm_eps must be 0 or above, got {norm_eps}")
    why_not = _why_not_triton(x, weight_NK, gate_NK, residual)
    candidates = {"triton": _triton, "plain": plain.linear}
    cannot = {"triton": why_not} if why_not else {}
    if not one_dtype(x, weight_NK, *(() if gate_NK is None else (gate_NK,))):
        cannot["plain"] = "x, weight and gate must be of one dtype"
    run = choose("linear", backend, candidates, cannot)
    return run(x, weight_NK, gate_NK, residual, norm_eps)


def _triton(x, weight_NK, gate_NK, residual, norm_eps) -> torch.Tensor:
    # Imported here: the package is absent on most machines without a GPU.
    from kernels.linear import triton

    shape = (*x.shape[:-1], len(weight_NK))
    if not x.numel():
        return x.new_empty(shape)
    rows = x.reshape(-1, x.shape[-1])
    added = None if residual is None else residual.reshape(-1, residual.shape[-1])
    return triton.linear(rows, weight_NK, gate_NK, added, norm_eps).reshape(shape)


def _check_shapes(
    x: torch.Tensor, weight_NK: torch.Tensor, gate_NK: torch.Tensor | None, residual: torch.Tensor | None
) -> None:
    fits = weight_NK.dim() == 2 and weight_NK.numel() > 0 and x.shape[-1:] == weight_NK.shape[1:]
    fits = fits and (gate_NK is None or gate_NK.shape == weight_NK.shape)
    fits = fits and (residual is None or residual.shape == (*x.shape[:-1], len(weight_NK)))
    if not fits:
        shapes = {"x": x, "weight": weight_NK, "gate": gate_NK, "residual": residual}
        said = ", ".join(f"{name} {tuple(part.shape)}" for name, part in shapes.items() if part is not None)
        raise ValueError(f"linear: {said}; allowed: x (..., K), weight and gate (N, K), residual (..., N)")


def _check_floats(
    x: torch.Tensor, weight_NK: torch.Tensor, gate_NK: torch.Tensor | None, residual: torch.Tensor | None
) -> None:
    given = {"x": x, "weight": weight_NK, "gate": gate_NK, "residual": residual}
    check_floats("linear", {name: part for name, part in given.items() if part is not None})


def _why_not_triton(
    x: torch.Tensor, weight_NK: torch.Tensor, gate_NK: torch.Tensor | None, residual: torch.Tensor | None
) -> str | None:
    """One sentence, or None where the Triton kernel runs."""
    given = [part for part in (x, weight_NK, gate_NK, residual) if part is not None]
    if torch.compiler.is_compiling():
        return "the compiler makes its own"
    why = why_no_triton_at(x, only_hopper="it is made for the launches of an H100 or later")
    if why:
        return why
    if x.shape[:-1].numel() > MOST_ROWS:
        return f"it takes at most {MOST_ROWS} rows"
    if x.dtype not in TRITON_DTYPES or any(part.dtype != x.dtype for part in given):
        return "everything must be float16, or everything bfloat16"
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        return "autocast chooses dtypes"
    if any(not part.is_contiguous() for part in (weight_NK, gate_NK) if part is not None):
        return "weights must be contiguous"
    if not all(lies_side_by_side(part) for part in (x, residual) if part is not None):
        return "the features of x and of the residual must lie side by side"
    return why_no_derivative(*given)
