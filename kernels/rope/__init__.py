"""Rotary position embedding."""

import torch

from kernels.rope.plain import check_pairing, check_tables, rotate

Tables = tuple[torch.Tensor, torch.Tensor]
"""cos and sin, (T, W/2) or (B, T, W/2), as `rotate` takes them."""

__all__ = ["Tables", "check_pairing", "check_tables", "rotate"]
