"""Rotary position embedding (Su et al., 2021): which dimensions turn, by how much, in whose convention.

Shape suffixes: B batch, T tokens, W turned dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from t6_lightning.common.errors import require


class Tables(NamedTuple):
    """Cosine and sine of each position and pair, (T, W/2) or (B, T, W/2)."""

    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True)
class Rope:
    """How positions enter queries and keys.

    A pair (x1, x2) of a query or key at position t becomes, with θ_j = base^(-2j/W),
    (x1 cos tθ_j + x2 sin tθ_j, x2 cos tθ_j - x1 sin tθ_j).

    Attributes:
        dims: W, how many dimensions turn, the first ones (partial RoPE); None turns all, 0 none.
        pairing: "halves" pairs x[j] with x[j + W/2] (the reference, Llama); "interleaved" pairs x[2j] with
            x[2j + 1] (the paper's text, DeepSeek).
        direction: "reference" as above; "llama" turns the other way, -tθ_j, as transformers' Llama and DeepSeek.
        decay: γ in (0, 1]; the turned dimensions of a logit between positions t and s shrink with γ.
        decay_form: "relative": pair j of a query is multiplied by γ^(tθ_j) and of a key by γ^(-sθ_j), a logit's
            part by γ^((t-s)θ_j). "reference": both by γ^(tθ_j) and γ^(sθ_j), a logit's part by γ^((t+s)θ_j),
            which is not relative; the public code does so.
        tables: "exact": angles in float64, tables in float32; "reference": angles in float32, tables in
            bfloat16, as the public code keeps them.
    """

    dims: int | None = None
    pairing: Literal["halves", "interleaved"] = "halves"
    direction: Literal["reference", "llama"] = "reference"
    decay: float | None = None
    decay_form: Literal["relative", "reference"] = "relative"
    tables: Literal["exact", "reference"] = "exact"

    def __post_init__(self) -> None:
        choices = {
            "pairing": ("halves", "interleaved"),
            "direction": ("reference", "llama"),
            "decay_form": ("relative", "reference"),
            "tables": ("exact", "reference"),
        }
        for field, allowed in choices.items():
            value = getattr(self, field)
            require(value in allowed, f"rope.{field}", value, f"choose one of {', '.join(allowed)}")
        dims, decay = self.dims, self.decay
        require(
            dims is None or (isinstance(dims, int) and dims >= 0 and dims % 2 == 0),
            "rope.dims",
            dims,
            "it must be an even number of dimensions, or null for all",
        )
        require(
            decay is None or (type(decay) in (int, float) and 0.9 <= decay <= 1),
            "rope.decay",
            decay,
            "it must be from 0.9 to 1, or null for none",
        )
        require(
            decay is not None or self.decay_form == "relative",
            "rope.decay_form",
            self.decay_form,
            "it needs rope.decay",
        )

    def width(self, available: int, field: str = "attention.head_dim") -> int:
        """W: how many of `available` dimensions turn.

        Raises:
            BadInput: more than there are, or an odd number.
        """
        require(
            available % 2 == 0 or self.dims is not None, field, available, "RoPE turns pairs: make it even"
        )
        width = available if self.dims is None else self.dims
        require(width <= available, "rope.dims", width, f"at most {available} dimensions can turn here")
        return width

    def query_and_key_tables(self, positions: torch.Tensor, width: int, base: float) -> tuple[Tables, Tables]:
        """Tables (T, W/2) or (B, T, W/2), float32, for queries and for keys at integer `positions` (T,) or (B, T).

        Angles are taken in float64: in float32 a position of 131,072 is already off by 0.004 radians.
        """
        exact = self.tables == "exact"
        dtype = torch.float64 if exact else torch.float32
        pairs = torch.arange(0, width, 2, device=positions.device, dtype=dtype)
        frequencies = base ** (-pairs / width) if exact else 1.0 / base ** (pairs / width)
        angles = positions.to(dtype).unsqueeze(-1) * frequencies
        cos, sin = angles.cos(), angles.sin()
        if self.direction == "llama":
            sin = -sin
        queries = keys = Tables(*self._rounded(cos, sin))
        if self.decay is not None:
            shrink = self.decay**angles
            queries = keys = Tables(*self._rounded(cos * shrink, sin * shrink))
            if self.decay_form == "relative":
                keys = Tables(*self._rounded(cos / shrink, sin / shrink))
        return queries, keys

    def _rounded(self, *tables: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.tables == "reference":
            tables = tuple(table.bfloat16() for table in tables)
        return tuple(table.float() for table in tables)
