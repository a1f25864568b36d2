"""The T6 model: what it computes, what it costs, and that cached decoding is the same computation."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from t6_lightning.budget import match_parameters
from t6_lightning.errors import BadInput
from t6_lightning.model.attention.base import Keys, Layout
from t6_lightning.model.attention.mha import MHAConfig
from t6_lightning.model.attention.tpa import TPAConfig
from t6_lightning.model.config import T6Config
from t6_lightning.model.generate import generate, sample
from t6_lightning.model.init import FactorShape, init_factor_
from t6_lightning.model.rope import Rope, Tables
from t6_lightning.model.t6 import T6
from t6_lightning.presets import load_net, preset_names

VARIANTS = {
    "mha-h3-d8": MHAConfig(n_heads=3, head_dim=8),
    "tpa-h5-d16-r6-2-2": TPAConfig(n_heads=5, head_dim=16, rank_q=6, rank_k=2, rank_v=2),
    "tpa-h7-d8-r1-3-2": TPAConfig(n_heads=7, head_dim=8, rank_q=1, rank_k=3, rank_v=2),
}


@pytest.fixture(params=VARIANTS, ids=list(VARIANTS))
def config(request: pytest.FixtureRequest) -> T6Config:
    return T6Config(vocab_size=61, d_model=24, n_layers=2, context=32, attention=VARIANTS[request.param])


def random_model(config: T6Config, dtype: torch.dtype = torch.float64) -> T6:
    """A model whose zero-initialized matrices are random too, so that every path shows in the logits."""
    torch.manual_seed(0)
    model = T6(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3)
    return model


def random_tokens(config: T6Config, batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(config.vocab_size, (batch, length), generator=generator)


def test_no_token_sees_the_future(config: T6Config) -> None:
    model, tokens = random_model(config), random_tokens(config, 2, 17)
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % config.vocab_size
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert ((before[:, 9:] - after[:, 9:]).abs().amax(-1) > 1e-9).all(), "later tokens do see it"


@pytest.mark.parametrize("pieces", [[1] * 13, [13], [5, 1, 4, 3]], ids=["single", "whole", "chunks"])
def test_cached_decoding_equals_the_full_forward(config: T6Config, pieces: list[int]) -> None:
    model, tokens = random_model(config), random_tokens(config, 3, 13)
    cache = model.new_cache(3, 13)
    logits = torch.cat([model(part, cache=cache) for part in tokens.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(logits, model(tokens), rtol=1e-10, atol=1e-12)


def test_rows_of_different_lengths_share_a_cache(config: T6Config) -> None:
    model, tokens = random_model(config), random_tokens(config, 2, 12)
    cache = model.new_cache(2, 16)
    model(tokens, cache=cache)
    cache.crop(torch.tensor([5, 9]))
    more = random_tokens(config, 2, 3)
    logits = model(more, cache=cache)
    for row, kept in enumerate((5, 9)):
        alone = model(torch.cat([tokens[row : row + 1, :kept], more[row : row + 1]], dim=1))
        torch.testing.assert_close(logits[row], alone[0, kept:], rtol=1e-10, atol=1e-12)


def test_a_full_cache_says_so(config: T6Config) -> None:
    model, cache = random_model(config), random_model(config).new_cache(1, 4)
    with pytest.raises(ValueError, match="holds 4 tokens a row: 5 more after 0 do not fit"):
        model(random_tokens(config, 1, 5), cache=cache)


def test_documents_in_one_window_do_not_see_each_other(config: T6Config) -> None:
    model, tokens = random_model(config), random_tokens(config, 1, 15)
    documents = torch.tensor([[0] * 4 + [1] * 6 + [2] * 5])
    logits = model(tokens, documents)
    apart = torch.cat([model(part) for part in tokens.split([4, 6, 5], dim=1)], dim=1)
    torch.testing.assert_close(logits, apart, rtol=1e-10, atol=1e-12)


def test_the_layer_sees_only_distances(config: T6Config) -> None:
    """Theorem 3.1: moving all positions by the same amount changes nothing."""
    layer = random_model(config).blocks[0].attention
    x = torch.randn(2, 9, config.d_model, dtype=torch.float64)

    def at(offset: int) -> torch.Tensor:
        positions = torch.arange(9, dtype=torch.float64) + offset
        pairs = torch.arange(0, config.attention.head_dim, 2, dtype=torch.float64)
        angles = positions[:, None] * 10000 ** (-pairs / config.attention.head_dim)
        tables = Tables(angles.cos(), angles.sin())
        return layer(x, Layout(tables, Keys(tables, torch.arange(9) == 0)))

    torch.testing.assert_close(at(1000), at(0), rtol=1e-9, atol=1e-11)
    queries, keys = Rope().query_and_key_tables(torch.arange(9), config.attention.head_dim, 10000)
    layout = Layout(queries, Keys(keys, torch.arange(9) == 0))
    torch.testing.assert_close(layer(x, layout), at(0), rtol=1e-5, atol=1e-6)


def test_parameters_and_cache_are_what_the_formulas_say(config: T6Config) -> None:
    model = T6(config)
    assert sum(p.numel() for p in model.parameters()) == config.n_parameters()
    for dtype in (torch.float32, torch.bfloat16):
        cache = model.new_cache(3, 17, dtype)
        assert cache.n_bytes == 3 * 17 * config.cache_bytes_per_token(dtype.itemsize)


def test_dense_flops_are_what_pytorch_counts(config: T6Config) -> None:
    model, tokens = random_model(config, torch.float32), random_tokens(config, 2, 16)
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as c,
    ):
        model(tokens)
    assert c.get_total_flops() == tokens.numel() * config.forward_flops(keys=16)


@pytest.mark.parametrize(
    ("preset", "millions"),
    [
        ("paper/small-mha", 123.57),
        ("paper/small-tpa", 124.34),
        ("paper/medium-mha", 353.45),
        ("paper/medium-tpa", 353.99),
        ("paper/large-mha", 772.13),
        ("paper/large-tpa", 773.70),
        ("paper/xl-mha", 1554.89),
        ("paper/xl-tpa", 1555.81),
    ],
)
def test_paper_presets_have_the_paper_totals(preset: str, millions: float) -> None:
    config = load_net(preset)
    assert config.n_parameters() / 1e6 == pytest.approx(millions, abs=0.006)
    with torch.device("meta"):
        assert sum(p.numel() for p in T6(config).parameters()) == config.n_parameters()


def test_cache_ratio_of_the_paper_medium() -> None:
    assert load_net("paper/medium-tpa").cache_ratio_to_mha() == 444 / 2048


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


def test_gradients_reach_every_parameter_and_stay_finite_in_bf16(config: T6Config) -> None:
    model, tokens = random_model(config, torch.float32), random_tokens(config, 2, 11)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(tokens, tokens.roll(-1, dims=1))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


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


def test_config_survives_the_round_trip_through_plain_types(config: T6Config) -> None:
    assert T6Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("plain", "sentence"),
    [
        ({"d_modle": 8}, "d_modle is not a field of T6Config: choose from vocab_size, d_model"),
        ({"d_model": 0}, "d_model=0 is not possible"),
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


def test_every_preset_describes_a_model() -> None:
    assert "quickstart" in preset_names()
    for name in preset_names():
        assert load_net(name).n_parameters() > 0


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_matched_head_counts_are_the_nearest(rank: int) -> None:
    to = load_net("paper/small-tpa")
    attention = TPAConfig(n_heads=1, head_dim=64, rank_q=6, rank_k=rank, rank_v=rank)
    matched = match_parameters(dataclasses.replace(to, attention=attention), to)
    gap = abs(matched.n_parameters() - to.n_parameters())
    for n_heads in (matched.attention.n_heads - 1, matched.attention.n_heads + 1):
        other = dataclasses.replace(to, attention=dataclasses.replace(attention, n_heads=n_heads))
        assert abs(other.n_parameters() - to.n_parameters()) >= gap
    if rank == 2:
        assert matched.attention.n_heads == 34


def test_a_budget_that_cannot_be_met_is_refused() -> None:
    with pytest.raises(BadInput, match="cannot be met"):
        match_parameters(load_net("paper/small-tpa"), 1_000_000)
