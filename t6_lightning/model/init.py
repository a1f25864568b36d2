"""Initialization of weights. Every scheme works in place on one weight matrix (outputs, inputs)."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Literal

import torch

Side = Literal["a", "b"]
"""Which factor a matrix makes: "a" over heads, "b" over the head dimension."""


@torch.no_grad()
def zero_(weight: torch.Tensor) -> None:
    """Zeros: the reference starts W_O and the last FFN matrix so, making each block the identity at first."""
    weight.zero_()


@torch.no_grad()
def xavier_paper_(weight: torch.Tensor, side: Side, rank: int) -> None:
    """Xavier uniform as appendix G states it, on the merged matrix (R·n, d_model): bound √(6/(R·n + d_model))."""
    n_out, n_in = weight.shape
    weight.uniform_(-1, 1).mul_(sqrt(6 / (n_in + n_out)))


@torch.no_grad()
def xavier_reference_(weight: torch.Tensor, side: Side, rank: int) -> None:
    """Xavier uniform as the public code computes it, on a three-dimensional view of the merged matrix.

    PyTorch takes the first two axes of the view for the fans and multiplies both by the third. The view is
    (d_model, h, R) for A, which gives the bound √(6/(R·(h + d_model))), and (d_model, R, d_h) for B, which
    gives √(6/((d_model + R)·d_h)).
    """
    d_model, size = weight.shape[1], weight.shape[0] // rank
    fans = rank * (size + d_model) if side == "a" else (d_model + rank) * size
    weight.uniform_(-1, 1).mul_(sqrt(6 / fans))


FACTOR_INITS: dict[str, Callable[[torch.Tensor, Side, int], None]] = {
    "xavier_reference": xavier_reference_,
    "xavier_paper": xavier_paper_,
}
