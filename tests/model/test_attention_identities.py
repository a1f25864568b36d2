"""What the variants are: the paper's identities and each option's formula, written out by hand.

Shape suffixes: B batch, T tokens, R rank, H heads, G key/value heads, D head dimension, C d_model.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kernels.rope import rotate
from t6_lightning.common.errors import BadInput
from t6_lightning.model.attention.base import AttentionConfig, AttentionLayer, Keys, Layout
from t6_lightning.model.attention.head_factors import nonlinearity, second_moment
from t6_lightning.model.attention.mha import MHAConfig
from t6_lightning.model.attention.mla import MLAConfig
from t6_lightning.model.attention.tpa import TensorProductAttention, TPAConfig
from t6_lightning.model.attention.tpa.layer import predecessors
from t6_lightning.model.init import SCHEMES, entry_variance, init_factor_
from t6_lightning.model.rope import Rope, Tables

C, T = 24, 11
TPA = TPAConfig(n_heads=5, head_dim=16, rank_q=3, rank_k=2, rank_v=2)


def built(config: AttentionConfig) -> AttentionLayer:
    """A layer in float64, its output matrix random too."""
    torch.manual_seed(0)
    return config.build(C).double()


def tpa(**changes: object) -> TensorProductAttention:
    layer = built(dataclasses.replace(TPA, **changes))
    assert isinstance(layer, TensorProductAttention)
    return layer


def tokens(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, T, C, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def layout_of(config: AttentionConfig, offset: int = 0) -> Layout:
    positions = torch.arange(T) + offset
    queries, keys = config.rope.query_and_key_tables(positions, config.rope_width(), 10000.0)
    return Layout(queries, Keys(keys, torch.arange(T) == 0))


def heads(layer: AttentionLayer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return layer.heads(tokens(), layout_of(layer.config))


def copy_(layer: nn.Module, source: nn.Module, *names: str) -> None:
    state = {name: value for name, value in source.state_dict().items() if not names or name in names}
    layer.load_state_dict(state, strict=not names)


@pytest.mark.parametrize("groups", [6, 3, 2, 1], ids=["MHA", "GQA3", "GQA2", "MQA"])
def test_mha_gqa_and_mqa_are_tpa_with_fixed_head_factors(groups: int) -> None:
    """Section 4: a_j = G · mask_j, with the plain layer's matrices as feature factors."""
    h, d = 6, 16
    plain = built(MHAConfig(h, d, groups)).float()
    fixed = built(TPAConfig(h, d, rank_q=h, rank_k=groups, rank_v=groups, noncontextual_a="qkv")).float()
    masks_GH = F.one_hot(torch.arange(h) // (h // groups), groups).T.float()
    with torch.no_grad():
        fixed.a_q.copy_(h * torch.eye(h))
        for part in "kv":
            getattr(fixed, f"a_{part}").copy_(groups * masks_GH)
        for part in "qkv":
            getattr(fixed, f"b_{part}").weight.copy_(getattr(plain, part).weight)
    copy_(fixed.output, plain.output)
    x, layout = tokens().float(), layout_of(plain.config)
    torch.testing.assert_close(fixed(x, layout), plain(x, layout), rtol=0, atol=1e-6)


@pytest.mark.parametrize("split", [(16, 1), (8, 2)], ids=["16x1", "8x2"])
def test_third_order_with_constant_c_is_second_order(split: tuple[int, int]) -> None:
    d_b, d_c = split
    third = tpa(order=3, feature_dims=split, noncontextual_c="qkv", rope=Rope(dims=0 if d_c > 1 else None))
    second = tpa(rope=Rope(dims=0 if d_c > 1 else None))
    with torch.no_grad():
        for part in "qkv":
            getattr(third, f"c_{part}").fill_(1)
            copy_(getattr(second, f"a_{part}"), getattr(third, f"a_{part}"))
            # vec stacks columns: with c = 1 the row is b, d_c times.
            rows = getattr(third, f"b_{part}").weight.unflatten(0, (-1, d_b))
            getattr(second, f"b_{part}").weight.copy_(rows.repeat(1, d_c, 1).flatten(0, 1))
    copy_(second.output, third.output)
    x = tokens()
    torch.testing.assert_close(
        third(x, layout_of(third.config)), second(x, layout_of(second.config)), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("factorize_q", [True, False], ids=["tpa", "kvonly"])
def test_theorem_c1_rotating_b_rotates_every_column(factorize_q: bool) -> None:
    """T_t = I ⊗ R_t: Q and K of turned b are the unturned ones, R_t applied to each run of d_b dimensions."""
    still = tpa(order=3, feature_dims=(8, 2), rope=Rope(dims=0), factorize_q=factorize_q)
    turned = tpa(order=3, feature_dims=(8, 2), factorize_q=factorize_q)
    copy_(turned, still)
    tables = layout_of(turned.config).queries
    for name, before, after in zip("qk", heads(still), heads(turned), strict=False):
        runs = before.unflatten(-1, (2, 8)).flatten(2, 3)
        torch.testing.assert_close(
            rotate(runs, *tables).view_as(before), after, rtol=1e-12, atol=1e-14, msg=name
        )
    torch.testing.assert_close(heads(still)[2], heads(turned)[2])


def test_vec_stacks_columns() -> None:
    """Element j · d_b + i of a row is b_i c_j, and the product carries 1/R."""
    layer = tpa(order=3, feature_dims=(8, 2), rope=Rope(dims=0))
    f = layer.contextual_factors(tokens())
    expected = torch.einsum("btrh,btri,btrj->bthji", f["a_v"], f["b_v"], f["c_v"]).flatten(-2) / 2
    torch.testing.assert_close(heads(layer)[2], expected)


def test_fourth_order_is_the_product_of_four() -> None:
    layer = tpa(order=4, feature_dims=(4, 2, 2), rope=Rope(dims=0))
    f = layer.contextual_factors(tokens())
    factors = [f[f"{letter}_q"] for letter in "abcd"]
    expected = torch.einsum("btrh,btri,btrj,btrk->bthkji", *factors).flatten(3) / 3
    torch.testing.assert_close(heads(layer)[0], expected)


@pytest.mark.parametrize("pairing", ["halves", "interleaved"])
def test_rope_after_the_product_is_rope_on_the_factors_at_second_order(pairing: str) -> None:
    early = tpa(rope=Rope(dims=10, pairing=pairing))
    late = tpa(rope=Rope(dims=10, pairing=pairing), rope_at="product")
    copy_(late, early)
    for one, other in zip(heads(early), heads(late), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert early.config.caches_rotated_b
    assert not late.config.caches_rotated_b


def test_rope_after_the_product_turns_the_whole_head_at_third_order() -> None:
    late = tpa(order=3, feature_dims=(8, 2), rope_at="product")
    still = tpa(order=3, feature_dims=(8, 2), rope=Rope(dims=0))
    copy_(late, still)
    expected = rotate(heads(still)[0], *layout_of(late.config).queries)
    torch.testing.assert_close(heads(late)[0], expected, rtol=1e-12, atol=1e-12)


def test_partial_rope_leaves_the_other_dimensions() -> None:
    partial, still = tpa(rope=Rope(dims=6)), tpa(rope=Rope(dims=0))
    copy_(partial, still)
    for before, after in zip(heads(still)[:2], heads(partial)[:2], strict=True):
        assert torch.equal(before[..., 6:], after[..., 6:])
        pairs = torch.complex(before[..., :3], before[..., 3:6])
        angles = torch.arange(T)[:, None] * 10000.0 ** (-2 * torch.arange(3, dtype=torch.float64) / 6)
        expected = pairs * torch.exp(-1j * angles)[:, None, :]
        torch.testing.assert_close(
            torch.cat([expected.real, expected.imag], -1), after[..., :6], rtol=1e-6, atol=1e-7
        )


@pytest.mark.parametrize("form", ["relative", "reference"])
def test_decay_multiplies_each_pair_as_its_formula_says(form: str) -> None:
    gamma = 0.97
    plain = tpa(rope=Rope(dims=6))
    decayed = tpa(rope=Rope(dims=6, decay=gamma, decay_form=form))
    copy_(decayed, plain)
    frequencies = 10000.0 ** (-2 * torch.arange(3, dtype=torch.float64) / 6)
    factors = gamma ** (torch.arange(T)[:, None] * frequencies).repeat(1, 2)[:, None, :]
    for part, before, after in zip("qk", heads(plain), heads(decayed), strict=False):
        expected = before.clone()
        grows = part == "k" and form == "relative"
        expected[..., :6] *= 1 / factors if grows else factors
        torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-7)


def test_llamas_direction_and_interleaved_pairs_are_the_same_up_to_a_permutation() -> None:
    x = torch.randn(1, T, 1, 8, dtype=torch.float64)
    reference, llama = (
        Rope(direction=d).query_and_key_tables(torch.arange(T), 8, 10000.0)[0] for d in ("reference", "llama")
    )
    swapped = x.roll(4, dims=-1)
    torch.testing.assert_close(rotate(x, *llama), rotate(swapped, *reference).roll(4, dims=-1))
    apart = torch.cat([x[..., 0::2], x[..., 1::2]], -1)
    neighbours = rotate(x, *reference, "interleaved")
    torch.testing.assert_close(
        rotate(apart, *reference), torch.cat([neighbours[..., 0::2], neighbours[..., 1::2]], -1)
    )


def test_the_references_tables_are_rounded_to_bfloat16() -> None:
    tables = Rope(tables="reference").query_and_key_tables(torch.arange(1024), 64, 10000.0)[0]
    exact = Rope().query_and_key_tables(torch.arange(1024), 64, 10000.0)[0]
    for table, truth in zip(tables, exact, strict=True):
        assert torch.equal(table, table.bfloat16().float())
        assert 0 < (table - truth).abs().max() < 2**-8


def test_shared_b_is_two_equal_ones() -> None:
    shared, apart = tpa(shared_b=True), tpa()
    state = shared.state_dict()
    both = state.pop("b_kv.weight")
    apart.load_state_dict({**state, "b_k.weight": both, "b_v.weight": both})
    for one, other in zip(heads(shared), heads(apart), strict=True):
        torch.testing.assert_close(one, other)
    assert shared.config.cache_elements() == 2 * 5 * 2 + 2 * 16


def test_shared_c_is_three_equal_ones() -> None:
    shared = tpa(order=3, feature_dims=(8, 2), rank_q=2, shared_c=True)
    apart = tpa(order=3, feature_dims=(8, 2), rank_q=2)
    state = shared.state_dict()
    c = state.pop("c_qkv.weight")
    apart.load_state_dict({**state, **{f"c_{part}.weight": c for part in "qkv"}})
    for one, other in zip(heads(shared), heads(apart), strict=True):
        torch.testing.assert_close(one, other)


def test_kv_shift_adds_the_predecessor() -> None:
    shifted, plain = tpa(kv_shift=True), tpa()
    with torch.no_grad():
        for name, value in shifted.shift.items():
            value.normal_(generator=torch.Generator().manual_seed(len(name)))
    plain.load_state_dict({n: v for n, v in shifted.state_dict().items() if not n.startswith("shift")})
    for part, before, after in zip("kv", heads(plain)[1:], heads(shifted)[1:], strict=True):
        now, prior = shifted.shift[f"{part}_now"], shifted.shift[f"{part}_before"]
        for t in range(T):
            expected = now[:, None] * before[:, t]
            if t > 0:
                expected = expected + prior[:, None] * before[:, t - 1]
            torch.testing.assert_close(after[:, t], expected)


def test_predecessors_stop_at_the_start_of_a_document() -> None:
    x = torch.arange(1.0, 6).view(1, 5, 1, 1)
    starts = torch.tensor([[True, False, True, False, False]])
    assert predecessors(x, starts).flatten().tolist() == [0, 1, 0, 3, 4]


@pytest.mark.parametrize("gate", ["head", "element"])
def test_norm_and_gate_act_on_each_heads_output(gate: str) -> None:
    layer = tpa(output_norm=True, output_gate=gate)
    x = tokens()
    with torch.no_grad():
        layer.output_norm.weight.normal_()
    o = torch.randn(2, T, 5, 16, dtype=torch.float64)
    rms = (o.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    gates = torch.sigmoid(x @ layer.gate.weight.T).view(2, T, 5, -1)
    torch.testing.assert_close(layer.finish(o, x), o / rms * layer.output_norm.weight * gates)


def test_nonlinearities_are_their_formulas() -> None:
    a_RH = torch.randn(3, 5, dtype=torch.float64)
    e_RH = (a_RH / 0.5).exp()
    expected = {
        "none": a_RH / 0.5,
        "sigmoid": 1 / (1 + 1 / e_RH),
        "softmax_heads": 5 * e_RH / e_RH.sum(1, keepdim=True),
        "softmax_ranks": 3 * e_RH / e_RH.sum(0, keepdim=True),
        "relu2": (a_RH / 0.5).clamp(min=0) ** 2,
    }
    for name, value in expected.items():
        torch.testing.assert_close(nonlinearity(a_RH, name, temperature=0.5), value, msg=name)


def test_topk_keeps_k_heads_and_learns_as_if_it_kept_all() -> None:
    a_RH = torch.randn(3, 7, dtype=torch.float64).requires_grad_()
    kept = nonlinearity(a_RH, "topk_heads", top_k=2)
    assert ((kept != 0).sum(1) == 2).all()
    mixed = nonlinearity(a_RH, "softmax_heads")
    largest = a_RH.topk(2, dim=1).indices
    torch.testing.assert_close(kept.gather(1, largest), mixed.gather(1, largest))
    upstream = torch.randn(3, 7, dtype=torch.float64)
    through, soft = (torch.autograd.grad(y, a_RH, upstream)[0] for y in (kept, mixed))
    torch.testing.assert_close(through, soft)
    tied = nonlinearity(torch.zeros(2, 7), "topk_heads", top_k=3)
    assert ((tied != 0).sum(1) == 3).all(), "ties are cut too"


@pytest.mark.parametrize("acts_on", ["q", "kv", "qkv"])
def test_the_nonlinearity_acts_where_it_is_asked_to(acts_on: str) -> None:
    layer, plain = tpa(nonlinearity="sigmoid", nonlinear_on=acts_on), tpa()
    copy_(layer, plain)
    f, g = layer.contextual_factors(tokens()), plain.contextual_factors(tokens())
    for part in "qkv":
        expected = g[f"a_{part}"].sigmoid() if part in acts_on else g[f"a_{part}"]
        torch.testing.assert_close(f[f"a_{part}"], expected)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("letter", "rank"), [("a", 6), ("b", 6), ("b", 1)])
def test_schemes_have_the_spread_that_they_state(scheme: str, letter: str, rank: int) -> None:
    config = TPAConfig(n_heads=34, head_dim=64, rank_q=rank, init=scheme)  # pyright: ignore
    shape = config.factor_shape(letter, "q", 768)
    weight, parameter = torch.empty(shape.rank * shape.size, 768), torch.empty(400, shape.size)
    torch.manual_seed(0)
    init_factor_(weight, scheme, shape, gain=1.5)
    init_factor_(parameter, scheme, shape)
    variance = entry_variance(scheme, shape)
    assert weight.var().item() == pytest.approx(1.5**2 * variance / 768, rel=0.03)
    assert parameter.var().item() == pytest.approx(variance, rel=0.06)


@pytest.mark.parametrize("name", ["none", "sigmoid", "relu2"])
def test_second_moments_of_elementwise_nonlinearities(name: str) -> None:
    std = 0.8
    z = torch.linspace(-12, 12, 240_001, dtype=torch.float64)
    density = (-z.square() / 2).exp() / (2 * torch.pi) ** 0.5
    integral = (nonlinearity(std * z, name).square() * density).sum().item() * 1e-4
    assert second_moment(name, std, 2, 5, 1.0, None) == pytest.approx(integral, rel=0.02)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"order": 3, "feature_dims": (16, 4)},
        {"order": 4, "feature_dims": (4, 4, 4)},
        {"nonlinearity": "sigmoid"},
        {"nonlinearity": "softmax_heads"},
        {"nonlinearity": "topk_heads", "top_k": 8},
        {"noncontextual_a": "qkv"},
        {"noncontextual_b": "kv"},
        {"factorize_q": False},
    ],
    ids=str,
)
def test_variance_preserving_gives_q_k_and_v_mhas_variance(change: dict) -> None:
    """1/3; means over 12 draws of the weights, as a non-contextual factor is one draw of few numbers."""
    config = TPAConfig(n_heads=34, init="variance_preserving", **change)
    x = torch.randn(4, 8, 512, generator=torch.Generator().manual_seed(0))
    tables = Tables(*torch.ones(2, 8, 0))
    layout = Layout(tables, Keys(tables, torch.arange(8) == 0))
    config = dataclasses.replace(config, rope=Rope(dims=0))
    draws = []
    for seed in range(12):
        torch.manual_seed(seed)
        draws.append([part.var().item() for part in config.build(512).heads(x, layout)])
    for mean in torch.tensor(draws).mean(0).tolist():
        assert mean == pytest.approx(1 / 3, rel=0.15)
    assert config.initial_variances(512) == pytest.approx({"q": 1 / 3, "k": 1 / 3, "v": 1 / 3}, rel=1e-9)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rank_k": 0}, "attention.rank_k=0 is not possible: it must be an integer >= 1"),
        ({"order": 9}, "attention.order=9 is not possible: it must be at most 8"),
        (
            {"order": 3},
            "attention.feature_dims=None is not possible: order 3 needs 2 sizes with product head_dim=16",
        ),
        ({"order": 3, "feature_dims": (16,)}, "order 3 needs 2 sizes with product head_dim=16"),
        ({"feature_dims": (8, 2)}, "order 2 needs 1 sizes with product head_dim=16"),
        ({"order": 3, "feature_dims": (1, 16)}, "attention.feature_dims=1 is not possible: RoPE turns pairs"),
        (
            {"noncontextual_a": "x"},
            "attention.noncontextual_a='x' is not possible: name some of the letters qkv",
        ),
        ({"noncontextual_a": "qk", "noncontextual_b": "k"}, "no factor of k would depend on the token"),
        ({"noncontextual_c": "k"}, "attention.noncontextual_c='k' is not possible: it needs order 3 or more"),
        (
            {"factorize_q": False, "noncontextual_a": "q"},
            "name some of the letters kv once, as Q is not factorized",
        ),
        (
            {"factorize_q": False, "nonlinearity": "sigmoid", "nonlinear_on": "qkv"},
            "attention.nonlinear_on='qkv' is not possible: name some of the letters kv",
        ),
        (
            {"shared_b": True, "rank_v": 3},
            "attention.shared_b=True is not possible: K and V need equal ranks",
        ),
        ({"shared_b": True, "noncontextual_b": "k"}, "attention.shared_b=True is not possible"),
        ({"shared_c": True}, "it needs order 3 or more and equal ranks, not order 2"),
        (
            {"nonlinearity": "gelu"},
            "attention.nonlinearity='gelu' is not possible: choose one of none, sigmoid",
        ),
        (
            {"nonlinearity": "topk_heads"},
            "attention.top_k=None is not possible: topk_heads needs 1 to n_heads=5",
        ),
        ({"nonlinearity": "topk_heads", "top_k": 6}, "attention.top_k=6 is not possible"),
        ({"top_k": 2}, "attention.top_k=2 is not possible: it needs attention.nonlinearity=topk_heads"),
        (
            {"temperature": 0.5},
            "attention.temperature=0.5 is not possible: it needs an attention.nonlinearity",
        ),
        ({"nonlinearity": "sigmoid", "temperature": 0}, "attention.temperature=0 is not possible"),
        ({"init": "kaiming"}, "attention.init='kaiming' is not possible: choose one of xavier_reference"),
        (
            {"nonlinear_on": "k"},
            "attention.nonlinear_on='k' is not possible: it names what an attention.nonl",
        ),
        (
            {"feature_dims": 16},
            "attention.feature_dims=16 is not possible: it must be a list of sizes or null",
        ),
        ({"gain_a": float("inf")}, "attention.gain_a=inf is not possible: it must be above 0 and finite"),
        ({"gain_b": -1.0}, "attention.gain_b=-1.0 is not possible: it must be above 0"),
        (
            {"output_gate": "yes"},
            "attention.output_gate='yes' is not possible: choose one of none, head, element",
        ),
        ({"head_dim": 15}, "attention.head_dim=15 is not possible: RoPE turns pairs: make it even"),
    ],
    ids=str,
)
def test_combinations_that_make_no_sense_are_refused_in_one_sentence(changes: dict, sentence: str) -> None:
    with pytest.raises(BadInput) as caught:
        dataclasses.replace(TPA, **changes)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Rope(dims=5), "rope.dims=5 is not possible: it must be an even number"),
        (lambda: Rope(pairing="thirds"), "rope.pairing='thirds' is not possible: choose one of halves"),
        (lambda: Rope(decay=1.1), "rope.decay=1.1 is not possible: it must be from 0.9 to 1"),
        (
            lambda: Rope(decay_form="reference"),
            "rope.decay_form='reference' is not possible: it needs rope.decay",
        ),
        (lambda: MHAConfig(4, 16, rope=Rope(dims=20)), "rope.dims=20 is not possible: at most 16 dimensions"),
        (lambda: MHAConfig(6, 16, 4), "attention.n_kv_heads=4 is not possible: it must divide n_heads=6"),
        (lambda: MLAConfig(rope_dim=3), "attention.rope_dim=3 is not possible"),
        (lambda: MLAConfig(rope=Rope(dims=8)), "rope.dims=8 is not possible: in MLA rope_dim says"),
    ],
)
def test_other_families_refuse_in_one_sentence_too(make, sentence: str) -> None:
    with pytest.raises(BadInput) as caught:
        make()
    assert sentence in str(caught.value)
