"""The key/value cache: padding apart from what is cached, and forwards whose shapes do not grow with it."""

from __future__ import annotations

import pytest
import torch
from variants import one_per_family, random_model, random_tokens, variants

from t6_lightning.__main__ import main
from t6_lightning.evaluation.cache import measure
from t6_lightning.model.attention.tpa import TPAConfig
from t6_lightning.model.cache import KVCache
from t6_lightning.model.config import T6Config
from t6_lightning.model.generate import generate

VARIANTS = variants()
# Of a cache that may be padding.
MOST_PADDING = 0.05


@pytest.mark.parametrize("config", VARIANTS.values(), ids=list(VARIANTS))
def test_logical_bytes_and_declared_padding_add_up_to_the_storage(config: T6Config) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        cache = KVCache(config.attention, config.n_layers, 3, 17, dtype)
        assert cache.logical_bytes == 3 * 17 * config.cache_bytes_per_token(dtype.itemsize)
        assert cache.logical_bytes + cache.padding_bytes == cache.n_bytes
        assert cache.padding_bytes <= MOST_PADDING * cache.logical_bytes


@pytest.mark.parametrize(("n_heads", "kept"), [(32, 32), (34, 36), (47, 48), (61, 64), (78, 80)])
def test_head_factors_begin_where_wide_loads_can(n_heads: int, kept: int) -> None:
    attention = TPAConfig(n_heads=n_heads, head_dim=64)
    stored = attention.stored_entries(2)
    assert stored == {"a_k": (2, kept), "b_k": (2, 64), "a_v": (2, kept), "b_v": (2, 64)}
    cache = KVCache(attention, 1, 2, 8, torch.bfloat16)
    assert cache.tensors["a_k"].shape == (1, 2, 8, 2, n_heads)
    assert cache.tensors["a_k"].stride(-2) == kept


def test_padding_stays_zero() -> None:
    config = T6Config(attention=TPAConfig(n_heads=47, head_dim=16), d_model=24, n_layers=1, vocab_size=61)
    model = random_model(config, torch.float32)
    for fixed in (False, True):
        cache = model.new_cache(2, 9)
        model(random_tokens(config, 2, 5), cache=cache)
        if fixed:
            cache.fix()
        model(random_tokens(config, 2, 2), cache=cache)
        model(random_tokens(config, 2, 1), cache=cache)
        whole = cache.tensors["a_k"].as_strided((2 * 9 * 2, 48), (48, 1))
        assert cache.padding_bytes > 0
        assert whole[:, 47:].eq(0).all()
        assert whole[:, :47].any()


def test_measured_bytes_of_a_preset() -> None:
    row = measure("paper/medium-tpa", 64, 2, torch.bfloat16)
    assert row["logical_bytes"] == row["predicted_bytes"] == 2 * 64 * 24 * 444 * 2
    assert row["padding_bytes"] == 2 * 64 * 24 * 4 * 2
    assert row["measured_bytes"] == row["logical_bytes"] + row["padding_bytes"]
    assert row["ratio_to_mha"] == 444 / 2048


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--context", "1" + 30 * "0"], "quickstart's cache cannot be allocated here"),
        (["--context", "1" + 17 * "0"], "quickstart's cache cannot be allocated here"),
        (["--json", "."], "--json='.' is not possible: it is a folder"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", "quickstart", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("config", VARIANTS.values(), ids=list(VARIANTS))
def test_a_fixed_cache_gives_what_a_growing_one_does(config: T6Config) -> None:
    """Whatever is left of other sequences past the lengths."""
    model, tokens = random_model(config), random_tokens(config, 2, 12)
    cache = model.new_cache(2, 16)
    for entries in cache.tensors.values():
        entries.normal_()
    parts = tokens.split([5, 1, 1, 3, 2], dim=1)
    first = model(parts[0], cache=cache)
    cache.fix()
    logits = torch.cat([first, *(model(part, cache=cache) for part in parts[1:])], dim=1)
    torch.testing.assert_close(logits, model(tokens), rtol=1e-10, atol=1e-11)


def test_rows_of_a_fixed_cache_may_have_different_lengths() -> None:
    for config in one_per_family().values():
        model, tokens = random_model(config), random_tokens(config, 2, 12)
        cache = model.new_cache(2, 16)
        model(tokens, cache=cache)
        cache.fix()
        cache.crop(torch.tensor([5, 9]))
        more = random_tokens(config, 2, 1)
        logits = model(more, cache=cache)
        for row, kept in enumerate((5, 9)):
            alone = model(torch.cat([tokens[row : row + 1, :kept], more[row : row + 1]], dim=1))
            torch.testing.assert_close(logits[row], alone[0, kept:], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("config", one_per_family().values(), ids=list(one_per_family()))
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_generation_from_a_fixed_cache_gives_the_same_tokens(config: T6Config, temperature: float) -> None:
    model, prompt = random_model(config), random_tokens(config, 2, 4)

    def tokens(fixed: bool) -> torch.Tensor:
        cache = model.new_cache(2, 20)
        generator = torch.Generator().manual_seed(3)
        found = generate(
            model, prompt, 10, temperature=temperature, top_k=20, generator=generator, cache=cache
        )
        first = next(found)
        if fixed:
            cache.fix()
        return torch.stack([first, *found], dim=1)

    assert torch.equal(tokens(True), tokens(False))
