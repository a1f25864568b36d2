"""Sampling from a T6 with its key/value cache; prefill and decoding are separate steps.

Shape suffixes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite

import torch

from t6_lightning.errors import BadInput, require
from t6_lightning.model.cache import KVCache
from t6_lightning.model.t6 import T6


def sample(
    logits_BV: torch.Tensor,
    temperature: float,
    top_k: int | None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """One token (B,) per row: the likeliest at temperature 0, else drawn from the (top-k) softmax."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV.float() / temperature
    if top_k is not None:
        kept = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values
        logits_BV = logits_BV.masked_fill(logits_BV < kept[:, -1:], -torch.inf)
    return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator).squeeze(-1)


def generate(
    model: T6,
    prompt_BT: torch.Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    cache: KVCache | None = None,
) -> Iterator[torch.Tensor]:
    """Yield one new token (B,) at a time.

    Args:
        model: in evaluation mode.
        prompt_BT: at least one token in each row.
        max_new_tokens: tokens to add.
        temperature: 0 takes the likeliest token.
        top_k: sample among the k likeliest; None among all.
        generator: source of randomness on the model's device.
        cache: an empty cache to fill; one of the exact size is made when not given.

    Raises:
        BadInput: a setting out of range.
    """
    require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "it must be at least 1")
    require(isfinite(temperature) and temperature >= 0, "temperature", temperature, "it must be 0 or above")
    require(top_k is None or top_k >= 1, "top_k", top_k, "it must be at least 1")
    batch, n_prompt = prompt_BT.shape
    require(n_prompt >= 1, "prompt", n_prompt, "it must hold at least one token")
    if cache is None:
        try:
            cache = model.new_cache(batch, n_prompt + max_new_tokens - 1)
        except RuntimeError as error:  # the allocator's
            raise BadInput(
                f"max_new_tokens={max_new_tokens} needs a larger cache than memory holds"
            ) from error
    return _generate(model, prompt_BT, max_new_tokens, temperature, top_k, generator, cache)


@torch.inference_mode()
def _generate(
    model: T6,
    tokens_BT: torch.Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    generator: torch.Generator | None,
    cache: KVCache,
) -> Iterator[torch.Tensor]:
    for _ in range(max_new_tokens):
        logits_BV = model(tokens_BT, cache=cache)[:, -1]
        token_B = sample(logits_BV, temperature, top_k, generator)
        yield token_B
        tokens_BT = token_B[:, None]
