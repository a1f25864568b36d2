"""One transformer block: x += attention(norm(x)); x += SwiGLU(norm(x)).

Shape suffixes: B batch, T tokens, C d_model, F hidden size of the FFN.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from kernels.linear import linear
from kernels.linear.stacked import stacked_linear
from kernels.swiglu import swiglu
from t6_lightning.model.attention import Layout
from t6_lightning.model.cache import LayerCache
from t6_lightning.model.config import T6Config
from t6_lightning.model.init import init_output_
from t6_lightning.model.norm import NORM_EPS, rms_norm

ALIGNMENT = 64
"""Numbers. On a GPU the hidden size (2,730 at a width of 1,024) is rounded up to this, 128 bytes."""


class SwiGLU(nn.Module):
    """(silu(x W_gate) * x W_up) W_down (Shazeer, 2020)."""

    def __init__(self, d_model: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, hidden, bias=False)
        self.up = nn.Linear(d_model, hidden, bias=False)
        self.down = nn.Linear(hidden, d_model, bias=False)
        self._frozen: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def freeze(self) -> None:
        """Weights do not change until `thaw`: on a GPU their aligned copies are made once, if they need any."""
        if self.gate.weight.is_cuda and self._missing:
            gate, up = (F.pad(layer.weight, (0, 0, 0, self._missing)) for layer in (self.gate, self.up))
            self._frozen = gate, up, F.pad(self.down.weight, (0, self._missing))

    def thaw(self) -> None:
        self._frozen = None

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        if x_BTC.is_cuda and torch.is_grad_enabled():
            return self._aligned(x_BTC)
        return self.down(F.silu(self.gate(x_BTC)) * self.up(x_BTC))

    def add_to(self, x_BTC: torch.Tensor, backend: str) -> torch.Tensor:
        """x + SwiGLU(norm(x)), in as few launches as there can be: for decoding."""
        gate, up, down = self._frozen or (self.gate.weight, self.up.weight, self.down.weight)
        hidden = linear(x_BTC, up, gate_NK=gate, norm_eps=NORM_EPS, backend=backend)
        return linear(hidden, down, residual=x_BTC, backend=backend)

    @property
    def _missing(self) -> int:
        """Hidden features to a whole ALIGNMENT: with weights of zero they add nothing."""
        return -len(self.gate.weight) % ALIGNMENT

    def _aligned(self, x_BTC: torch.Tensor) -> torch.Tensor:
        """`forward` with padded weights, and one product for gate and up."""
        weights = self.gate.weight, self.up.weight
        gate_up = stacked_linear(x_BTC, weights, [len(weight) + self._missing for weight in weights])
        return F.linear(swiglu(gate_up), F.pad(self.down.weight, (0, self._missing)))


def dropout(probability: float) -> nn.Module:
    """Dropout, or nothing at 0: a call in each layer that does nothing still costs small models time."""
    return nn.Dropout(probability) if probability else nn.Identity()


class Block(nn.Module):
    def __init__(self, config: T6Config) -> None:
        super().__init__()
        self.attention = config.attention.build(config.d_model)
        self.ffn = SwiGLU(config.d_model, config.ffn_width)
        self.dropout = dropout(config.dropout)
        for writes in (self.attention.output, self.ffn.down):
            init_output_(writes.weight, config.output_init, config.n_layers)

    def forward(
        self, x_BTC: torch.Tensor, normed_BTC: torch.Tensor, layout: Layout, cache: LayerCache | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream after this block, and its norm, which the next block reads.

        A compiled block so adds and normalizes in one pass over the stream, forward and backward, at its end too.
        """
        if layout.seen is not None and not self.training:
            o_BTN = self.attention.before_output(normed_BTC, layout, cache)
            backend = layout.step_backend
            x_BTC = linear(o_BTN, self.attention.output.weight, residual=x_BTC, backend=backend)
            x_BTC = self.ffn.add_to(x_BTC, backend)
        else:
            x_BTC = x_BTC + self.dropout(self.attention(normed_BTC, layout, cache))
            x_BTC = x_BTC + self.dropout(self.ffn(rms_norm(x_BTC)))
        return x_BTC, rms_norm(x_BTC)
