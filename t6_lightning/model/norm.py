"""RMSNorm (Zhang and Sennrich, 2019), without and with a learned weight."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from kernels.dispatch import product_dtype

# Said outright: the default follows the input's dtype, and in bf16 that is 7.8e-3 instead of 1.2e-7.
NORM_EPS = torch.finfo(torch.float32).eps
OUTPUT_NORM_EPS = 1e-5  # the reference's, for the heads' outputs


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    """x / RMS(x) over the last axis, as in the reference's blocks; in autocast's dtype inside autocast.

    Only matrix products read it, which would turn it into that dtype each for itself.
    """
    return F.rms_norm(x, x.shape[-1:], eps=NORM_EPS).to(product_dtype(x, x))


class RMSNorm(nn.RMSNorm):
    """x / RMS(x) · weight over the last axis.

    The weight takes x's dtype: under autocast the two differ, and PyTorch leaves its fused kernel.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
