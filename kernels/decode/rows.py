"""Feature rows that decoding makes of what is cached: b turned by RoPE, or multiplied by a further factor c.

Shapes: B rows of the cache, M cached tokens, S rank; P features of b, C of c.
"""

from typing import NamedTuple

import torch

from kernels.contract import outer
from kernels.rope import Tables, rotate


class Rows(NamedTuple):
    """How the rows that queries meet, and those that are summed, are made; without anything, they are b as cached.

    Attributes:
        c_k, c_v: (B, M, rank, C) further factors (order 3): a row is vec(b ⊗ c) as `kernels.contract.outer` says.
        cos, sin: RoPE tables (M, W/2) or (B, M, W/2) that turn the cached b of K, W <= P; None: it is turned.
        pairing: which features RoPE pairs, "halves" or "interleaved".
    """

    c_k: torch.Tensor | None = None
    c_v: torch.Tensor | None = None
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    pairing: str = "halves"

    @property
    def as_cached(self) -> bool:
        """Whether nothing is made."""
        return self.c_k is None and self.c_v is None and not self.turned

    @property
    def turned(self) -> int:
        """W, features that turn when they are read."""
        return 0 if self.cos is None else 2 * self.cos.shape[-1]

    @property
    def tables(self) -> Tables:
        assert self.cos is not None
        assert self.sin is not None
        return self.cos, self.sin

    def of_keys(self, b_BMSP: torch.Tensor) -> torch.Tensor:
        """The rows (B, M, S, D) in memory."""
        if self.turned:
            b_BMSP = rotate(b_BMSP, *self.tables, self.pairing)
        return b_BMSP if self.c_k is None else outer((b_BMSP, self.c_k))

    def of_values(self, b_BMSP: torch.Tensor) -> torch.Tensor:
        """The rows (B, M, U, E) in memory."""
        return b_BMSP if self.c_v is None else outer((b_BMSP, self.c_v))
