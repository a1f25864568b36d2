"""RoPE tables as a kernel reads them: both by one set of strides."""

import torch


def alike(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same numbers, of equal strides, the last of them 1; copied only where they are not so already."""
    if cos.stride(-1) == 1 and cos.stride() == sin.stride():
        return cos, sin
    return cos.contiguous(), sin.contiguous()
