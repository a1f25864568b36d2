"""Fair comparisons: change a variant until it costs what another one costs."""

from __future__ import annotations

import dataclasses

from t6_lightning.errors import BadInput
from t6_lightning.model.config import T6Config


def with_heads(config: T6Config, n_heads: int) -> T6Config:
    """The same model with another number of attention heads."""
    attention = dataclasses.replace(config.attention, n_heads=n_heads)  # pyright: ignore[reportArgumentType]
    return dataclasses.replace(config, attention=attention)


def match_parameters(config: T6Config, to: int | T6Config) -> T6Config:
    """`config` with the head count that brings its parameters nearest to those of `to`.

    Parameters grow with the head count, so the nearest is found by bisection.

    Args:
        config: the variant to change.
        to: a number of parameters, or a model that has it.

    Raises:
        BadInput: even one head is more than 1 % too many.
    """
    target = to if isinstance(to, int) else to.n_parameters()
    low, high = 1, 2
    while with_heads(config, high).n_parameters() < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if with_heads(config, middle).n_parameters() < target else (low, middle)
    chosen = min((with_heads(config, n) for n in (low, high)), key=lambda c: abs(c.n_parameters() - target))
    if chosen.n_parameters() > 1.01 * target:
        raise BadInput(
            f"parameters={target:,} cannot be met: with one head this model has {chosen.n_parameters():,} already"
        )
    return chosen
