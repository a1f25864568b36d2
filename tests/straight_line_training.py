"""The released trainer written straight down: how weights start and how they are trained, from its facts alone.

It imports nothing of the project but the straight-line models. What it does that others do not: W_Q of TPA-KVonly
starts Xavier uniform, factors start with the fans of three-dimensional views, the losses of micro-batches are added and
never divided, and step t of the warm-up takes t/n of the peak, so that the first changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, pi, sqrt

import torch
from straight_line import Sizes, Tensors, logits, shapes
from torch.nn import functional as F

TIED, EMBEDDING = "lm_head.weight", "transformer.wte.weight"


def initial_bound(name: str, shape: tuple[int, ...], s: Sizes) -> float:
    """b with which a matrix is drawn from U(-b, b); 0 for those that start at zero."""
    C, H, D = s.d_model, s.n_heads, s.head_dim
    if "c_proj" in name:
        return 0.0
    rank = s.rank_q if name.endswith("_q.weight") else s.rank
    if "W_A" in name:  # the view is (C, H, R): PyTorch takes H·R and C·R for the fans
        return sqrt(6 / (H * rank + C * rank))
    if "W_B" in name:  # the view is (C, R, D)
        return sqrt(6 / (rank * D + C * D))
    if "c_qkv.c_q" in name:
        return sqrt(6 / (C + H * D))
    return 1 / sqrt(shape[1])  # nn.Linear's default, of the tied embedding too


def initial_state(s: Sizes, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensors:
    """Weights as they start, in the public code's layout."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes(s).items():
        if len(shape) == 1:
            state[name] = torch.ones(shape, dtype=dtype)
            continue
        uniform = 2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1
        state[name] = (initial_bound(name, shape, s) * uniform).to(dtype)
    state[TIED] = state[EMBEDDING]
    return state


@dataclass(frozen=True)
class Settings:
    """What the released configurations say; `steps` is also where the cosine ends."""

    peak: float
    last: float
    warmup: int
    steps: int
    clip: float = 1.0


def rate(step: int, t: Settings) -> float:
    if step < t.warmup:
        return t.peak * step / t.warmup
    progress = (step - t.warmup) / (t.steps - t.warmup)
    return t.last + (t.peak - t.last) * (1 + cos(pi * progress)) / 2


def train(
    state: Tensors, s: Sizes, batches: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]]], t: Settings
) -> tuple[list[float], list[float]]:
    """Train on `batches`, for each step the (tokens, targets) of its micro-batches.

    Returns:
        The mean loss of each step, and the norm of its gradient before clipping.
    """
    weights = {name: value.clone().requires_grad_() for name, value in state.items() if name != TIED}
    parameters = list(weights.values())
    optimizer = torch.optim.AdamW(parameters, lr=t.peak, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    losses, norms = [], []
    for step, micro_batches in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, t)
        added = 0.0
        for tokens, targets in micro_batches:
            of_tokens = logits(tokens, weights | {TIED: weights[EMBEDDING]}, s)
            loss = F.cross_entropy(of_tokens.flatten(0, 1), targets.flatten())
            loss.backward()
            added += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, t.clip).item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(added / len(micro_batches))
    return losses, norms
