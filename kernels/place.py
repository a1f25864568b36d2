"""Where Triton kernels can run: on which device, and with what installed."""

import os
from importlib.util import find_spec

import torch

TRITON_IS_INSTALLED = find_spec("triton") is not None


@torch.compiler.assume_constant_result
def is_hopper() -> bool:
    """Compute capability 9 or later with as much shared memory: what the kernels of decoding are cut for."""
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return found.major >= 9 and found.shared_memory_per_block_optin >= 227 * 1024


def why_no_triton_at(x: torch.Tensor, *, only_hopper: str | None = None) -> str | None:
    """One sentence, or None where a Triton kernel can run on the device of `x`.

    `only_hopper` is the reason of a kernel that is made for an H100 or later, where the GPU is an older one. On a CPU
    kernels run in Triton's interpreter, for tests, where TRITON_INTERPRET=1 is set before triton is imported.
    """
    if not TRITON_IS_INSTALLED:
        return "the package triton is not installed"
    if x.device.type != "cuda" and (x.device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1"):
        return "it needs an NVIDIA GPU"
    if only_hopper is not None and x.device.type == "cuda" and not is_hopper():
        return only_hopper
    return None


def lies_side_by_side(x: torch.Tensor) -> bool:
    """Whether the last dimension is contiguous; the stride of a dimension of one says nothing."""
    return x.shape[-1] == 1 or x.stride(-1) == 1
