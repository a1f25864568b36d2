"""The budget solver: what it changes, how near it comes, and when it says that it cannot."""

from __future__ import annotations

import dataclasses
import time

import pytest

from t6_lightning.common.errors import BadInput
from t6_lightning.model.attention.tpa import TPAConfig
from t6_lightning.model.budget import ALLOWED, COSTS, match
from t6_lightning.model.config import T6Config
from t6_lightning.presets import load_net

HEADS, HEAD_DIM = "model.net.attention.n_heads", "model.net.attention.head_dim"


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_matched_head_counts_are_the_nearest(rank: int) -> None:
    to = load_net("paper/small-tpa")
    attention = TPAConfig(n_heads=1, head_dim=64, rank_q=6, rank_k=rank, rank_v=rank)
    matched = match(dataclasses.replace(to, attention=attention), to).config
    gap = abs(matched.n_parameters() - to.n_parameters())
    for n_heads in (matched.attention.n_heads - 1, matched.attention.n_heads + 1):
        other = dataclasses.replace(to, attention=dataclasses.replace(attention, n_heads=n_heads))
        assert abs(other.n_parameters() - to.n_parameters()) >= gap
    if rank == 2:
        assert matched.attention.n_heads == 34


@pytest.mark.parametrize("mechanism", ["mqa", "gqa", "mla-as-released", "tpa-kvonly", "tpa"])
@pytest.mark.parametrize("size", ["small", "medium", "large", "xl"])
def test_the_head_counts_of_the_paper_come_out(size: str, mechanism: str) -> None:
    """Table 10's heads are those that come nearest to MHA's parameters, to two heads (GQA's to a multiple of two)."""
    preset = load_net(f"paper/{size}-{mechanism}")
    start = dataclasses.replace(preset.attention, n_heads=2)  # pyright: ignore[reportArgumentType]
    found = match(dataclasses.replace(preset, attention=start), load_net(f"paper/{size}-mha"))
    assert abs(found.config.attention.n_heads - preset.attention.n_heads) <= 2


def test_gaps_and_changes_are_those_of_the_result() -> None:
    config, to = load_net("paper/medium-tpa"), load_net("paper/medium-mha")
    for what in COSTS:
        found = match(config, to, what, ["heads", "ffn"])
        cost, target = COSTS[what](found.config), COSTS[what](to)
        assert found.gap == pytest.approx((cost - target) / target)
        expected = {
            HEADS: (47, found.config.attention.n_heads),
            "model.net.ffn_hidden": (2730, found.config.ffn_width),
        }
        assert found.changed == {name: pair for name, pair in expected.items() if pair[0] != pair[1]}
        assert abs(found.gap) <= 1e-3


def test_what_fits_already_stays_as_it_is() -> None:
    config = load_net("paper/xl-gqa")
    found = match(config, load_net("paper/xl-mha"), "parameters", list(ALLOWED)[:5])
    assert (found.config, found.changed, found.gap) == (config, {}, 0)


def test_tpa_meets_the_cache_of_gqa_with_ranks_1_and_64_heads() -> None:
    for size in ("small", "medium", "large", "xl"):
        found = match(
            load_net(f"paper/{size}-tpa"), load_net(f"paper/{size}-gqa"), "cache", ["heads", "ranks"]
        )
        attention = found.config.attention
        assert isinstance(attention, TPAConfig)
        assert (attention.n_heads, attention.rank_q, attention.rank_k, attention.rank_v) == (64, 6, 1, 1)
        assert found.gap == 0


def test_numbers_are_targets_too() -> None:
    config = load_net("paper/small-mla")
    found = match(config, 12 * 2 * 400, "cache", ["kv_rank"])
    assert found.config.attention.cache_elements() == 400
    assert match(config, 10**8, "parameters", ["ffn"]).config.n_parameters() == pytest.approx(1e8, rel=1e-3)


def test_key_value_heads_divide_heads() -> None:
    config, to = load_net("paper/large-gqa"), load_net("paper/large-tpa")
    free = match(config, to, "cache", ["heads", "kv_heads", "head_dim"])
    assert free.gap == 0
    attention = free.config.attention
    assert attention.n_heads % getattr(attention, "groups") == 0  # noqa: B009
    fixed = match(config, to, "cache", ["kv_heads", "head_dim"])
    assert fixed.config.attention.n_heads == 38
    assert 38 % getattr(fixed.config.attention, "groups") == 0  # noqa: B009


def test_head_dimensions_stay_even_and_feature_factors_whole() -> None:
    attention = TPAConfig(n_heads=8, head_dim=64, order=3, feature_dims=(16, 4))
    config = T6Config(attention=attention)
    for target in (200_000, 1_000_000, 3_000_000):
        found = match(config, target + config.n_parameters(), "parameters", ["head_dim"])
        changed = found.config.attention
        assert isinstance(changed, TPAConfig)
        assert changed.feature_dims is not None
        assert changed.feature_dims[1] == 4
        assert changed.feature_dims[0] % 2 == 0
        assert changed.feature_dims[0] * 4 == changed.head_dim != 64
        assert found.changed["model.net.attention.feature_dims"] == ((16, 4), changed.feature_dims)


def test_shared_factors_keep_equal_ranks() -> None:
    config = T6Config(attention=TPAConfig(n_heads=8, rank_k=2, rank_v=2, shared_b=True))
    found = match(config, 2 * config.cache_bytes_per_token(2), "cache", ["ranks"])
    attention = found.config.attention
    assert isinstance(attention, TPAConfig)
    assert attention.rank_k == attention.rank_v == 4
    assert found.changed == {f"model.net.attention.rank_{part}": (2, 4) for part in "kv"}


def test_heads_are_no_fewer_than_top_k() -> None:
    attention = TPAConfig(n_heads=8, head_dim=32, nonlinearity="topk_heads", top_k=4)
    config = T6Config(attention=attention)
    found = match(config, dataclasses.replace(config, attention=dataclasses.replace(attention, n_heads=5)))
    assert found.config.attention.n_heads == 5


@pytest.mark.parametrize("what", list(COSTS))
def test_flops_and_the_rest_are_matched_in_under_a_second_at_xl(what: str) -> None:
    """With room for a busy machine."""
    started = time.perf_counter()
    match(load_net("paper/xl-tpa"), load_net("paper/xl-mha"), what, list(ALLOWED))
    match(load_net("paper/xl-gqa"), load_net("paper/xl-tpa"), what, list(ALLOWED))
    assert time.perf_counter() - started < 6


@pytest.mark.parametrize(
    ("preset", "to", "what", "allow", "sentence"),
    [
        (
            "paper/small-gqa",
            10_000,
            "cache",
            ["heads", "ffn"],
            "allow='heads ffn' is not possible: it does not change the cache of gqa; choose from kv_heads, head_dim",
        ),
        (
            "paper/small-tpa",
            1_000_000,
            "parameters",
            ["heads"],
            "parameters=1,000,000 cannot be met by changing heads: with n_heads=1 this model has 101,836,800 already",
        ),
        (
            "paper/small-tpa",
            10**12,
            "parameters",
            ["ranks"],
            "with rank_q=12 and rank_k=8 and rank_v=8 this model has 140,599,296 only",
        ),
        (
            "paper/small-tpa",
            1,
            "memory",
            ["heads"],
            "match='memory' is not possible: choose from parameters, cache",
        ),
        (
            "paper/small-tpa",
            1,
            "cache",
            ["head"],
            "allow='head' is not possible: choose from heads, kv_heads",
        ),
        ("paper/small-tpa", 0, "cache", ["heads"], "to=0 is not possible: it must be above 0"),
        (
            "paper/small-tpa-kvonly",
            10**8,
            "parameters",
            ["kv_rank"],
            "it does not change the parameters of tpa-kvonly; choose from heads, ranks, head_dim, ffn",
        ),
    ],
)
def test_what_cannot_be_met_is_said_in_one_sentence(
    preset: str, to: int, what: str, allow: list[str], sentence: str
) -> None:
    with pytest.raises(BadInput, match=sentence) as caught:
        match(load_net(preset), to, what, allow)
    assert "\n" not in str(caught.value)


def test_more_freedom_is_never_worse() -> None:
    """Head dimensions alone meet this target exactly; with ranks the combinations nearest at hand are all below it."""
    config, to = load_net("paper/small-tpa"), load_net("paper/small-mha")
    for allow in (["head_dim"], ["ranks", "head_dim"], ["ranks", "head_dim", "heads"]):
        assert match(config, to, "cache", allow).gap == 0
