"""What several test files of kernels on a GPU share."""

import pytest
import torch

from kernels.place import TRITON_IS_INSTALLED

needs_triton = pytest.mark.skipif(not TRITON_IS_INSTALLED, reason="the package triton is not installed")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape, dtype=torch.float64, device="cuda") for name, shape in shapes.items()}
