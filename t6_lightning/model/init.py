"""Initialization of weights.

A scheme says which spread a factor's matrix has: appendix G of the paper leaves room, and the public code does
something else again. Shape suffixes: R rank, N size of a factor (heads or feature dimensions), C d_model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Literal

import torch
from torch import nn

Distribution = Literal["uniform", "normal", "orthogonal"]


@dataclass(frozen=True)
class FactorShape:
    """What a scheme may look at.

    Attributes:
        letter: "a" for the head factor, "b", "c", ... for feature factors.
        rank, size: the matrix that makes the factor is (rank · size, d_model).
        d_model: inputs.
        std: the user's σ, for "normal".
        target: the variance that the factor's entries need so that the product has variance 1/3, for
            "variance_preserving".
    """

    letter: str
    rank: int
    size: int
    d_model: int
    std: float = 0.02
    target: float = 1.0


def xavier_paper(f: FactorShape) -> tuple[Distribution, float]:
    """Xavier uniform on the merged matrix (R·n, d_model), as appendix G allows: bound √(6/(R·n + d_model))."""
    return "uniform", 2 / (f.rank * f.size + f.d_model)


def xavier_paper_per_rank(f: FactorShape) -> tuple[Distribution, float]:
    """Xavier uniform on each rank's own matrix (n, d_model): bound √(6/(n + d_model))."""
    return "uniform", 2 / (f.size + f.d_model)


def xavier_reference(f: FactorShape) -> tuple[Distribution, float]:
    """Xavier uniform as the public code computes it, on a three-dimensional view of the merged matrix.

    PyTorch takes the first two axes of the view for the fans and multiplies both by the third. The view is
    (d_model, h, R) for A, which gives the bound √(6/(R·(h + d_model))), and (d_model, R, n) for feature factors,
    which gives √(6/((d_model + R)·n)).
    """
    fans = f.rank * (f.size + f.d_model) if f.letter == "a" else (f.d_model + f.rank) * f.size
    return "uniform", 2 / fans


def normal(f: FactorShape) -> tuple[Distribution, float]:
    """N(0, σ²)."""
    return "normal", f.std**2


def orthogonal(f: FactorShape) -> tuple[Distribution, float]:
    """Orthonormal rows, or columns where there are more rows (Saxe et al., 2014): variance 1/max(R·n, d_model)."""
    return "orthogonal", 1 / max(f.rank * f.size, f.d_model)


def variance_preserving(f: FactorShape) -> tuple[Distribution, float]:
    """Q, K and V have the variance that MHA's have at the same d_model, 1/3.

    For x of unit RMS a factor's entries have variance s² = d_model · Var[w]. MHA's q = W x, with nn.Linear's
    W ~ U(±1/√d_model) of variance 1/(3 d_model), has variance 1/3. TPA's q = (1/R) Σ_r φ(a_r) b_r c_r ... has
    R independent terms of mean zero: Var[q] = (1/R) E[φ(a)²] s_b² s_c² .... With s_a = 1 the n - 1 feature factors
    of order n share the rest evenly: s_b² = s_c² = ... = (R / (3 E[φ(a)²]))^(1/(n-1)). Without a nonlinearity
    and at order 2, Var[W_A] = 1/d_model and Var[W_B] = R/(3 d_model).
    """
    return "normal", f.target / f.d_model


SCHEMES: dict[str, Callable[[FactorShape], tuple[Distribution, float]]] = {
    scheme.__name__: scheme
    for scheme in (
        xavier_reference,
        xavier_paper,
        xavier_paper_per_rank,
        normal,
        orthogonal,
        variance_preserving,
    )
}


def entry_variance(scheme: str, shape: FactorShape) -> float:
    """Variance of a factor's entries for x of unit RMS."""
    return shape.d_model * SCHEMES[scheme](shape)[1]


@torch.no_grad()
def init_factor_(weight: torch.Tensor, scheme: str, shape: FactorShape, gain: float = 1.0) -> None:
    """Fill a factor's matrix (R·n, d_model), or, for a factor that is a parameter, its (R, n) values.

    A parameter gets the spread that the matrix would give the factor for x of unit RMS.
    """
    distribution, variance = SCHEMES[scheme](shape)
    if weight.shape[0] == shape.rank * shape.size and weight.shape[-1] == shape.d_model:
        if distribution == "orthogonal":
            nn.init.orthogonal_(weight, gain)
            return
    else:
        variance *= shape.d_model
    if distribution == "uniform":
        bound = gain * sqrt(3 * variance)
        nn.init.uniform_(weight, -bound, bound)
    else:
        nn.init.normal_(weight, std=gain * sqrt(variance))


@torch.no_grad()
def init_output_(weight: torch.Tensor, how: str, n_layers: int) -> None:
    """The matrices that write into the residual stream, W_O and the last one of the FFN.

    "zero": as the reference, each block starts as the identity. "scaled": nn.Linear's default over √(2 · n_layers)
    (Radford et al., 2019), so that the 2 · n_layers sums leave the stream's variance of order one.
    """
    if how == "zero":
        weight.zero_()
    else:
        bound = weight.shape[1] ** -0.5 / sqrt(2 * n_layers)
        nn.init.uniform_(weight, -bound, bound)
