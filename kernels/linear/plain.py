"""A linear layer with what stands around it, one operation after the other."""

import torch
import torch.nn.functional as F


def linear(
    x: torch.Tensor,
    weight_NK: torch.Tensor,
    gate_NK: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm_eps: float | None,
) -> torch.Tensor:
    """See `kernels.linear.linear`."""
    if norm_eps is not None:
        x = F.rms_norm(x, x.shape[-1:], eps=norm_eps)
    y = F.linear(x, weight_NK)
    if gate_NK is not None:
        y = F.silu(F.linear(x, gate_NK)) * y
    return y if residual is None else residual + y
