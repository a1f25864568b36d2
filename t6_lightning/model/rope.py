"""Rotary position embedding (Su et al., 2021): the angles of each position.

Shape suffixes: B batch, T tokens, D head dimension.
"""

from __future__ import annotations

import torch


def rope_tables(
    positions: torch.Tensor, head_dim: int, base: float = 10000.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of position · base^(-2j/D), for j = 0 .. D/2 - 1.

    Angles are taken in float64: in float32 a position of 131,072 is already off by 0.004 radians.

    Args:
        positions: integers (T,) or (B, T).
        head_dim: D, even.
        base: the reference's and Llama's 10,000 unless changed.

    Returns:
        cos and sin, float32, (T, D/2) or (B, T, D/2).
    """
    pairs = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64)
    angles = positions.to(torch.float64).unsqueeze(-1) * base ** (-pairs / head_dim)
    return angles.cos().float(), angles.sin().float()
