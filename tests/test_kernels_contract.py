"""Factor contraction against sums of outer products written out in float64.

Shapes: B batch, T tokens, R rank, H heads, D head dimension.
"""

import pytest
import torch

from kernels.contract import contract
from kernels.rope import rotate
from kernels.tolerances import assert_close, assert_matches


def sum_of_outer_products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Eq. 3.1 term by term."""
    R = a.shape[2]
    return torch.stack([a[:, :, r, :, None] * b[:, :, r, None, :] for r in range(R)]).sum(0) / R


def factors(B: int, T: int, R: int, H: int, D: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a": torch.randn(B, T, R, H, dtype=torch.float64),
        "b": torch.randn(B, T, R, D, dtype=torch.float64),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("T", "R", "H"), [(1, 1, 3), (1, 6, 34), (63, 2, 47), (63, 6, 3), (63, 1, 34)])
def test_forward_and_gradients(T, R, H, dtype):
    assert_matches(
        lambda a, b: contract(a, b, backend="plain"), sum_of_outer_products, factors(2, T, R, H, 16), dtype
    )


def test_rotated_factors_give_the_rotated_product():
    """Eq. 3.2: RoPE(Q_t) = (1/R) A_Qᵀ RoPE(B_Q)."""
    inputs = factors(2, 63, 6, 34, 16)
    angles = torch.rand(2, 63, 8, dtype=torch.float64) * 6
    cos, sin = angles.cos(), angles.sin()
    assert_matches(
        lambda a, b: contract(a, b, cos, sin),
        lambda a, b: rotate(sum_of_outer_products(a, b), cos, sin),
        inputs,
        torch.float64,
    )


def test_views_and_learned_factors_shared_by_all_tokens():
    """Non-contextual head factors arrive as an expanded view, others as slices of one projection."""
    projected = torch.randn(2, 7, 2 * (5 + 8), dtype=torch.float64)
    b = projected[..., 10:].unflatten(-1, (2, 8))
    a = torch.randn(2, 5, dtype=torch.float64).expand(2, 7, 2, 5)
    assert_close(contract(a, b), sum_of_outer_products(a, b), torch.float64)


def test_runs_in_autocasts_dtype():
    inputs = {name: tensor.float() for name, tensor in factors(1, 5, 2, 3, 8).items()}
    with torch.autocast("cpu", torch.bfloat16):
        result = contract(**{"a_BTRH": inputs["a"], "b_BTRD": inputs["b"]})
    assert result.dtype == torch.bfloat16
    assert_close(result, sum_of_outer_products(inputs["a"].double(), inputs["b"].double()), torch.bfloat16)


def test_factors_that_do_not_fit_are_refused():
    a, b = torch.randn(1, 4, 2, 3), torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match="agree in B, T and R"):
        contract(a, b[:, :, :1])
    with pytest.raises(ValueError, match="both cos and sin"):
        contract(a, b, cos=torch.ones(4, 4))
