"""The Triton contraction in Triton's interpreter, against the plain one in float64.

Shapes: B batch, T tokens, R rank, H heads, D head dimension, W turned dimensions.
"""

import interpreter
import pytest
import torch

from kernels.contract import contract
from kernels.contract.qkv import Part, contract_qkv
from kernels.tolerances import assert_close, assert_matches

if not interpreter.IS_ON:
    pytest.skip(interpreter.WHY_OFF, allow_module_level=True)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (B, T, R, H, D, W, pairing): odd head counts and lengths, every rank and width that the models have, and more.
CASES = [
    (2, 3, 6, 47, 64, 64, "halves"),
    (1, 1, 2, 34, 64, 64, "halves"),
    (1, 3, 2, 61, 64, 0, "halves"),
    (1, 2, 6, 78, 64, 64, "interleaved"),
    (2, 3, 1, 1, 32, 20, "halves"),
    (1, 2, 17, 5, 40, 12, "interleaved"),
    (1, 2, 2, 130, 128, 128, "halves"),
    (1, 2, 3, 3, 256, 128, "halves"),
]


def factors(B: int, T: int, R: int, H: int, D: int) -> dict[str, torch.Tensor]:
    """Slices of one projection, as the model has them."""
    projected = torch.randn(
        B, T, R * (H + D) + 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    return {
        "a": projected[..., : R * H].unflatten(-1, (R, H)),
        "b": projected[..., R * H : R * (H + D)].unflatten(-1, (R, D)),
    }


def tables(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 6
    return angles.cos(), angles.sin()


def by(backend: str, pairing: str, turn: tuple[torch.Tensor, torch.Tensor] | None):
    def run(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        # Tables are float32 unless everything is float64, as in the model.
        wide = torch.promote_types(a.dtype, torch.float32)
        cos, sin = (None, None) if turn is None else (table.float().to(wide) for table in turn)
        return contract(a, b, cos, sin, pairing=pairing, backend=backend)

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "T", "R", "H", "D", "W", "pairing"), CASES, ids=lambda value: str(value))
def test_forward_and_gradients(B, T, R, H, D, W, pairing, dtype):
    turn = tables(T, W // 2) if W else None
    assert_matches(by("triton", pairing, turn), by("plain", pairing, turn), factors(B, T, R, H, D), dtype)


def test_tables_of_each_row():
    turn = tables(2, 3, 16)
    assert_matches(
        by("triton", "halves", turn), by("plain", "halves", turn), factors(2, 3, 2, 3, 32), torch.float32
    )


def transposed(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return cos.T.contiguous().T, sin.T.contiguous().T


def cosines_beside_sines(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat((cos, sin), -1)[:, : cos.shape[-1]], sin


def as_complex_numbers(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = torch.stack((cos, sin), -1)
    return pairs[..., 0], pairs[..., 1]


@pytest.mark.parametrize("laid_out", [transposed, cosines_beside_sines, as_complex_numbers])
def test_tables_of_any_strides(laid_out):
    cos, sin = tables(5, 16)
    turn = laid_out(cos.float(), sin.float())
    parts = {name: x.float().requires_grad_() for name, x in factors(2, 5, 2, 3, 32).items()}
    record = torch.randn(2, 5, RECORD, requires_grad=True)
    found = {}
    for backend in ("triton", "plain"):
        one = contract(parts["a"], parts["b"], *turn, backend=backend)
        all_of_it = torch.stack(contract_qkv(record, PARTS, turn, turn, backend=backend))
        leaves = [*parts.values(), record]
        gradients = torch.autograd.grad(one.square().sum() + all_of_it.square().sum(), leaves)
        found[backend] = [one, all_of_it, *gradients]
    for got, expected in zip(found["triton"], found["plain"], strict=True):
        assert_close(got, expected.double(), torch.float32)


def test_views_of_factors_and_of_the_gradient():
    parts = factors(2, 3, 2, 5, 32)
    shared = torch.randn(2, 5).expand(2, 3, 2, 5).requires_grad_()
    b = parts["b"].float().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    upstream = torch.randn(2, 5, 3, 32).transpose(1, 2)
    for backend in ("triton", "plain"):
        o = contract(shared, b, backend=backend)
        gradients = torch.autograd.grad(o, (shared, b), upstream)
        if backend == "triton":
            got, got_gradients = o, gradients
    assert_close(got, o.double(), torch.float32)
    for one, other in zip(got_gradients, gradients, strict=True):
        assert_close(one, other.double(), torch.float32)


def test_no_tokens():
    a, b = torch.randn(2, 0, 2, 5, requires_grad=True), torch.randn(2, 0, 2, 32, requires_grad=True)
    o = contract(a, b, backend="triton")
    assert o.shape == (2, 0, 5, 32)
    o.sum().backward()
    assert a.grad is not None
    assert a.grad.shape == a.shape


def test_gradients_of_one_factor_alone():
    parts = {name: x.float() for name, x in factors(1, 3, 2, 5, 32).items()}
    a = parts["a"].detach().requires_grad_()
    [got] = torch.autograd.grad(contract(a, parts["b"], backend="triton").sum(), [a])
    [expected] = torch.autograd.grad(contract(a, parts["b"], backend="plain").sum(), [a])
    assert_close(got, expected.double(), torch.float32)


# Q, K and V of 5 heads in no order, with numbers between them that belong to none.
PARTS = [Part(a=230, b=3, rank=6, heads=5, width=32), Part(200, 270, 2, 5, 32), Part(220, 345, 1, 5, 32)]
RECORD = 390


def qkv(backend: str, turn: tuple[torch.Tensor, torch.Tensor]):
    def run(record: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(record.dtype, torch.float32)
        queries = (turn[0].to(wide), turn[1].to(wide))
        keys = (queries[0] / 2, queries[1] / 3)
        return torch.stack(contract_qkv(record, PARTS, queries, keys, backend=backend))

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "T"), [(2, 3), (3, 1), (1, 1)])
def test_queries_keys_and_values_of_one_record(B, T, dtype):
    record = torch.randn(B, T, RECORD, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    turn = tables(T, 16)
    assert_matches(qkv("triton", turn), qkv("plain", turn), {"record": record}, dtype)


def test_what_belongs_to_no_part_has_no_gradient():
    record = torch.randn(2, 3, RECORD, requires_grad=True)
    qkv("triton", tables(3, 16))(record).sum().backward()
    used = torch.zeros(RECORD, dtype=torch.bool)
    for part in PARTS:
        used[part.a : part.a + part.rank * part.heads] = True
        used[part.b : part.b + part.rank * part.width] = True
    assert record.grad is not None
    assert torch.equal(record.grad.ne(0).any(1).any(0), used)


def test_queries_keys_and_values_are_one_operator_in_a_compiled_graph():
    record = torch.randn(2, 3, RECORD, requires_grad=True)
    step = qkv("triton", tables(3, 16))
    compiled = torch.compile(lambda record: 2 * step(record + 1), backend="aot_eager", fullgraph=True)
    expected, got = 2 * step(record + 1), compiled(record)
    upstream = torch.randn_like(expected)
    assert torch.equal(got, expected)
    [one] = torch.autograd.grad(got, [record], upstream)
    [other] = torch.autograd.grad(expected, [record], upstream)
    assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["auto", "plain", "triton"])
def test_parts_must_fit_the_record(backend):
    overlapping = [PARTS[0], PARTS[1], Part(221, 3, 1, 5, 32)]
    for parts, sentence in ((PARTS[:2], "2 parts; allowed: 3"), (overlapping, "not overlap")):
        with pytest.raises(ValueError, match=sentence):
            contract_qkv(torch.randn(1, 2, RECORD), parts, None, None, backend=backend)
    with pytest.raises(ValueError, match="lie inside it"):
        contract_qkv(torch.randn(1, 2, RECORD - 20), PARTS, None, None, backend=backend)


def test_one_operator_in_a_compiled_graph():
    parts = {name: x.float().requires_grad_() for name, x in factors(1, 3, 2, 5, 32).items()}
    turn = tables(3, 16)

    def step(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return 2 * by("triton", "halves", turn)(a + 1, b)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    inputs = list(parts.values())
    expected, got = step(*inputs), compiled(*inputs)
    upstream = torch.randn_like(expected)
    assert torch.equal(got, expected)
    for one, other in zip(
        torch.autograd.grad(got, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_autocast_decides_the_dtype():
    parts = {name: x.float() for name, x in factors(1, 3, 2, 5, 32).items()}
    with torch.autocast("cpu", torch.bfloat16):
        got = contract(parts["a"], parts["b"].bfloat16(), backend="triton")
    assert got.dtype == torch.bfloat16


def test_what_cannot_run_is_refused_with_the_reason():
    parts = factors(1, 3, 2, 5, 32)
    with pytest.raises(
        ValueError, match="contract: backend 'triton' cannot run here: it computes in float16"
    ):
        contract(**{"a_BTRH": parts["a"], "b_BTRD": parts["b"]}, backend="triton")
    a, b = parts["a"].float(), parts["b"].float()
    with pytest.raises(ValueError, match="even number of features"):
        contract(a, b[..., :31], backend="triton")
    with pytest.raises(ValueError, match="at most 256 features"):
        contract(a, b.repeat(1, 1, 1, 9), backend="triton")
    with pytest.raises(ValueError, match=r"cos \(2, 16\)"):
        contract(a, b, *torch.ones(2, 2, 16), backend="triton")
    with pytest.raises(ValueError, match="unknown pairing"):
        contract(a, b, *torch.ones(2, 3, 16), pairing="thirds", backend="triton")


def of_one_record(record: torch.Tensor) -> torch.Tensor:
    return qkv("triton", tables(record.shape[1], 16))(record)


def of_two_factors(b: torch.Tensor) -> torch.Tensor:
    return contract(torch.ones(2, 3, 2, 5), b, backend="triton")


@pytest.mark.parametrize(("run", "width"), [(of_one_record, (RECORD,)), (of_two_factors, (2, 32))])
def test_second_derivatives_are_refused(run, width):
    x = torch.randn(2, 3, *width, requires_grad=True)
    [once] = torch.autograd.grad(run(x).pow(3).sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match=r"contract.*: by backend 'triton' gradients can be taken once"):
        torch.autograd.grad(once.pow(2).sum(), [x])


@pytest.mark.parametrize(("run", "width"), [(of_one_record, (RECORD,)), (of_two_factors, (2, 32))])
def test_derivatives_in_forward_mode_are_refused(run, width):
    x = torch.randn(2, 3, *width)
    with pytest.raises(ValueError, match="'triton' cannot run here: it has no forward-mode derivatives"):
        torch.func.jvp(run, (x,), (x,))


def test_tables_that_want_a_gradient_are_refused():
    b, table = torch.randn(2, 3, 2, 32), torch.ones(3, 16, requires_grad=True)
    with pytest.raises(ValueError, match="it has no derivatives of cos and sin"):
        contract(torch.ones(2, 3, 2, 5), b, table, table, backend="triton")
    with pytest.raises(ValueError, match="it has no derivatives of cos and sin"):
        contract_qkv(torch.randn(1, 3, RECORD), PARTS, None, (table, table), backend="triton")
