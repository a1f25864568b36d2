"""Rotary position embedding on pairs of halves.

Shapes: B batch, T tokens, R ranks (or heads: any axis that shares a token's position), D head dimension.
"""

import torch


def rotate(x_BTRD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE(x) of section 3.2, on the pairs (x[..., j], x[..., j + D/2]).

    y1 = x1 cos + x2 sin, y2 = -x1 sin + x2 cos: the direction of the paper's reference code. Llama in
    transformers turns the other way; swapping the halves of q and k heads converts exactly.

    x_BTRD    (B, T, R, D), D even
    cos, sin  (T, D/2), or (B, T, D/2) when rows of the batch stand at different positions
    returns   (B, T, R, D) in x's dtype; the arithmetic runs in the wider of the dtypes of x and the tables

    Raises ValueError when the tables do not fit x (they would broadcast silently).
    """
    B, T, _, D = x_BTRD.shape
    tables = ((T, D // 2), (B, T, D // 2))
    if D % 2 or cos.shape not in tables or sin.shape != cos.shape:
        raise ValueError(
            f"rotate: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must both be (T, D/2) or (B, T, D/2)"
            f" with D even, for x (B, T, R, D) = {tuple(x_BTRD.shape)}"
        )
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    x1, x2 = x_BTRD.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1).to(x_BTRD.dtype)
