"""Linear cross-entropy against the logits of all tokens.

Shapes: N tokens, C model dimension, V vocabulary.
"""

import pytest
import torch
import torch.nn.functional as F
from interpreter import needs_interpreter

from kernels.loss import linear_cross_entropy, linear_cross_entropy_sum
from kernels.loss.plain import CHUNK_LOGIT_BYTES, default_chunk_tokens
from kernels.tolerances import assert_close, assert_matches

N, C, V = 63, 16, 101


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "x_NC": torch.randn(N, C, dtype=torch.float64),
        "weight_VC": torch.randn(V, C, dtype=torch.float64),
    }


@pytest.fixture
def targets() -> torch.Tensor:
    """Ignored tokens first, last, at both sides of a border of 16 and of 21, and the last class present."""
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(0))
    targets[[0, 15, 16, 20, 21, N - 1]] = -100
    targets[1] = V - 1
    return targets


def from_all_logits(x_NC, weight_VC, targets, ignore_index=-100):
    return F.cross_entropy(x_NC @ weight_VC.T, targets, reduction="none", ignore_index=ignore_index)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("chunk_tokens", [1, 16, 21, 62, 63, 1000, None])
def test_forward_and_gradients(chunk_tokens, dtype, inputs, targets):
    assert_matches(
        lambda **inputs: linear_cross_entropy(**inputs, targets_N=targets, chunk_tokens=chunk_tokens),
        lambda **inputs: from_all_logits(**inputs, targets=targets),
        inputs,
        dtype,
    )


@pytest.mark.parametrize("chunk_tokens", [16, None])
def test_ignored_tokens_have_no_loss_and_no_gradient(chunk_tokens, inputs, targets):
    targets = targets.clamp_min(0)
    targets[[3, 40]] = 7
    x, weight = inputs["x_NC"].requires_grad_(), inputs["weight_VC"]
    losses = linear_cross_entropy(x, weight, targets, ignore_index=7, chunk_tokens=chunk_tokens)
    losses.sum().backward()
    ignored = targets == 7
    assert x.grad is not None
    assert (losses[ignored] == 0).all()
    assert (x.grad[ignored] == 0).all()
    assert (losses[~ignored] > 0).all()


def test_all_ignored_and_no_tokens(inputs):
    x, weight = inputs["x_NC"].requires_grad_(), inputs["weight_VC"].requires_grad_()
    losses = linear_cross_entropy(x, weight, torch.full((N,), -100), chunk_tokens=16)
    losses.sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert losses.abs().sum() == x.grad.abs().sum() == weight.grad.abs().sum() == 0
    assert linear_cross_entropy(x[:0], weight, torch.empty(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("chunk_tokens", [2, None])
def test_gradcheck(chunk_tokens):
    torch.manual_seed(0)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 6, -100, 3, 2])
    assert torch.autograd.gradcheck(
        lambda x, weight: linear_cross_entropy(x, weight, targets, chunk_tokens=chunk_tokens), (x, weight)
    )


@pytest.mark.parametrize("chunk_tokens", [16, None])
def test_autocast_multiplies_in_bfloat16_and_sums_in_float32(chunk_tokens, inputs, targets):
    x, weight = (inputs[name].float().requires_grad_() for name in ("x_NC", "weight_VC"))
    with torch.autocast("cpu", torch.bfloat16):
        losses = linear_cross_entropy(x, weight, targets, chunk_tokens=chunk_tokens)
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    # Exactly the losses of logits rounded to bfloat16: the product is in half precision, what follows is not.
    rounded = F.linear(x.detach().bfloat16(), weight.detach().bfloat16()).double()
    expected = F.cross_entropy(rounded, targets, reduction="none")
    assert_close(losses, expected, torch.float32)


def test_outside_autocast_the_wider_dtype_wins(inputs, targets):
    x, weight = inputs["x_NC"], inputs["weight_VC"]
    assert linear_cross_entropy(x.bfloat16(), weight.bfloat16(), targets).dtype == torch.float32
    mixed = linear_cross_entropy(x.bfloat16(), weight.float(), targets)
    assert_close(mixed, from_all_logits(x.bfloat16().double(), weight, targets), torch.float32)


def test_chunks_save_no_logits_for_the_backward_pass(inputs, targets):
    def saved_elements(chunk_tokens: int) -> int:
        saved = [0]

        def record(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.shape[-1:] == (V,):
                saved[0] += tensor.numel()
            return tensor

        x = inputs["x_NC"].clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            linear_cross_entropy(x, inputs["weight_VC"], targets, chunk_tokens=chunk_tokens)
        return saved[0]

    assert saved_elements(N) >= N * V, "the recorder does not see the logits of a single chunk"
    assert saved_elements(16) == 0


@pytest.mark.parametrize(("vocabulary", "tokens"), [(50304, 1280), (256, 262144), (10**7, 128)])
def test_default_chunk_fills_but_does_not_pass_its_share_of_memory(vocabulary, tokens):
    assert default_chunk_tokens(vocabulary) == tokens
    assert tokens == 128 or 4 * tokens * vocabulary <= CHUNK_LOGIT_BYTES


def test_inputs_that_do_not_fit_are_refused(inputs, targets):
    with pytest.raises(ValueError, match="chunk_tokens must be at least 1, got 0"):
        linear_cross_entropy(**inputs, targets_N=targets, chunk_tokens=0)
    with pytest.raises(ValueError, match=r"must be \(N, C\), \(V, C\), \(N,\)"):
        linear_cross_entropy(**inputs, targets_N=targets[1:])


# --- the sum, whose gradients are formed in the forward pass ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("chunk_tokens", [1, 16, 21, 63, 1000, None])
def test_sum_forward_and_gradients(chunk_tokens, dtype, inputs, targets):
    assert_matches(
        lambda **inputs: linear_cross_entropy_sum(
            **inputs, targets_N=targets, chunk_tokens=chunk_tokens
        ).view(1),
        lambda **inputs: from_all_logits(**inputs, targets=targets).sum().view(1),
        inputs,
        dtype,
    )


def test_sum_scales_with_what_follows_and_gives_its_gradients_again(inputs, targets):
    x, weight = (tensor.requires_grad_() for tensor in inputs.values())
    loss = linear_cross_entropy_sum(x, weight, targets, chunk_tokens=16)
    once = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    scaled = torch.autograd.grad(0.25 * loss, (x, weight))
    for one, other in zip(once, scaled, strict=True):
        assert torch.equal(0.25 * one, other)


@pytest.mark.parametrize("wanted", ["x_NC", "weight_VC"])
def test_sum_of_which_one_gradient_is_wanted(wanted, inputs, targets):
    inputs[wanted].requires_grad_()
    [got] = torch.autograd.grad(linear_cross_entropy_sum(**inputs, targets_N=targets), [inputs[wanted]])
    [expected] = torch.autograd.grad(from_all_logits(**inputs, targets=targets).sum(), [inputs[wanted]])
    assert_close(got, expected, torch.float64)


def test_sum_without_gradients_and_of_no_tokens(inputs, targets):
    with torch.no_grad():
        got = linear_cross_entropy_sum(**inputs, targets_N=targets, chunk_tokens=16)
    assert_close(got, from_all_logits(**inputs, targets=targets).sum(), torch.float64)
    x = inputs["x_NC"][:0].requires_grad_()
    nothing = linear_cross_entropy_sum(x, inputs["weight_VC"], targets[:0])
    nothing.backward()
    assert nothing == 0
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_sum_under_autocast(inputs, targets):
    x, weight = (inputs[name].float().requires_grad_() for name in ("x_NC", "weight_VC"))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy_sum(x, weight, targets, chunk_tokens=16)
    loss.backward()
    assert loss.dtype == torch.float32
    rounded = {
        "x_NC": x.detach().bfloat16().double().requires_grad_(),
        "weight_VC": weight.detach().bfloat16().double().requires_grad_(),
    }
    expected = from_all_logits(**rounded, targets=targets).sum()
    expected.backward()
    assert_close(loss, expected, torch.bfloat16)
    for got, truth in ((x.grad, rounded["x_NC"].grad), (weight.grad, rounded["weight_VC"].grad)):
        assert got is not None
        assert truth is not None
        assert got.dtype == torch.float32
        assert_close(got, truth, torch.bfloat16)


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [3, 101, 20011])
def test_triton_cross_entropy_in_the_interpreter(vocabulary, dtype):
    from kernels.loss import triton

    torch.manual_seed(0)
    logits = (3 * torch.randn(5, vocabulary)).to(dtype)
    logits[1] -= 100
    targets = torch.randint(vocabulary, (5, 2))[:, 1]  # not contiguous
    targets[3] = -100
    wide = logits.double().requires_grad_()
    expected = F.cross_entropy(wide, targets, reduction="none")
    expected.sum().backward()
    kept = logits.clone()
    assert_close(triton.cross_entropy_(kept, targets, -100, False), expected, torch.float32)
    assert torch.equal(kept, logits)
    assert_close(triton.cross_entropy_(logits, targets, -100, True), expected, torch.float32)
    assert wide.grad is not None
    assert_close(logits, wide.grad, dtype)


@pytest.mark.parametrize("operation", [linear_cross_entropy, linear_cross_entropy_sum])
@pytest.mark.parametrize(
    ("targets", "vocabulary", "sentence"),
    [
        (torch.tensor([1, 7]), 7, "target 7; allowed: 0 to 6, or -100 for none"),
        (torch.tensor([-1, 1]), 7, "target -1; allowed: 0 to 6"),
        (torch.tensor([1, 2]).int(), 7, "targets must be int64, are torch.int32"),
        (torch.tensor([1, 2]), 0, r"with V of at least 1"),
    ],
)
def test_targets_that_are_none_are_refused(operation, targets, vocabulary, sentence):
    with pytest.raises(ValueError, match=f"{operation.__name__}: .*{sentence}"):
        operation(torch.randn(2, 4), torch.randn(vocabulary, 4), targets)
