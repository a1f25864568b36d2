"""Several weights in one product, against torch's linear layers.

Shapes: B batch, T tokens, K inputs, N outputs.
"""

import pytest
import torch
import torch.nn.functional as F

from kernels.linear import stacked
from kernels.linear.stacked import _StackedLinear, stack, stacked_linear
from kernels.tolerances import assert_close
from t6_lightning.model.attention.tpa import TPAConfig
from t6_lightning.model.config import T6Config
from t6_lightning.model.t6 import T6
from t6_lightning.training import recompute


@pytest.fixture
def x_BTK() -> torch.Tensor:
    return torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def weights() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 8, dtype=torch.float64, generator=generator) for n in (3, 4, 1)]


def test_each_weight_has_its_place(x_BTK, weights):
    assert torch.equal(stacked_linear(x_BTK, weights), F.linear(x_BTK, torch.cat(weights)))
    y = stacked_linear(x_BTK, weights, [4, 4, 8])
    assert torch.equal(stack(weights, [4, 4, 8])[[3, 9, 15]], torch.zeros(3, 8, dtype=torch.float64))
    for place, weight in zip((0, 4, 8), weights, strict=True):
        assert torch.allclose(y[..., place : place + len(weight)], F.linear(x_BTK, weight))
    assert stacked_linear(x_BTK, weights[:1]).shape == (2, 5, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_products_own_gradients(dtype, x_BTK, weights):
    """What a GPU runs under autocast, on what the half-precision product reads."""
    x = x_BTK.to(dtype).requires_grad_()
    leaves = [weight.to(dtype).float().requires_grad_() for weight in weights]
    upstream = torch.ones(2, 5, 16, dtype=dtype).cumsum(-1)
    y = _StackedLinear.apply(x, [4, 4, 8], *leaves)
    assert isinstance(y, torch.Tensor)
    assert y.dtype == dtype
    got = torch.autograd.grad(y, (x, *leaves), upstream)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, *leaves)]
    truth = F.linear(exact[0], stack(exact[1:], [4, 4, 8]))
    expected = torch.autograd.grad(truth, exact, upstream.double())
    assert_close(y, truth, dtype)
    for mine, true in zip(got, expected, strict=True):
        assert_close(mine, true, dtype)
    assert all(gradient.dtype == torch.float32 for gradient in got[1:])
    # One tensor, which nothing has copied.
    assert len({gradient.untyped_storage().data_ptr() for gradient in got[1:]}) == 1


def test_weights_of_no_gradient_and_no_gradient_at_all(x_BTK, weights):
    x = x_BTK.requires_grad_()
    (d_x,) = torch.autograd.grad(stacked_linear(x, weights).sum(), x)
    assert torch.allclose(d_x, torch.cat(weights).sum(0).expand_as(x))
    with torch.no_grad():
        assert not stacked_linear(x, weights).requires_grad


@pytest.mark.parametrize("rows", [[4, 4], [3, 4, 0], []], ids=str)
def test_rows_are_one_for_each_weight_and_enough(rows, x_BTK, weights):
    with pytest.raises(ValueError, match=r"stacked_linear: weights of \[3, 4, 1\] rows in"):
        stacked_linear(x_BTK, weights, rows)
    with pytest.raises(ValueError, match=r"weights of \[\] rows"):
        stacked_linear(x_BTK, [])


@pytest.mark.parametrize("shape", [(3, 9), (3,), (3, 5, 1)], ids=str)
def test_weights_take_what_x_has(shape, x_BTK, weights):
    with pytest.raises(
        ValueError, match=r"stacked_linear: x .*, weights .*; allowed: x \(..., K\), weights \(N, K\)"
    ):
        stacked_linear(x_BTK, [*weights, torch.randn(shape)])


def test_what_needs_no_gradient_costs_no_product(monkeypatch):
    calls = []
    monkeypatch.setattr(stacked, "widens", lambda x: True)
    monkeypatch.setattr(stacked, "wide_product", lambda x, y: calls.append(1) or (x @ y).float())
    x_K, weight = torch.randn(8, requires_grad=True), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = stacked_linear(x_K, [weight])
    (d_x,) = torch.autograd.grad(y.float().sum(), x_K)
    assert d_x.shape == (8,)
    assert not calls
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = stacked_linear(x_K.detach(), [weight])
    (d_weight,) = torch.autograd.grad(y.float().sum(), weight)
    assert torch.allclose(d_weight, x_K.detach().bfloat16().float().expand(3, 8))
    assert calls == [1]


@pytest.mark.parametrize(("choice", "compiled"), [("none", False), ("selective", True), ("full", False)])
def test_a_model_trains_as_by_layers_of_torch(choice, compiled, monkeypatch):
    """The GPU's path, on a CPU: under autocast, recomputed and compiled."""

    def gradients(choice: str, compiled: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = T6(T6Config(97, 64, 1, 20, TPAConfig(5, 16), output_init="scaled"))
        recompute.apply(model.blocks, choice)  # pyright: ignore[reportArgumentType]
        if compiled:
            for block in model.blocks:
                block.compile(fullgraph=True)
        tokens = torch.randint(97, (2, 20))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(tokens, tokens.roll(-1, 1))
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients("none", False)
    monkeypatch.setattr(stacked, "widens", lambda x: True)
    # Twice as much, to see which gradients it makes: gate and up are layers of their own on a CPU.
    monkeypatch.setattr(stacked, "wide_product", lambda x, y: 2 * (x @ y).float())
    torch._dynamo.reset()
    for name, gradient in gradients(choice, compiled).items():
        truth = expected[name] * (2 if ".attention." in name else 1)
        assert float((gradient - truth).norm() / truth.norm()) < 0.02, name
