"""Decoding where feature rows are made on the way: further factors c, and a b that turns when it is read.

Shapes: B batch, T query tokens, M cached tokens, H heads, S rank of K, U rank of V; P and X features of the b of K and
of V, C and Y of their c, W turned features; N tokens of a page.
"""

import pytest
import torch
from interpreter import needs_interpreter

from kernels.contract import outer
from kernels.decode import decode
from kernels.rope import rotate
from kernels.tolerances import assert_close

BACKENDS = ["plain", "sdpa", pytest.param("triton", marks=needs_interpreter)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
Inputs = dict[str, torch.Tensor]


def cache(B, T, M, H, S, U, K, V, dtype=torch.float16) -> Inputs:
    """K = (P, C) and V = (X, Y); C and Y may be missing."""
    torch.manual_seed(0)
    shapes = {"q_BTHD": (B, T, H, torch.Size(K).numel()), "a_k_BMSH": (B, M, S, H), "a_v_BMUH": (B, M, U, H)}
    shapes |= {"b_k_BMSD": (B, M, S, K[0]), "b_v_BMUE": (B, M, U, V[0])}
    if len(K) > 1:
        shapes |= {"c_k": (B, M, S, K[1]), "c_v": (B, M, U, V[1])}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def turn(W: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.randn(*shape, W // 2, generator=torch.Generator().manual_seed(1))
    return angles.cos(), angles.sin()


def truth(inputs: Inputs, lengths: torch.Tensor | None, tables=None, pairing="halves") -> torch.Tensor:
    """Over rows made in memory, in float64."""
    wide = {name: x.double() for name, x in inputs.items()}
    c_k, c_v = wide.pop("c_k", None), wide.pop("c_v", None)
    if tables is not None:
        wide["b_k_BMSD"] = rotate(wide["b_k_BMSD"], *(x.double() for x in tables), pairing)
    if c_k is not None and c_v is not None:
        wide["b_k_BMSD"] = outer((wide["b_k_BMSD"], c_k))
        wide["b_v_BMUE"] = outer((wide["b_v_BMUE"], c_v))
    return decode(**wide, scale=0.3, lengths=lengths, backend="plain")


def check(inputs: Inputs, lengths: torch.Tensor | None, backend: str, tables=None, pairing="halves") -> None:
    got = decode(**inputs, scale=0.3, lengths=lengths, turn=tables, pairing=pairing, backend=backend)
    assert_close(got, truth(inputs, lengths, tables, pairing), inputs["q_BTHD"].dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("T", "M", "H", "S", "U", "K", "V"),
    [
        (1, 70, 47, 2, 1, (8, 8), (8, 8)),
        (3, 40, 5, 1, 3, (16, 4), (4, 8)),
        (1, 33, 78, 2, 2, (12, 8), (6, 4)),
        (1, 65, 3, 1, 1, (2, 4), (4, 5)),
    ],
)
def test_order_3(T, M, H, S, U, K, V, dtype, backend):
    """Sizes that are powers of 2, and that are not; fewer features than a matrix product is wide."""
    check(cache(2, T, M, H, S, U, K, V, dtype), torch.tensor([M, M // 2]), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pairing", ["halves", "interleaved"])
@pytest.mark.parametrize(
    ("K", "W", "rows"), [((32,), 32, ()), ((24,), 12, (2,)), ((16, 4), 16, (2,)), ((12, 4), 4, ())], ids=str
)
def test_a_b_of_k_that_turns_when_it_is_read(K, W, rows, pairing, dtype, backend):
    """All of it or the first features alone, by one table for all rows or one for each."""
    check(cache(2, 1, 50, 5, 2, 1, K, K, dtype), torch.tensor([50, 33]), backend, turn(W, *rows, 50), pairing)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_lengths_and_with_several_queries(backend):
    check(cache(2, 3, 40, 6, 2, 2, (8, 4), (8, 4)), None, backend, turn(8, 40))


@pytest.mark.parametrize("backend", BACKENDS)
def test_tables_that_lie_differently_in_memory(backend):
    cos, sin = turn(8, 40)
    check(cache(2, 1, 40, 5, 1, 1, (32,), (32,)), None, backend, (cos, torch.cat((sin, sin), -1)[:, :4]))
    check(cache(2, 1, 40, 5, 1, 1, (32,), (32,)), None, backend, (cos.T.contiguous().T, sin))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("K", [(32,), (8, 4)], ids=str)
def test_new_factors_of_a_shared_b_are_written_once(K, backend):
    """b_v is the memory of b_k, and the new token's b comes as K's alone."""
    inputs, tables, lengths = cache(2, 2, 70, 5, 2, 2, K, K), turn(8, 70), torch.tensor([70, 33])
    inputs["b_v_BMUE"] = inputs["b_k_BMSD"]
    names = ["a_k_BMSH", "b_k_BMSD", "a_v_BMUH", "b_v_BMUE", "c_k", "c_v"][: 4 if len(K) == 1 else 6]
    new = {name: torch.randn(2, 2, *inputs[name].shape[2:]).half() for name in names}
    expected = {name: x.clone() for name, x in inputs.items()}
    for row, length in enumerate(lengths.tolist()):
        for name in names:
            if name != "b_v_BMUE":
                expected[name][row, length - 2 : length] = new[name][row]
    expected["b_v_BMUE"] = expected["b_k_BMSD"]
    new["b_v_BMUE"] = None
    got = decode(**inputs, scale=0.3, lengths=lengths, turn=tables, new=tuple(new.values()), backend=backend)
    for name, x in inputs.items():
        assert torch.equal(x, expected[name]), name
    assert_close(got, truth(expected, lengths, tables), torch.float16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages(backend):
    B, n, N = 2, 2, 64
    inputs, tables, lengths = (
        cache(B, 1, n * N, 5, 2, 1, (8, 4), (8, 4)),
        turn(8, n * N),
        torch.tensor([100, 64]),
    )
    pages = torch.randperm(5)[: B * n].view(B, n)
    paged = {"q_BTHD": inputs["q_BTHD"]}
    for name, x in list(inputs.items())[1:]:
        paged[name] = torch.randn(5, N, *x.shape[2:]).to(x.dtype)
        paged[name][pages] = x.unflatten(1, (n, N))
    got = decode(**paged, scale=0.3, lengths=lengths, pages=pages, turn=tables, backend=backend)
    assert_close(got, truth(inputs, lengths, tables), torch.float16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_are_expanded(backend):
    """Stride 0 over rows and tokens: b of K, turned by each token's position, and c of both."""
    inputs, tables = cache(2, 1, 50, 5, 2, 2, (8, 4), (8, 4)), turn(8, 50)
    for name in ("b_k_BMSD", "c_k", "c_v"):
        inputs[name] = inputs[name][0, 0].expand(2, 50, -1, -1)
    check(inputs, torch.tensor([50, 33]), backend, tables)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("T", "H", "R", "K", "W"),
    [
        (1, 47, 2, (8, 8), 0),
        (1, 64, 4, (16, 8), 0),
        (4, 34, 1, (16, 4), 16),
        (1, 78, 2, (12, 8), 0),
        (1, 47, 2, (64,), 64),
        (16, 5, 6, (64,), 32),
        (1, 16, 2, (16, 16), 8),
    ],
    ids=str,
)
def test_rows_made_on_a_gpu(T, H, R, K, W, dtype):
    """Within the tolerance, in a graph, and with nothing of the rows' size in memory."""
    M, lengths = 700, torch.tensor([700, 21, 333], device="cuda")
    inputs = {name: x.cuda() for name, x in cache(3, T, M, H, R, R, K, K, dtype).items()}
    tables = tuple(x.cuda() for x in turn(W, M)) if W else None
    for pairing in ("halves", "interleaved") if W else ("halves",):
        check(inputs, lengths, "triton", tables, pairing)

    def call() -> torch.Tensor:
        return decode(**inputs, scale=0.3, lengths=lengths, turn=tables, backend="triton")

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    lengths.copy_(torch.tensor([16, 500, 699]))
    graph.replay()
    assert_close(got, truth(inputs, lengths, tables), dtype)


def test_what_does_not_fit_is_refused():
    inputs = cache(2, 1, 9, 3, 2, 2, (8, 4), (8, 4))

    def refused(match: str, **changes) -> None:
        with pytest.raises(ValueError, match=match):
            decode(**{**inputs, "scale": 1.0, **changes})

    refused("c_k, c_v are .* must be .*S, D/C", c_k=inputs["c_k"][..., :3])
    refused("c_k, c_v are", c_v=inputs["c_v"][:, :8])
    refused("give both c_k and c_v", c_v=None)
    refused(r"decode: cos .* must both be .* for \(B, T, R, D\) = \(2, 9, 2, 8\)", turn=turn(10, 9))
    refused("must both be", turn=turn(8, 8))
    refused("unknown pairing 'thirds'", turn=turn(8, 9), pairing="thirds")
    refused("unknown pairing 'thirds'", pairing="thirds")
    refused("new factors must be 6, None for each that is no cache, are 4", new=(None,) * 4)
