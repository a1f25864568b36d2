"""The T6 model around its attention: loss, generation, initialization, configs. Variants: the contract test."""

from __future__ import annotations

import pytest
import torch
from variants import one_per_family, random_model, random_tokens

from t6_lightning.common.errors import BadInput
from t6_lightning.model.attention.tpa import TPAConfig
from t6_lightning.model.block import SwiGLU
from t6_lightning.model.config import T6Config
from t6_lightning.model.generate import generate, sample
from t6_lightning.model.init import FactorShape, init_factor_
from t6_lightning.model.t6 import T6

CONFIGS = one_per_family()


@pytest.fixture(params=CONFIGS, ids=list(CONFIGS))
def config(request: pytest.FixtureRequest) -> T6Config:
    return CONFIGS[request.param]


def test_aligned_ffn_is_the_same_function():
    ffn = SwiGLU(48, 85).double()
    x = torch.randn(2, 5, 48, dtype=torch.float64)
    weights = list(ffn.parameters())
    expected, got = ffn(x), ffn._aligned(x)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    upstream = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(got, weights, upstream),
        torch.autograd.grad(expected, weights, upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_a_full_cache_says_so(config: T6Config) -> None:
    model, cache = random_model(config), random_model(config).new_cache(1, 4)
    with pytest.raises(ValueError, match="holds 4 tokens a row: 5 more after 0 do not fit"):
        model(random_tokens(config, 1, 5), cache=cache)


@pytest.mark.parametrize(("side", "n", "rank"), [("a", 5, 3), ("b", 16, 3), ("a", 34, 6), ("b", 64, 6)])
def test_reference_initialization_is_xavier_on_the_three_dimensional_view(
    side: str, n: int, rank: int
) -> None:
    d_model = 96
    view = torch.empty((d_model, n, rank) if side == "a" else (d_model, rank, n))
    torch.nn.init.xavier_uniform_(view)
    weight = torch.empty(n * rank, d_model)
    init_factor_(weight, "xavier_reference", FactorShape(side, rank, n, d_model))
    assert weight.std().item() == pytest.approx(view.std().item(), rel=0.03)
    assert weight.abs().max().item() == pytest.approx(view.abs().max().item(), rel=0.02)


def test_reference_variance_of_q_at_the_small_size() -> None:
    """0.0016 at R_Q = 6, measured on the public code, for inputs of unit RMS."""
    torch.manual_seed(0)
    layer = TPAConfig(n_heads=34, head_dim=64, rank_q=6).build(768)
    factors = layer.contextual_factors(torch.randn(64, 4, 768))
    q = torch.einsum("btrh,btrd->bthd", factors["a_q"], factors["b_q"]) / 6
    assert q.var().item() == pytest.approx(0.0016, rel=0.1)


def test_the_model_starts_as_the_reference_does(config: T6Config) -> None:
    torch.manual_seed(0)
    model = T6(config)
    zero = {name for name, p in model.named_parameters() if not p.any()}
    assert zero == {f"blocks.{i}.{m}.weight" for i in range(2) for m in ("attention.output", "ffn.down")}
    bound = config.d_model**-0.5
    assert model.embedding.weight.abs().max() <= bound
    assert model.embedding.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_loss_equals_cross_entropy_of_the_logits(config: T6Config) -> None:
    model, tokens = random_model(config), random_tokens(config, 2, 11)
    targets = random_tokens(config, 2, 11).roll(1, dims=1)
    targets[0, 3:6] = -100
    expected = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model.loss(tokens, targets).double(), expected, rtol=1e-6, atol=0)
    losses = model.token_losses(tokens, targets)
    assert (losses[0, 3:6] == 0).all()


def test_greedy_generation_is_the_argmax_of_the_full_forward(config: T6Config) -> None:
    model, prompt = random_model(config), random_tokens(config, 2, 4)
    text = prompt
    for _ in range(6):
        text = torch.cat([text, model(text)[:, -1:].argmax(-1)], dim=1)
    new = torch.stack(list(generate(model, prompt, 6, temperature=0)), dim=1)
    assert torch.equal(new, text[:, 4:])


def test_sampling_keeps_to_the_top_k_and_follows_its_seed() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).expand(500, 4)
    drawn = sample(logits, 1.0, 2, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {1, 3}
    share = (drawn == 1).double().mean().item()
    assert share == pytest.approx(torch.tensor([3.0, 2.0]).softmax(0)[0].item(), abs=0.07)
    assert torch.equal(drawn, sample(logits, 1.0, 2, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 1e-45, 1e-300])
def test_a_tiny_temperature_takes_the_likeliest_token(temperature: float, top_k: int | None) -> None:
    logits = 40 * torch.randn(50, 257, generator=torch.Generator().manual_seed(0))
    drawn = sample(logits, temperature, top_k, torch.Generator().manual_seed(1))
    assert torch.equal(drawn, logits.argmax(-1))


def test_config_survives_the_round_trip_through_plain_types(config: T6Config) -> None:
    assert T6Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("plain", "sentence"),
    [
        ({"d_modle": 8}, "d_modle is not a field of T6Config: choose from vocab_size, d_model"),
        ({"d_model": 0}, "d_model=0 is not possible"),
        ({"attention": {"class_path": "TPAConfig", "n_heads": 3}}, "fields stand below init_args"),
        (
            {"attention": {"class_path": "TPAConfig", "init_args": {"rope": None}}},
            "attention.rope=None is not possible: it must be a mapping: the fields of Rope",
        ),
        ({"d_model": True}, "d_model=True is not possible"),
        (
            {
                "context": 100_000,
                "attention": {"class_path": "MHAConfig", "init_args": {"rope": {"decay": 0.98}}},
            },
            "rope.decay=0.98 is not possible: over context=100000",
        ),
        ({"rope_base": "ten"}, "rope_base='ten' is not possible: it must be of type float"),
        ({"ffn_hidden": "wide"}, "ffn_hidden='wide' is not possible: it must be an integer >= 1 or null"),
        ({"dropout": 1.0}, r"dropout=1.0 is not possible: it must be at least 0 and below 1"),
        (
            {"attention": {"class_path": "TPA"}},
            "attention.class_path='TPA' is not possible: choose one of MFAConfig, MHAConfig",
        ),
        (
            {"attention": {"class_path": "TPAConfig", "init_args": {"rank_k": 0}}},
            "attention.rank_k=0 is not possible: it must be an integer >= 1",
        ),
        (
            {"attention": {"class_path": "MHAConfig", "init_args": {"head_dim": 7}}},
            "attention.head_dim=7 is not possible: RoPE turns pairs",
        ),
        (
            {"attention": {"class_path": "MHAConfig", "init_args": {"rank": 7}}},
            "attention.rank is not a field of MHAConfig: choose from n_heads, head_dim",
        ),
    ],
)
def test_impossible_models_are_refused_in_one_sentence(plain: dict, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence) as caught:
        T6Config.from_dict(plain)
    assert "\n" not in str(caught.value)
