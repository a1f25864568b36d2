"""How close a backend must come to the float64 plain twin: one table and one comparison for every test.

An element may differ by rtol·|truth| + atol·max|truth|. The second part is relative to the tensor's own
scale, because a sum that cancels to near zero keeps the rounding error of its terms.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

Operation = Callable[..., torch.Tensor]


class Tolerance(NamedTuple):
    rtol: float
    atol: float


# A few units in the last place (2^-52, 2^-23, 2^-10, 2^-7) of the working precision. Never loosened to make
# a test pass.
TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(rtol=1e-12, atol=1e-13),
    torch.float32: Tolerance(rtol=1e-5, atol=2e-6),
    torch.float16: Tolerance(rtol=2e-3, atol=2e-3),
    torch.bfloat16: Tolerance(rtol=1.6e-2, atol=1.6e-2),
}


def assert_close(
    got: torch.Tensor,
    truth: torch.Tensor,
    dtype: torch.dtype,
    what: str = "tensor",
    scale: float | None = None,
) -> None:
    """Raises AssertionError unless `got` is within TOLERANCES[dtype] of `truth` (float64, same shape).

    `scale` replaces max|truth| in the tolerance.
    """
    if got.shape != truth.shape:
        raise AssertionError(f"{what}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}")
    if truth.numel() == 0:
        return
    got, truth = got.detach().double(), truth.detach().double()
    tolerance = TOLERANCES[dtype]
    scale = float(truth.abs().max()) if scale is None else scale
    allowed = tolerance.rtol * truth.abs() + tolerance.atol * scale
    excess = (got - truth).abs() - allowed
    # `not <=` rather than `>`: a NaN must fail.
    if not bool((excess <= 0).all()):
        worst = int(excess.nan_to_num(nan=torch.inf).argmax())
        raise AssertionError(
            f"{what}: {got.flatten()[worst].item()!r} should be {truth.flatten()[worst].item()!r}"
            f" within {allowed.flatten()[worst].item():.3g} ({dtype}, flat index {worst})"
        )


def assert_matches(
    operation: Operation, truth: Operation, inputs: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """Forward result and every gradient of `operation` in `dtype` against `truth` in float64.

    Both are called with `inputs` as keyword arguments, rounded to `dtype` first, so that only the
    operation's own error counts. Raises AssertionError naming the tensor that differs.
    """
    rounded = {name: tensor.detach().to(dtype) for name, tensor in inputs.items()}
    got, got_gradients = _with_gradients(operation, rounded)
    expected, expected_gradients = _with_gradients(
        truth, {name: tensor.double() for name, tensor in rounded.items()}
    )
    assert_close(got, expected, dtype, "result")
    scales = [float(gradient.abs().max()) for gradient in expected_gradients]
    largest = max(scales)
    # A gradient that vanishes (of q and k, where there is a single key) has no scale of its own: what is left
    # is the rounding of terms as large as the other gradients.
    scales = [scale if scale > 1e-6 * largest else largest for scale in scales]
    for name, gradient, truth_gradient, scale in zip(
        inputs, got_gradients, expected_gradients, scales, strict=True
    ):
        assert_close(gradient, truth_gradient, dtype, f"gradient of {name}", scale)


def _with_gradients(
    operation: Operation, inputs: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    result = operation(**leaves)
    # The same powers of two on both sides: exact in every dtype, and no two neighbours alike.
    pattern = torch.tensor([1.0, -0.5, 2.0, 0.25, -1.0], device=result.device)
    upstream = pattern.repeat(result.numel() // 5 + 1)[: result.numel()].view(result.shape)
    return result, torch.autograd.grad(result, list(leaves.values()), upstream.to(result.dtype))
