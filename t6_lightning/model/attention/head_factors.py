"""Nonlinearities φ of TPA's head factors, a = φ(W x): mixtures of heads (appendix G).

Shape suffixes: R rank, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch


def softmax_heads(a_RH: torch.Tensor) -> torch.Tensor:
    """H · softmax over heads: each rank mixes the heads, with average weight 1."""
    return a_RH.softmax(-1) * a_RH.shape[-1]


def softmax_ranks(a_RH: torch.Tensor) -> torch.Tensor:
    """R · softmax over ranks: with TPA's 1/R, each head is a weighted mean of the feature factors."""
    return a_RH.softmax(-2) * a_RH.shape[-2]


def topk_heads(a_RH: torch.Tensor, top_k: int) -> torch.Tensor:
    """`softmax_heads` of the top_k largest heads of each rank and 0 for the others; gradients as without the cut.

    Straight-through (Bengio et al., 2013): the heads that were cut learn as if they had not been.
    """
    mixed_RH = softmax_heads(a_RH)
    # Chosen by index, so that heads that tie are never more than top_k.
    chosen_RK = a_RH.topk(top_k, dim=-1).indices
    kept_RH = torch.zeros_like(mixed_RH).scatter(-1, chosen_RK, mixed_RH.gather(-1, chosen_RK))
    return mixed_RH + (kept_RH - mixed_RH).detach()


NONLINEARITIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda a_RH: a_RH,
    "sigmoid": torch.sigmoid,
    "softmax_heads": softmax_heads,
    "softmax_ranks": softmax_ranks,
    "relu2": lambda a_RH: a_RH.relu().square(),
}
"""φ by name; "topk_heads" is the one that needs a number beside."""

NAMES = (*NONLINEARITIES, "topk_heads")


def nonlinearity(
    a_RH: torch.Tensor, name: str, temperature: float = 1.0, top_k: int | None = None
) -> torch.Tensor:
    """φ(a / temperature), on the last two axes (R, H), in a's dtype."""
    if temperature != 1:
        a_RH = a_RH / temperature
    if name == "topk_heads":
        assert top_k is not None
        result = topk_heads(a_RH, top_k)
    else:
        result = NONLINEARITIES[name](a_RH)
    return result.to(a_RH.dtype)  # under autocast softmax gives float32


@cache
def second_moment(
    name: str, std: float, rank: int, n_heads: int, temperature: float, top_k: int | None
) -> float:
    """E[φ(a)²] over entries for a ~ N(0, std²), from 200,000 or more fixed random numbers (0.5 % or better)."""
    if name == "none":
        return std**2 / temperature**2
    # On the CPU whatever the default device: a model may be under construction on "meta".
    generator = torch.Generator("cpu").manual_seed(0)
    draws = max(1, 200_000 // (rank * n_heads))
    a_RH = std * torch.randn(draws, rank, n_heads, generator=generator, dtype=torch.float64, device="cpu")
    return nonlinearity(a_RH, name, temperature, top_k).square().mean().item()
