"""Factor contraction against sums of outer products written out in float64.

Shapes: B batch, T tokens, R rank, H heads, D head dimension.
"""

import pytest
import torch

from kernels.contract import contract
from kernels.contract.qkv import Part, contract_qkv
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
    with pytest.raises(ValueError, match="contract: unknown pairing 'foo'; allowed: halves, interleaved"):
        contract(a, b, pairing="foo")


@pytest.mark.parametrize(
    ("a", "b", "sentence"),
    [
        ((2, 3, 0, 4), (2, 3, 0, 8), "of at least one rank"),
        ((3, 2, 4), (3, 2, 8), r"must be \(B, T, R, H\) and \(B, T, R, D\)"),
        ((2, 3, 2, 4), (2, 3, 2, 8, 1), r"must be \(B, T, R, H\) and \(B, T, R, D\)"),
    ],
)
def test_factors_of_other_dimensions_or_without_a_rank_are_refused(a, b, sentence):
    with pytest.raises(ValueError, match=f"contract: .*{sentence}"):
        contract(torch.randn(a), torch.randn(b))


def test_factors_of_two_dtypes_give_the_wider_and_integers_are_refused():
    a, b = torch.randn(2, 3, 2, 4).half(), torch.randn(2, 3, 2, 8)
    assert torch.equal(contract(a, b), contract(a.float(), b))
    assert contract(a.double(), b).dtype == torch.float64
    with pytest.raises(ValueError, match=r"contract: a must be of a floating-point dtype, is torch.int64"):
        contract(a.long(), b)


@pytest.mark.parametrize(
    ("record", "changes", "tables", "sentence"),
    [
        (torch.zeros(3, 50), {}, None, r"the record must be \(B, T, N\), is \(3, 50\)"),
        (torch.zeros(2, 3, 50).long(), {}, None, "the record must be of a floating-point dtype"),
        (torch.zeros(2, 3, 50), {"rank": 0}, None, "rank, heads and width of at least 1"),
        (torch.zeros(2, 3, 50), {"rank": -2}, None, "rank, heads and width of at least 1"),
        (torch.zeros(2, 3, 50), {}, (torch.ones(3, 2), None), "give both cos and sin of queries"),
    ],
)
def test_records_and_parts_that_do_not_fit_are_refused(record, changes, tables, sentence):
    parts = [Part(0, 8, 2, 4, 8)._replace(**changes), Part(24, 28, 1, 4, 8), Part(36, 40, 1, 4, 8)]
    with pytest.raises(ValueError, match=f"contract_qkv: .*{sentence}"):
        contract_qkv(record, parts, tables, None)


def test_an_unknown_pairing_is_refused_where_nothing_turns_too():
    parts = [Part(0, 8, 2, 4, 8), Part(24, 28, 1, 4, 8), Part(36, 40, 1, 4, 8)]
    with pytest.raises(ValueError, match="contract_qkv: unknown pairing 'foo'; allowed: halves, interleaved"):
        contract_qkv(torch.zeros(2, 3, 50), parts, None, None, pairing="foo")
