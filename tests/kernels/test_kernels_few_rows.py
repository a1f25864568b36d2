"""Kernels of decoding around attention in Triton's interpreter, against their plain twins in float64.

Shapes: B rows, K inputs, N outputs; T tokens, H heads, D head dimension, R rank of Q, S rank of K.
"""

import interpreter
import pytest
import torch
from torch.autograd import forward_ad

from kernels.factors import query_and_key
from kernels.linear import linear
from kernels.tolerances import assert_close

if not interpreter.IS_ON:
    pytest.skip(interpreter.WHY_OFF, allow_module_level=True)

HALVES = [torch.float16, torch.bfloat16]


def random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("backend", ["auto", "triton", "plain"])
@pytest.mark.parametrize(
    "shapes", [((4, 8), (5, 6), None), ((4, 8), (5, 8), (5,)), ((4, 8), (5, 8), (1, 5))], ids=str
)
def test_shapes_that_do_not_fit_are_refused(shapes, backend):
    x, weight = (random(torch.float16, *shape) for shape in shapes[:2])
    residual = None if shapes[2] is None else random(torch.float16, *shapes[2])
    with pytest.raises(ValueError, match=r"x \(4, 8\), weight .* allowed: x \(..., K\)"):
        linear(x, weight, residual=residual, backend=backend)


def test_one_row_and_rows_that_lie_across():
    weight = random(torch.float16, 5, 8)
    got = linear(random(torch.float16, 8), weight, backend="triton")
    assert_close(got, linear(random(torch.float16, 8).double(), weight.double()), torch.float16)
    across = random(torch.float16, 8, 4).t()
    with pytest.raises(ValueError, match="side by side"):
        linear(across, weight, backend="triton")
    assert linear(across, weight).shape == (4, 5)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("B", "K", "N"), [(1, 8, 8), (16, 600, 37), (17, 1025, 21), (3, 64, 130)])
@pytest.mark.parametrize(
    "around", [(), ("gate", "norm"), ("residual",), ("gate", "norm", "residual")], ids=str
)
def test_linear(B, K, N, around, dtype):
    x, weight = random(dtype, B, K), random(dtype, N, K) / K**0.5
    rest = {
        "gate_NK": random(dtype, N, K).flip(0) / K**0.5 if "gate" in around else None,
        "residual": random(dtype, B, N + 5)[:, :N] if "residual" in around else None,
    }
    eps = 1e-5 if "norm" in around else None
    got = linear(x, weight, **rest, norm_eps=eps, backend="triton")
    wide = {name: None if part is None else part.double() for name, part in rest.items()}
    truth = linear(x.double(), weight.double(), **wide, norm_eps=eps, backend="plain")
    assert_close(got, truth, dtype)


def test_linear_takes_what_it_returned():
    """Rows of the result may be padded."""
    x = random(torch.float16, 2, 3, 40)
    hidden = linear(x, random(torch.float16, 21, 40) / 7, backend="triton")
    assert hidden.shape == (2, 3, 21)
    weight = random(torch.float16, 9, 21) / 5
    got = linear(hidden, weight, backend="triton")
    assert_close(got, linear(hidden.double(), weight.double(), backend="plain"), torch.float16)


def test_one_input_or_output_of_any_stride():
    """The stride of a dimension of one says nothing."""
    x, weight, residual = (
        random(torch.float16, 3, 2)[:, :1],
        random(torch.float16, 1, 1),
        random(torch.float16, 3, 2),
    )
    x, residual = x.as_strided((3, 1), (2, 2)), residual.as_strided((3, 1), (2, 2))
    got = linear(x, weight, residual=residual, backend="triton")
    truth = linear(x.double(), weight.double(), residual=residual.double(), backend="plain")
    assert_close(got, truth, torch.float16)


def test_query_of_one_head_of_any_stride():
    a_q = random(torch.float16, 2, 3, 2, 1).as_strided((2, 3, 2, 1), (6, 2, 1, 2))
    b_q, b_k = random(torch.float16, 2, 3, 2, 8), random(torch.float16, 2, 3, 1, 8)
    turn = (torch.ones(2, 3, 4), torch.zeros(2, 3, 4))
    got = query_and_key(a_q, b_q, b_k, turn, turn, backend="triton")
    truth = query_and_key(a_q.double(), b_q.double(), b_k.double(), turn, turn, backend="plain")
    for one, other in zip(got, truth, strict=True):
        assert_close(one, other, torch.float16)


def test_what_linear_cannot_run_is_refused_with_the_reason():
    x, weight = random(torch.float16, 2, 16), random(torch.float16, 8, 16)

    def refused(reason: str, x=x, weight=weight) -> None:
        with pytest.raises(ValueError, match=f"backend 'triton' cannot run here: {reason}"):
            linear(x, weight, backend="triton")

    refused("it takes at most 32 rows", x=random(torch.float16, 33, 16))
    refused("everything must be float16", x=x.float())
    refused("it has no backward pass", weight=weight.clone().requires_grad_())
    with forward_ad.dual_level():
        refused("it has no forward-mode derivatives", x=forward_ad.make_dual(x, x))
    refused("weights must be contiguous", weight=random(torch.float16, 16, 8).T)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("pairing", ["halves", "interleaved"])
@pytest.mark.parametrize(("B", "T", "H", "D", "R", "S"), [(2, 1, 47, 64, 6, 2), (1, 3, 5, 24, 1, 3)])
def test_query_and_key(B, T, H, D, R, S, pairing, dtype):
    merged = random(dtype, B, T, R * (H + D) + S * D)
    a_q, b_q, b_k = merged.split([R * H, R * D, S * D], dim=-1)
    inputs = (a_q.unflatten(-1, (R, H)), b_q.unflatten(-1, (R, D)), b_k.unflatten(-1, (S, D)))
    angles = random(torch.float64, 2, B, T, D // 2)
    queries, keys = ((angle.cos().float(), angle.sin().float()) for angle in angles)
    got = query_and_key(*inputs, queries, keys, pairing=pairing, backend="triton")
    truth = query_and_key(*(x.double() for x in inputs), queries, keys, pairing=pairing, backend="plain")
    for name, one, other in zip(("query", "key"), got, truth, strict=True):
        assert_close(one, other, dtype, name)


@pytest.mark.parametrize("backend", ["plain", "triton"])
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"a_q_BTRH": torch.randn(2, 3, 4, 5)},
            r"a_q \(2, 3, 4, 5\), b_q \(2, 3, 2, 8\), .*; allowed: \(B, T, R",
        ),
        ({"a_q_BTRH": torch.randn(3, 2, 5)}, r"a_q \(3, 2, 5\)"),
        ({"b_q_BTRD": torch.randn(2, 4, 2, 8)}, r"b_q \(2, 4, 2, 8\)"),
        ({"b_k_BTSD": torch.randn(1, 3, 2, 8)}, r"b_k \(1, 3, 2, 8\)"),
        ({"b_k_BTSD": torch.randn(2, 3, 2, 6)}, r"b_k \(2, 3, 2, 6\)"),
        ({"b_k_BTSD": torch.randn(2, 3, 0, 8)}, r"b_k \(2, 3, 0, 8\)"),
        ({"b_k_BTSD": torch.ones(2, 3, 2, 8).int()}, "b_k must be of a floating-point dtype, is torch.int32"),
        ({"pairing": "foo"}, "unknown pairing 'foo'; allowed: halves, interleaved"),
        ({"queries": None}, "give both cos and sin of queries"),
        ({"keys": (None, None)}, "give both cos and sin of keys"),
        ({"keys": (torch.ones(2, 4), torch.ones(2, 4))}, r"cos \(2, 4\) and sin \(2, 4\) must both be"),
    ],
)
def test_factors_and_tables_that_do_not_fit_are_refused(changes, sentence, backend):
    turn = (torch.ones(2, 3, 4), torch.ones(2, 3, 4))
    fitting = {
        "a_q_BTRH": torch.randn(2, 3, 2, 5),
        "b_q_BTRD": torch.randn(2, 3, 2, 8),
        "b_k_BTSD": torch.randn(2, 3, 1, 8),
        "queries": turn,
        "keys": turn,
    }
    query_and_key(**fitting, backend=backend)
    with pytest.raises(ValueError, match=f"query_and_key: .*{sentence}"):
        query_and_key(**{**fitting, **changes}, backend=backend)


@pytest.mark.parametrize("backend", ["plain", "triton"])
def test_no_rows_give_no_rows(backend):
    x, weight = torch.randn(0, 8).half(), torch.randn(5, 8).half()
    assert linear(x, weight, residual=torch.randn(0, 5).half(), backend=backend).shape == (0, 5)


@pytest.mark.parametrize(
    ("weight", "eps", "sentence"),
    [
        (torch.randn(5, 8), None, "no backend can run this .*plain: x, weight and gate must be of one dtype"),
        (torch.ones(5, 8).long(), None, "weight must be of a floating-point dtype, is torch.int64"),
        (torch.randn(0, 8).half(), None, r"allowed: x \(..., K\)"),
        (torch.randn(5, 8).half(), -1.0, "norm_eps must be 0 or above, got -1.0"),
    ],
)
def test_layers_that_do_not_fit_are_refused(weight, eps, sentence):
    with pytest.raises(ValueError, match=f"linear: .*{sentence}"):
        linear(torch.randn(3, 8).half(), weight, norm_eps=eps)
