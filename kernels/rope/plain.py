"""Rotary position embedding on pairs of halves or of neighbours.

Shapes: B batch, T tokens, R ranks (or heads: any axis that shares a token's position), D head dimension.
"""

from collections.abc import Sequence

import torch

from kernels.dispatch import check_floats


def check_tables(
    op_name: str, cos: torch.Tensor, sin: torch.Tensor, shape_BTRD: Sequence[int], pairing: str
) -> None:
    """Raises ValueError where tables do not fit what they are to turn, or the pairing is unknown."""
    if len(shape_BTRD) != 4:
        raise ValueError(f"{op_name}: what turns must be (B, T, R, D), is {tuple(shape_BTRD)}")
    check_floats(op_name, {"cos": cos, "sin": sin})
    B, T, _, D = shape_BTRD
    fits = cos.dim() > 1 and cos.shape[:-1] in ((T,), (B, T)) and sin.shape == cos.shape
    if not fits or D % 2 or 2 * cos.shape[-1] > D:
        raise ValueError(
            f"{op_name}: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must both be (T, W/2) or (B, T, W/2)"
            f" with W <= D and D even, for (B, T, R, D) = {tuple(shape_BTRD)}"
        )
    check_pairing(op_name, pairing)


def check_pairing(op_name: str, pairing: str) -> None:
    """Raises ValueError where it is unknown."""
    if pairing not in ("halves", "interleaved"):
        raise ValueError(f"{op_name}: unknown pairing {pairing!r}; allowed: halves, interleaved")


def rotate(
    x_BTRD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pairing: str = "halves"
) -> torch.Tensor:
    """RoPE(x) of section 3.2: y1 = x1 cos + x2 sin, y2 = -x1 sin + x2 cos on every pair (x1, x2).

    This is the direction of the paper's reference code; Llama in transformers turns the other way, which
    negated sines give.

    x_BTRD    (B, T, R, D), D even
    cos, sin  (T, W/2), or (B, T, W/2) when rows of the batch stand at different positions; W <= D: the first
              W dimensions turn, the others stay (partial RoPE)
    pairing   "halves": pairs (x[j], x[j + W/2]), as the reference and Llama; "interleaved": pairs
              (x[2j], x[2j+1]), as the paper's text and DeepSeek
    returns   (B, T, R, D) in x's dtype; the arithmetic runs in the wider of the dtypes of x and the tables

    Raises ValueError when x is not of these dimensions, something is of integers, the tables do not fit x (they would
    broadcast silently) or the pairing is unknown.
    """
    check_floats("rotate", {"x": x_BTRD})
    check_tables("rotate", cos, sin, x_BTRD.shape, pairing)
    D, width = x_BTRD.shape[-1], 2 * cos.shape[-1]
    if width == 0:
        return x_BTRD
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    x, stays = (x_BTRD, None) if width == D else (x_BTRD[..., :width], x_BTRD[..., width:])
    x1, x2 = x.chunk(2, dim=-1) if pairing == "halves" else (x[..., 0::2], x[..., 1::2])
    y1, y2 = x1 * cos + x2 * sin, x2 * cos - x1 * sin
    turned = (y1, y2) if pairing == "halves" else (torch.stack((y1, y2), dim=-1).flatten(-2),)
    return torch.cat(turned if stays is None else (*turned, stays), dim=-1).to(x_BTRD.dtype)
