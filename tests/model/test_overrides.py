"""The contract names the method that a derived layer must override too where what it overrides is bypassed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from overrides import bypassed_overrides
from torch import nn
from variants import random_tokens, shrunk

from t6_lightning.model.attention.base import AttentionConfig, AttentionLayer
from t6_lightning.model.attention.mha import MHAConfig, MultiHeadAttention
from t6_lightning.model.attention.tpa import TensorProductAttention, TPAConfig
from t6_lightning.model.config import T6Config

TPA_HINT = ", or change the factors in adapt_factors, which all of them call"


def derived(family: type[AttentionConfig], layer: type[AttentionLayer[Any]], *overridden: str) -> T6Config:
    """A model whose layer `Mine` overrides methods with what they do already."""

    def passing_on(name: str) -> Any:
        def method(self: Any, *args: Any) -> Any:
            return getattr(super(mine, self), name)(*args)

        return method

    mine = type("Mine", (layer,), {name: passing_on(name) for name in overridden})

    @dataclass(frozen=True)
    class MineConfig(family):
        def build(self, d_model: int) -> AttentionLayer[Any]:
            return mine(self, d_model)

    return shrunk(T6Config(attention=MineConfig()))


def sentences(family: type[AttentionConfig], layer: type[AttentionLayer[Any]], *overridden: str) -> list[str]:
    config = derived(family, layer, *overridden)
    return bypassed_overrides(config, random_tokens(config, 2, 7))


def test_expand_of_tpa_is_bypassed_by_heads_and_attend_cached() -> None:
    inherited = "TensorProductAttention"
    assert sentences(TPAConfig, TensorProductAttention, "expand") == [
        f"Mine overrides expand, which {inherited}.heads does not call in training: override heads too{TPA_HINT}",
        f"Mine overrides expand, which {inherited}.attend_cached does not call in decoding: "
        f"override attend_cached too{TPA_HINT}",
        f"Mine overrides expand, which {inherited}.attend_new does not call in training with "
        f"attention_saves: factors: override attend_new too{TPA_HINT}",
    ]


@pytest.mark.parametrize(
    ("family", "layer", "overridden", "bypassed"),
    [
        (TPAConfig, TensorProductAttention, ["heads"], {"expand in prefill", "attend_cached in decoding"}),
        (TPAConfig, TensorProductAttention, ["pair"], {"heads in training"}),
        (TPAConfig, TensorProductAttention, ["project"], {"heads in training"}),
        (TPAConfig, TensorProductAttention, ["attend"], {"attend_cached in decoding"}),
        (MHAConfig, MultiHeadAttention, ["attend"], {"attend_cached in decoding"}),
        (MHAConfig, MultiHeadAttention, ["attend_new"], {"attend in prefill", "attend_cached in decoding"}),
        (MHAConfig, MultiHeadAttention, ["forward"], {"before_output in decoding"}),
    ],
)
def test_what_is_bypassed(
    family: type[AttentionConfig], layer: type[AttentionLayer[Any]], overridden: list[str], bypassed: set[str]
) -> None:
    found = sentences(family, layer, *overridden)
    named = {re.sub(r".*, which \w+\.(\w+) does not call (in \w+):.*", r"\1 \2", one) for one in found}
    assert {one for one in named if "attention_saves" not in one} == bypassed, found


@pytest.mark.parametrize(
    ("family", "layer", "overridden"),
    [
        (TPAConfig, TensorProductAttention, ["adapt_factors"]),
        (TPAConfig, TensorProductAttention, ["project", "heads", "attend_new", "finish"]),
        (TPAConfig, TensorProductAttention, ["expand", "heads", "attend_new", "attend_cached"]),
        (MHAConfig, MultiHeadAttention, ["project"]),
        (MHAConfig, MultiHeadAttention, ["expand"]),
        (MHAConfig, MultiHeadAttention, ["attend", "attend_cached"]),
    ],
)
def test_what_takes_part_everywhere_or_is_replaced(
    family: type[AttentionConfig], layer: type[AttentionLayer[Any]], overridden: list[str]
) -> None:
    assert sentences(family, layer, *overridden) == []


def test_adapted_factors_leave_the_fast_contraction() -> None:
    """A TPA layer as it is contracts its record of factors in one step; a derived one that adapts them does not."""
    config = derived(TPAConfig, TensorProductAttention, "adapt_factors")
    adapting = config.attention.build(config.d_model)
    plain = TPAConfig().build(config.d_model)
    assert isinstance(plain, TensorProductAttention)
    assert isinstance(adapting, TensorProductAttention)
    assert plain._contracts_records
    assert not adapting._contracts_records
    assert isinstance(adapting, nn.Module)
    adapting.load_state_dict(plain.state_dict())
    x = torch.randn(1, 4, config.d_model)
    torch.testing.assert_close(adapting.contextual_factors(x), plain.contextual_factors(x), rtol=0, atol=0)
