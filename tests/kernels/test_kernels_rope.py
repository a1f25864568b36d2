"""Rotary position embedding: direction, relativity, tables per row of the batch.

Shapes: B batch, T tokens, R ranks, D head dimension.
"""

import pytest
import torch

from kernels.rope import rotate
from kernels.tolerances import assert_matches


def tables(positions: torch.Tensor, D: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (..., D/2) of float64 angles position · 10000^(-2j/D)."""
    angles = positions.double()[..., None] * 10000.0 ** (-2 * torch.arange(D // 2).double() / D)
    return angles.cos(), angles.sin()


def rotate_as_complex(x_BTRD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The same rotation as a product with e^{-i·angle} on x1 + i·x2."""
    D = x_BTRD.shape[-1]
    turned = (
        torch.complex(x_BTRD[..., : D // 2], x_BTRD[..., D // 2 :]) * torch.complex(cos, -sin)[..., None, :]
    )
    return torch.cat((turned.real, turned.imag), -1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("per_row", [False, True], ids=["T", "BT"])
def test_rotates_halves_in_the_references_direction(per_row, dtype):
    B, T, R, D = 2, 63, 3, 10
    positions = torch.randint(0, 4096, (B, T)) if per_row else torch.arange(T)
    cos, sin = tables(positions, D)
    x = torch.randn(B, T, R, D, dtype=torch.float64)
    # Half-precision x is rotated by float32 tables; only x's own rounding counts.
    table_dtype = torch.promote_types(dtype, torch.float32)
    assert_matches(
        lambda x: rotate(x, cos.to(table_dtype), sin.to(table_dtype)),
        lambda x: rotate_as_complex(x, cos, sin),
        {"x": x},
        dtype,
    )


def test_result_keeps_the_dtype_of_x():
    cos, sin = tables(torch.arange(4), 8)
    assert rotate(torch.randn(1, 4, 2, 8, dtype=torch.bfloat16), cos, sin).dtype == torch.bfloat16
    assert rotate(torch.randn(1, 4, 2, 8), cos.bfloat16(), sin.bfloat16()).dtype == torch.float32


def test_relative_identity_of_theorem_3_1():
    """RoPE_{t-s}(Q_t) K_sᵀ = RoPE_t(Q_t) RoPE_s(K_s)ᵀ for every pair of positions, ahead or behind."""
    H, D, n = 3, 64, 200
    t, s = torch.randint(0, 2048, (2, n))
    q, k = torch.randn(2, 1, n, H, D, dtype=torch.float64)
    relative = torch.einsum("btid,btjd->btij", rotate(q, *tables(t - s, D)), k)
    absolute = torch.einsum("btid,btjd->btij", rotate(q, *tables(t, D)), rotate(k, *tables(s, D)))
    torch.testing.assert_close(relative, absolute, rtol=0, atol=1e-10)
    # The logits do depend on the distance: turning by s-t instead must not agree.
    wrong = torch.einsum("btid,btjd->btij", rotate(q, *tables(s - t, D)), k)
    assert (wrong - absolute).abs().max() > 1


@pytest.mark.parametrize(
    ("T", "D", "table_shape"),
    [(4, 8, (1, 4)), (4, 8, (5, 4)), (4, 8, (4, 8)), (4, 8, (3, 4, 4)), (4, 7, (4, 3))],
)
def test_tables_that_would_broadcast_or_not_fit_are_refused(T, D, table_shape):
    x, table = torch.randn(2, T, 1, D), torch.ones(table_shape)
    with pytest.raises(ValueError, match="must both be"):
        rotate(x, table, table)


@pytest.mark.parametrize(
    ("x", "sentence"),
    [
        (torch.ones(2, 4, 1, 8).int(), "x must be of a floating-point dtype, is torch.int32"),
        (torch.ones(2, 4, 8), r"must be \(B, T, R, D\), is \(2, 4, 8\)"),
    ],
)
def test_what_does_not_turn_is_refused(x, sentence):
    with pytest.raises(ValueError, match=f"rotate: .*{sentence}"):
        rotate(x, torch.ones(4, 4), torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"rotate: sin must be of a floating-point dtype, is torch.int64"):
        rotate(torch.ones(2, 4, 1, 8), torch.ones(4, 4), torch.ones(4, 4).long())
