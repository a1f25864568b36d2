"""SwiGLU of gate and up side by side: Triton's kernel in its interpreter, against torch in float64."""

from functools import partial

import pytest
import torch
from interpreter import needs_interpreter

from kernels.swiglu import plain, swiglu
from kernels.tolerances import assert_matches


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 2), (1, 14), (5, 128), (2, 1, 2 * 4099)], ids=str)
def test_forward_and_gradient(shape, dtype):
    x = 6 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_matches(partial(swiglu, backend="triton"), plain.swiglu, {"gate_up": x}, dtype)


@needs_interpreter
def test_large_gates_do_not_overflow():
    x = torch.tensor([[-1e4, -89.0, 89.0, 1e4, 2.0, 2.0, 2.0, 2.0]], requires_grad=True)
    y = swiglu(x, backend="triton")
    assert torch.allclose(y, plain.swiglu(x))
    assert torch.allclose(*(torch.autograd.grad(f(x).sum(), x)[0] for f in (swiglu, plain.swiglu)))


@needs_interpreter
def test_nothing_gives_nothing():
    x = torch.zeros(3, 0, 8, requires_grad=True)
    y = swiglu(x, backend="triton")
    assert y.shape == (3, 0, 4)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@needs_interpreter
def test_views_are_read_as_they_lie():
    x = torch.randn(8, 3, 4).transpose(0, 2).requires_grad_()
    upstream = torch.randn(4, 2, 3).transpose(1, 2)[..., :1].expand(4, 3, 4)
    by_both = [torch.autograd.grad(swiglu(x, backend=b), x, upstream)[0] for b in ("triton", "plain")]
    assert torch.allclose(*by_both)


@needs_interpreter
def test_derivatives_of_its_gradient_and_in_forward_mode_are_refused():
    x = torch.randn(3, 8, requires_grad=True)
    [once] = torch.autograd.grad(swiglu(x, backend="triton").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="swiglu: by backend 'triton' gradients can be taken once"):
        torch.autograd.grad(once.sum(), x)
    with pytest.raises(ValueError, match="it has no forward-mode derivatives"):
        torch.func.jvp(partial(swiglu, backend="triton"), (x.detach(),), (x.detach(),))


def test_refusals():
    with pytest.raises(ValueError, match=r"swiglu: gate_up is \(2, 3\); its last dimension must be even"):
        swiglu(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="floating-point"):
        swiglu(torch.zeros(2, 4, dtype=torch.int))
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        swiglu(torch.zeros(2, 4), backend="cuda")
    with pytest.raises(ValueError, match=r"float16, bfloat16 or float32|triton is not installed|NVIDIA GPU"):
        swiglu(torch.zeros(2, 4, dtype=torch.float64), backend="triton")
