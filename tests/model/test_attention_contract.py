"""What every attention variant must hold: all families and presets, new ones included, without a change here.

T6_VARIANTS="my_module my_model.yaml" holds the families of a module, or the model of a file, to it instead.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from math import prod

import pytest
import torch
from overrides import bypassed_overrides
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from variants import one_per_family, random_model, random_tokens, shrunk, variants

from t6_lightning.model.attention.base import Keys, Layout
from t6_lightning.model.attention.mha import MHAConfig, MultiHeadAttention
from t6_lightning.model.config import T6Config
from t6_lightning.model.rope import Tables
from t6_lightning.model.t6 import T6
from t6_lightning.presets import load_net, model_presets

VARIANTS = variants()
FAMILIES = one_per_family()
TOKENS = 13


@pytest.fixture(params=VARIANTS.values(), ids=list(VARIANTS), scope="module")
def config(request: pytest.FixtureRequest) -> T6Config:
    return request.param


@pytest.fixture(scope="module")
def model(config: T6Config) -> T6:
    """In float64."""
    return random_model(config)


@pytest.fixture(scope="module")
def tokens(config: T6Config) -> torch.Tensor:
    return random_tokens(config, 3, TOKENS)


def test_no_override_is_bypassed(config: T6Config, tokens: torch.Tensor) -> None:
    """What a derived layer says anew is called in training, prefill and decoding, or replaced there too."""
    bypassed = bypassed_overrides(config, tokens)
    assert not bypassed, "\n".join(bypassed)


def layout_at(config: T6Config, positions: torch.Tensor) -> Layout:
    """Positions (T,) in float64 throughout, so that only the mathematics counts."""
    rope, width = config.attention.rope, config.attention.rope_width()
    pairs = torch.arange(0, width, 2, dtype=torch.float64)
    angles = positions[:, None].double() * config.rope_base ** (-pairs / max(width, 1))
    sign = -1 if rope.direction == "llama" else 1
    shrink = (rope.decay or 1.0) ** angles
    cos, sin = angles.cos(), sign * angles.sin()
    queries = Tables(cos * shrink, sin * shrink)
    keys = queries if rope.decay_form == "reference" else Tables(cos / shrink, sin / shrink)
    return Layout(queries, Keys(keys, torch.arange(len(positions)) == 0))


def test_logits_have_their_shape_and_no_token_sees_the_future(
    config: T6Config, model: T6, tokens: torch.Tensor
) -> None:
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % config.vocab_size
    before, after = model(tokens), model(changed)
    assert before.shape == (*tokens.shape, config.vocab_size)
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=1e-12)
    assert ((before[:, 9:] - after[:, 9:]).abs().amax(-1) > 1e-9).all(), "later tokens do see it"


@pytest.mark.parametrize("pieces", [[1] * TOKENS, [TOKENS], [5, 1, 4, 3]], ids=["single", "whole", "chunks"])
def test_cached_decoding_equals_the_full_forward(model: T6, tokens: torch.Tensor, pieces: list[int]) -> None:
    cache = model.new_cache(len(tokens), TOKENS)
    logits = torch.cat([model(part, cache=cache) for part in tokens.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(logits, model(tokens), rtol=1e-10, atol=1e-11)


def forgetful() -> T6Config:
    """Its classes are local: no family that others find."""

    @dataclass(frozen=True)
    class ForgetfulConfig(MHAConfig):
        """MHA with a learned scale per head, which starts at one and which cached decoding forgets."""

        def build(self, d_model: int) -> ForgetfulAttention:
            return ForgetfulAttention(self, d_model)

    class ForgetfulAttention(MultiHeadAttention):
        def __init__(self, config: MHAConfig, d_model: int) -> None:
            super().__init__(config, d_model)
            self.head_scale = nn.Parameter(torch.ones(config.n_heads))

        def attend(
            self, q_BTHD: torch.Tensor, k_BTGD: torch.Tensor, v_BTGE: torch.Tensor, layout: Layout
        ) -> torch.Tensor:
            return super().attend(q_BTHD, k_BTGD, v_BTGE, layout) * self.head_scale[:, None]

    return shrunk(T6Config(attention=ForgetfulConfig()))


@pytest.mark.parametrize("pieces", [[1] * TOKENS, [5, 1, 4, 3]], ids=["single", "chunks"])
def test_the_contract_notices_a_scale_that_decoding_forgets(pieces: list[int]) -> None:
    config = forgetful()
    model, tokens = random_model(config), random_tokens(config, 3, TOKENS)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        test_cached_decoding_equals_the_full_forward(model, tokens, pieces)
    # Nothing else about the family is wrong.
    for block in model.blocks:
        nn.init.ones_(block.attention.head_scale)
    test_cached_decoding_equals_the_full_forward(model, tokens, pieces)


def test_rows_of_different_lengths_share_a_cache_that_can_be_cropped(
    config: T6Config, model: T6, tokens: torch.Tensor
) -> None:
    cache = model.new_cache(2, 16)
    model(tokens[:2, :12], cache=cache)
    cache.crop(torch.tensor([5, 9]))
    more = random_tokens(config, 2, 3)
    logits = model(more, cache=cache)
    for row, kept in enumerate((5, 9)):
        alone = model(torch.cat([tokens[row : row + 1, :kept], more[row : row + 1]], dim=1))
        torch.testing.assert_close(logits[row], alone[0, kept:], rtol=1e-10, atol=1e-11)


def test_documents_in_one_window_do_not_see_each_other(model: T6, tokens: torch.Tensor) -> None:
    lengths = [4, 6, 3]
    documents = torch.arange(3).repeat_interleave(torch.tensor(lengths)).expand(len(tokens), -1)
    apart = torch.cat([model(part) for part in tokens.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(model(tokens, documents), apart, rtol=1e-10, atol=1e-11)


def test_only_distances_count(config: T6Config, model: T6) -> None:
    """Theorem 3.1: moving all positions by the same amount changes nothing."""
    if config.attention.rope.decay_form == "reference" and config.attention.rope.decay is not None:
        pytest.skip("the reference's decay is not relative, and is said not to be")
    layer = model.blocks[0].attention
    x = torch.randn(2, 9, config.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved, still = (layer(x, layout_at(config, torch.arange(9) + offset)) for offset in (300, 0))
    torch.testing.assert_close(moved, still, rtol=1e-8, atol=1e-10)


def test_parameters_and_cache_are_what_the_formulas_say(config: T6Config, model: T6) -> None:
    sizes = {name: tuple(p.shape) for name, p in model.blocks[0].attention.named_parameters()}
    stated, counted = config.attention.n_parameters(config.d_model), sum(map(prod, sizes.values()))
    assert counted == stated, f"n_parameters() says {stated}, a layer has {counted}: {sizes}"
    assert sum(p.numel() for p in model.parameters()) == config.n_parameters()
    # What the layer really hands to the cache, and what the cache really allocates.
    x = torch.randn(2, 3, config.d_model, dtype=torch.float64)
    _, entries = model.blocks[0].attention.project(x, layout_at(config, torch.arange(3)))
    handed = {name: tuple(value.shape[2:]) for name, value in entries.items()}
    assert sum(prod(shape) for shape in handed.values()) == config.attention.cache_elements()
    for dtype in (torch.float32, torch.bfloat16):
        cache = model.new_cache(3, 17, dtype)
        assert {name: tuple(tensor.shape[3:]) for name, tensor in cache.tensors.items()} == handed
        assert cache.logical_bytes == 3 * 17 * config.cache_bytes_per_token(dtype.itemsize)
        assert cache.n_bytes == cache.logical_bytes + cache.padding_bytes


def test_flops_are_what_pytorch_counts(config: T6Config, tokens: torch.Tensor) -> None:
    model = random_model(config, torch.float32)

    def counted(*arguments: torch.Tensor, backward: bool = False, **options: object) -> int:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            logits = model(*arguments, **options)
            if backward:
                logits.sum().backward()
        return counter.get_total_flops()

    forward = tokens.numel() * config.forward_flops(keys=TOKENS)
    assert counted(tokens) == forward
    # Each product has two in the backward pass: what `training_flops` takes for granted.
    assert counted(tokens, backward=True) == 3 * forward
    assert config.training_flops(TOKENS) == 3 * config.forward_flops(keys=(TOKENS + 1) / 2)
    cache = model.new_cache(len(tokens), TOKENS)
    model(tokens[:, :-1], cache=cache)
    assert counted(tokens[:, -1:], cache=cache) == len(tokens) * config.decode_flops(keys=TOKENS)


def test_the_formulas_build_no_module(config: T6Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a cost formula built a module")

    monkeypatch.setattr(nn.Module, "__init__", refuse)
    costs = [config.n_parameters(), config.cache_bytes_per_token(2), config.training_flops()]
    assert all(cost > 0 for cost in [*costs, config.decode_flops(1024)])


def test_every_parameter_is_trained(config: T6Config, model: T6, tokens: torch.Tensor) -> None:
    model.zero_grad()
    model.train()
    model.loss(tokens, tokens.roll(-1, dims=1)).backward()
    model.eval()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient: nothing uses it"
        assert parameter.grad.any(), f"{name} has a gradient of zero: nothing uses it"
    model.zero_grad()


def test_bf16_forward_and_backward_are_finite(config: T6Config, tokens: torch.Tensor) -> None:
    model = random_model(config, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(tokens, tokens.roll(-1, dims=1))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    half = model.bfloat16()
    assert half(tokens).isfinite().all()
    cache = half.new_cache(len(tokens), TOKENS)
    for part in tokens.split([5, 1, 7], dim=1):
        assert half(part, cache=cache).isfinite().all()


def test_gradients_are_those_of_finite_differences(config: T6Config, model: T6) -> None:
    layer = model.blocks[0].attention
    names = [name for name, _ in layer.named_parameters()]
    layout = layout_at(config, torch.arange(4))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, config.d_model, dtype=torch.float64, generator=generator)

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(
            layer, dict(zip(names, parameters, strict=True)), (x, layout), strict=True
        )

    inputs = [x, *(p.detach().clone() for p in layer.parameters())]
    straight_through = getattr(config.attention, "nonlinearity", "none") == "topk_heads"
    if straight_through:
        # Its gradient is by design not that of its value; see test_attention_identities.py.
        pytest.skip("top-k has straight-through gradients")
    assert torch.autograd.gradcheck(run, [i.requires_grad_() for i in inputs], fast_mode=True, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_compiled_equals_eager(name: str) -> None:
    config = FAMILIES[name]
    model, tokens = random_model(config, torch.float32), random_tokens(config, 2, TOKENS)
    expected = model(tokens)
    for block in model.blocks:
        block.compile()
    torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", model_presets())
def test_presets_have_their_parameters_at_full_size(preset: str) -> None:
    config = load_net(preset)
    with torch.device("meta"):
        model = T6(config)
    assert sum(p.numel() for p in model.parameters()) == config.n_parameters()


@pytest.mark.parametrize("preset", [name for name in model_presets() if name.startswith("paper/xl-")])
def test_xl_presets_build_and_run_without_memory(preset: str) -> None:
    """On the meta device; the aim is under 5 s each, printed rather than asserted on a machine that others use."""
    config = dataclasses.replace(load_net(preset), dropout=0.0)
    started = time.perf_counter()
    with torch.device("meta"):
        model = T6(config)
        tokens = torch.zeros(1, config.context, dtype=torch.long)
        model.loss(tokens, tokens).backward()
    print(f"{preset}: {time.perf_counter() - started:.1f} s")
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
