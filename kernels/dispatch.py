"""Which backend runs an operation, and in which precision: the rules shared by all of them."""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

log = logging.getLogger(__name__)

Backend = TypeVar("Backend", bound=Callable[..., Any])

_said: set[tuple[str, str]] = set()


def choose(
    op_name: str,
    backend: str,
    candidates: Mapping[str, Backend],
    cannot: Mapping[str, str] | None = None,
) -> Backend:
    """The function that runs `op_name`.

    backend     "auto" or a name in `candidates`
    candidates  name -> function, in the order in which "auto" prefers them here
    cannot      name -> why that candidate cannot run these inputs on this device

    "auto" takes the first candidate that can run. The first choice of each backend is logged as INFO, that of further
    operations as DEBUG.
    Raises ValueError for an unknown name, for a named backend that cannot run, and when none can.
    """
    cannot = cannot or {}
    if backend == "auto":
        name = next((name for name in candidates if name not in cannot), None)
        if name is None:
            reasons = "; ".join(f"{name}: {why}" for name, why in cannot.items())
            raise ValueError(f"{op_name}: no backend can run this ({reasons})")
        _say_once(op_name, name)
        return candidates[name]
    if backend not in candidates:
        allowed = ", ".join(["auto", *candidates])
        raise ValueError(f"{op_name}: unknown backend {backend!r}; allowed: {allowed}")
    if backend in cannot:
        raise ValueError(f"{op_name}: backend {backend!r} cannot run here: {cannot[backend]}")
    return candidates[backend]


# Under torch.compile this runs while tracing: the message still appears once, without a graph break.
@torch.compiler.assume_constant_result
def _say_once(op_name: str, name: str) -> bool:
    if (op_name, name) not in _said:
        is_new = name not in {backend for _, backend in _said}
        _said.add((op_name, name))
        log.log(logging.INFO if is_new else logging.DEBUG, "backend auto takes %s (%s)", name, op_name)
    return True


def autocasts(device: torch.device) -> bool:
    """Whether autocast chooses the dtypes of products there."""
    # Not torch.amp.is_autocast_available: the compiler of torch 2.11 breaks its graph there.
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Products there keep their dtype; torch makes no autocast for "meta"."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def one_dtype(*tensors: torch.Tensor) -> bool:
    """Whether torch's products take these together: tensors of one dtype, or any inside autocast."""
    return autocasts(tensors[0].device) or all(x.dtype == tensors[0].dtype for x in tensors)


def check_floats(op_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError where one of them holds no floating-point numbers."""
    for name, x in tensors.items():
        if not x.dtype.is_floating_point:
            raise ValueError(f"{op_name}: {name} must be of a floating-point dtype, is {x.dtype}")


def values_are_at_hand(x: torch.Tensor) -> bool:
    """Whether a look at what `x` holds waits for no device, breaks no graph of torch.compile and is one tensor's.

    Inside torch.func.vmap and its like a tensor stands for several.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu" or type(x) is not torch.Tensor:
        return False
    return not is_functorch_wrapped_tensor(x)


def why_no_derivative(*tensors: torch.Tensor) -> str | None:
    """One sentence where a derivative is to go through one of them: of operators that have none."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "it has no backward pass"
    return why_no_tangent(*tensors)


def why_no_tangent(*tensors: torch.Tensor) -> str | None:
    """One sentence where a derivative in forward mode goes through one of them: torch takes a missing one for zeros."""
    # Not asked for while compiling: the compiler has no forward mode, and may break its graph at the question.
    dual = not torch.compiler.is_compiling() and any(
        forward_ad.unpack_dual(x).tangent is not None for x in tensors
    )
    return "it has no forward-mode derivatives" if dual else None


def product_dtype(x: torch.Tensor, y: torch.Tensor) -> torch.dtype:
    """What a matrix product of the two is computed in: autocast's dtype inside autocast, else the wider of theirs.

    float64 stays.
    """
    wider = torch.promote_types(x.dtype, y.dtype)
    if wider != torch.float64 and autocasts(x.device):
        return torch.get_autocast_dtype(x.device.type)
    return wider
