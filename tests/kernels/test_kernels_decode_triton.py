"""The Triton decode kernel in Triton's interpreter, against the plain twin in float64.

Shapes: B batch, T query tokens, M cached tokens, H heads, D head dimension, E value dimension, S rank of K,
U rank of V; P pages, N tokens of a page.
"""

import interpreter
import pytest
import torch
from torch.autograd import forward_ad

from kernels.decode import decode, layout, visible
from kernels.decode.launch import Launch, even_programs
from kernels.tolerances import assert_close

if not interpreter.IS_ON:
    pytest.skip(interpreter.WHY_OFF, allow_module_level=True)

kernel = pytest.importorskip("kernels.decode.triton")
triton = pytest.importorskip("triton")
tl = triton.language

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def cache(B, T, M, H, S, U, D=32, E=32, dtype=torch.float16) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {
        "q_BTHD": (B, T, H, D),
        "a_k_BMSH": (B, M, S, H),
        "b_k_BMSD": (B, M, S, D),
        "a_v_BMUH": (B, M, U, H),
        "b_v_BMUE": (B, M, U, E),
    }
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def appended(B, T, H, S, U, D=32) -> tuple[torch.Tensor, ...]:
    """The factors of the queries' own tokens, as slices of one projection."""
    widths = [S * H, S * D, U * H, U * D]
    parts = torch.randn(B, T, sum(widths)).half().split(widths, dim=-1)
    return tuple(part.unflatten(-1, (n, -1)) for part, n in zip(parts, (S, S, U, U), strict=True))


def truth(inputs: dict[str, torch.Tensor], lengths: torch.Tensor | None = None) -> torch.Tensor:
    T, M = inputs["q_BTHD"].shape[1], inputs["b_k_BMSD"].shape[1]
    mask = None if lengths is None else visible(lengths, T, M)
    wide = {name: x.double() for name, x in inputs.items()}
    return decode(**wide, scale=0.3, mask=mask, backend="plain")


def check(inputs: dict[str, torch.Tensor], lengths: torch.Tensor | None = None) -> None:
    got = decode(**inputs, scale=0.3, lengths=lengths, backend="triton")
    assert_close(got, truth(inputs, lengths), inputs["q_BTHD"].dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("M", "H", "S", "U", "D", "E"),
    [
        (1, 3, 1, 1, 32, 32),
        (63, 34, 2, 1, 64, 32),
        (130, 47, 1, 3, 32, 80),
        (70, 61, 2, 2, 16, 16),
        (65, 78, 3, 2, 32, 32),
        (33, 130, 1, 1, 32, 256),
    ],
)
def test_one_query_token(M, H, S, U, D, E, dtype):
    check(cache(2, 1, M, H, S, U, D, E, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "H"), [(1, 34), (2, 5), (3, 47), (16, 3)])
def test_lengths_with_a_causal_tail(T, H, dtype):
    """An empty row, one shorter than its queries, whose first ones see nothing, and a full one."""
    check(cache(3, T, 100, H, 2, 1, dtype=dtype), torch.tensor([0, 2, 100]))


def test_more_rows_than_programs_and_than_one_block_of_lengths():
    lengths = torch.arange(40) * 5 % 23
    check(cache(40, 1, 23, 2, 1, 1), lengths)


@pytest.mark.parametrize("pause_bytes", [1, 10_000, 10_000_000])
@pytest.mark.parametrize("n_rows", [3, 5, 40])
def test_rows_of_any_lengths_whatever_it_costs_to_begin_one(monkeypatch, n_rows, pause_bytes):
    """From no time at all to more than reading them all: programs that have nothing, and rows that are empty."""
    monkeypatch.setattr(kernel, "PAUSE_BYTES", pause_bytes)
    inputs = cache(n_rows, 1, 90, 3, 1, 2)
    for seed in range(3 if n_rows < 40 else 1):
        torch.manual_seed(seed)
        lengths = torch.randint(0, 91, (n_rows,)) * (torch.rand(n_rows) < 0.7)
        check(inputs, lengths)


@pytest.mark.parametrize("n_rows", [1, 2, 33])
def test_rows_of_one_length_with_programs_of_their_own(monkeypatch, n_rows):
    """As many programs to each row; one row longer by a token; rows that end within a grain; empty ones."""
    monkeypatch.setattr(kernel, "INTERPRETED_PROGRAMS", 2 * n_rows)
    inputs = cache(n_rows, 1, 300, 3, 1, 2)
    check(inputs)
    for length in (299, 257, 0):
        check(inputs, torch.full((n_rows,), length))
    check(inputs, torch.full((n_rows,), 256) + (torch.arange(n_rows) == n_rows - 1))


def test_programs_are_a_multiple_of_the_rows_where_that_is_cheap():
    counts = {rows: even_programs(132, rows, 64) for rows in (1, 2, 3, 16, 32, 64, 100, 1000)}
    assert counts == {1: 128, 2: 128, 3: 132, 16: 128, 32: 128, 64: 128, 100: 132, 1000: 132}
    assert even_programs(132, 16, 128) == 132


def test_without_lengths_every_query_sees_all():
    check(cache(2, 3, 40, 6, 1, 1))


def test_queries_that_are_not_contiguous():
    inputs = cache(2, 4, 40, 6, 1, 1)
    inputs["q_BTHD"] = inputs["q_BTHD"].transpose(1, 2).contiguous().transpose(1, 2)
    check(inputs)


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize(("H", "E"), [(1, 32), (1, 1), (5, 1)])
def test_one_head_or_feature_of_any_stride(H, E, new):
    """The stride of a dimension of one says nothing."""
    inputs = cache(2, 1, 9, H, 2, 2, E=E)
    for name, x in inputs.items():
        if x.shape[-1] == 1 and name != "q_BTHD":
            inputs[name] = x.as_strided(x.shape, (*x.stride()[:3], 2))
    if new:
        part = [torch.ones(2, 1, *x.shape[2:]).half() for name, x in inputs.items() if name != "q_BTHD"]
        decode(**inputs, scale=0.3, new=tuple(part), backend="triton")
        assert all((x[:, -1] == 1).all() for name, x in inputs.items() if name != "q_BTHD")
        assert not any((x[:, :-1] == 1).all() for name, x in inputs.items() if name != "q_BTHD")
    check(inputs, torch.tensor([4, 9]))


def test_lengths_that_are_not_contiguous():
    inputs = cache(3, 2, 90, 5, 2, 1)
    check(inputs, torch.tensor(41).expand(3))
    check(inputs, torch.tensor([[40, 90], [50, 3], [60, 2]])[:, 0])


@triton.jit(do_not_specialize=["n_rows", "capacity"])
def note_share(shares, n_rows, capacity, GRAIN: tl.constexpr, LEAST: tl.constexpr, ROWS: tl.constexpr):
    begin, end, _, _, _ = kernel.share(shares, n_rows, capacity, False, GRAIN, 0, LEAST, ROWS)
    tl.store(shares + 2 * tl.program_id(0), begin)
    tl.store(shares + 2 * tl.program_id(0) + 1, end)


@pytest.mark.parametrize("programs", [132, 264])
def test_more_tokens_than_32_bits_can_divide(programs):
    """Each program's share follows the one before it, and together they are all there is."""
    n_rows, tokens = 32, 2**24
    shares = torch.full((programs, 2), -1, dtype=torch.int32)
    note_share[(programs,)](shares, n_rows, tokens, GRAIN=16, LEAST=64, ROWS=kernel.ROWS)
    grains = n_rows * tokens // 16
    assert grains * programs > 2**31
    assert shares[0, 0] == 0
    assert shares[-1, 1] == grains
    assert torch.equal(shares[1:, 0], shares[:-1, 1])
    sizes = shares[:, 1] - shares[:, 0]
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("side", ["a", "b"])
def test_non_contextual_factors_are_expanded_parameters(side):
    """Stride 0 over rows and tokens."""
    inputs = cache(2, 1, 90, 5, 2, 2)
    for name in [name for name in inputs if name.startswith(side)]:
        inputs[name] = inputs[name][0, 0].expand(2, 90, -1, -1)
    check(inputs, torch.tensor([90, 41]))


def test_part_of_a_larger_cache():
    """What the model's cache returns: the tokens so far of every row, with the strides of the whole."""
    inputs = cache(3, 1, 128, 6, 2, 1)
    sliced = {name: x if name == "q_BTHD" else x[:, :77] for name, x in inputs.items()}
    check(sliced, torch.tensor([77, 3, 60]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("H", [34, 47, 78])
def test_records(H, dtype):
    D, S, U, size = 32, 2, 1, dtype.itemsize
    inputs = cache(2, 1, 90, H, S, U, dtype=dtype)
    width = layout.record_width(H, D, D, S, U, size)
    assert width * size % 16 == 0
    assert width <= 1.06 * ((S + U) * (H + D)) + 16 // size
    records = torch.zeros(2, 90, width, dtype=dtype)
    views = layout.views(records, H, D, D, S, U)._asdict()
    for name, view in views.items():
        view.copy_(inputs[name])
    check({"q_BTHD": inputs["q_BTHD"], **views}, torch.tensor([90, 33]))
    with pytest.raises(ValueError, match="elements, these sizes take"):
        layout.views(records[..., :-1], H, D, D, S, U)


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_pages(backend):
    B, n, N = 2, 3, 64
    inputs = cache(B, 2, n * N, 5, 2, 1)
    pages = torch.randperm(7)[: B * n].view(B, n)
    paged = {"q_BTHD": inputs["q_BTHD"]}
    for name, x in list(inputs.items())[1:]:
        paged[name] = torch.randn(7, N, *x.shape[2:]).to(x.dtype)
        paged[name][pages] = x.unflatten(1, (n, N))
    lengths = torch.tensor([150, 64])
    for table in (pages, pages.T.contiguous().T):
        got = decode(**paged, scale=0.3, lengths=lengths, pages=table, backend=backend)
        assert_close(got, truth(inputs, lengths), torch.float16)


@pytest.mark.parametrize(
    ("T", "M", "H", "S", "U", "lengths"),
    [
        (1, 100, 34, 2, 2, [100, 37]),
        (3, 100, 47, 2, 1, [100, 3]),
        (16, 130, 5, 3, 2, [129, 70]),
        (1, 70, 130, 1, 1, [65, 1]),
        (2, 40, 5, 1, 1, None),
    ],
)
def test_new_factors_are_appended_first(T, M, H, S, U, lengths):
    """In the cache afterwards bit for bit, and nothing else is touched."""
    inputs, new = cache(2, T, M, H, S, U), appended(2, T, H, S, U)
    lengths = None if lengths is None else torch.tensor(lengths)
    kept = {name: x.clone() for name, x in inputs.items()}
    decode(**kept, scale=0.3, lengths=lengths, new=new, backend="plain")
    got = decode(**inputs, scale=0.3, lengths=lengths, new=new, backend="triton")
    for name, x in inputs.items():
        assert torch.equal(x, kept[name]), name
    assert_close(got, truth(kept, lengths), torch.float16)


def test_new_factors_go_into_pages():
    B, n, N = 2, 2, 64
    inputs, new = cache(B, 2, n * N, 5, 2, 1), appended(B, 2, 5, 2, 1)
    pages = torch.randperm(5)[: B * n].view(B, n)
    paged = {"q_BTHD": inputs["q_BTHD"]}
    for name, x in list(inputs.items())[1:]:
        paged[name] = torch.randn(5, N, *x.shape[2:]).to(x.dtype)
        paged[name][pages] = x.unflatten(1, (n, N))
    lengths = torch.tensor([65, 128])
    got = decode(**paged, scale=0.3, lengths=lengths, pages=pages, new=new, backend="triton")
    decode(**inputs, scale=0.3, lengths=lengths, new=new, backend="plain")
    assert_close(got, truth(inputs, lengths), torch.float16)
    for name, x in list(inputs.items())[1:]:
        assert torch.equal(paged[name][pages].flatten(1, 2), x), name


def test_parameters_are_not_appended_to():
    inputs, new = cache(2, 1, 90, 5, 2, 2), appended(2, 1, 5, 2, 2)
    for name in ("a_k_BMSH", "a_v_BMUH"):
        inputs[name] = inputs[name][0, 0].expand(2, 90, -1, -1)
    new, lengths = (None, new[1], None, new[3]), torch.tensor([90, 41])
    got = decode(**inputs, scale=0.3, lengths=lengths, new=new, backend="triton")
    assert torch.equal(inputs["b_k_BMSD"][1, 40], new[1][1, 0])
    assert_close(got, truth(inputs, lengths), torch.float16)


def test_new_factors_of_a_wrong_shape_are_refused():
    new = appended(2, 1, 5, 2, 2)
    with pytest.raises(ValueError, match=r"new factors must be \(2, 1, 2, 5\), are \(2, 1, 2, 32\)"):
        decode(**cache(2, 1, 9, 5, 2, 2), scale=0.3, new=(new[1], *new[1:]))


def test_wide_keys_and_values_of_a_latent():
    """MLA absorbed is TPA of rank 1 whose head factors are ones."""
    inputs = cache(2, 1, 70, 5, 1, 1, D=288, E=264)
    for name in ("a_k_BMSH", "a_v_BMUH"):
        inputs[name] = torch.ones(5, dtype=torch.float16).expand(2, 70, 1, -1)
    check(inputs, torch.tensor([70, 41]))


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_merge_survives_log_sum_exps_far_apart(order):
    """Segments whose log-sum-exps lie up to 10,000 apart: the largest decides, and nothing becomes NaN."""
    M = 320
    inputs = cache(1, 1, M, 3, 1, 1, dtype=torch.float32)
    inputs["q_BTHD"].fill_(1.0)
    inputs["a_k_BMSH"].fill_(1.0)
    height = torch.linspace(-5000, 5000, M) * (1 if order == "ascending" else -1)
    inputs["b_k_BMSD"] = (height / 32).view(1, M, 1, 1).expand(1, M, 1, 32).contiguous()
    got = decode(**inputs, scale=1.0, backend="triton")
    wide = {name: x.double() for name, x in inputs.items()}
    assert_close(got, decode(**wide, scale=1.0, backend="plain"), torch.float32)


def test_equal_bits_between_runs():
    inputs, lengths = cache(3, 2, 100, 6, 2, 2), torch.tensor([100, 9, 80])
    first, second = (decode(**inputs, scale=0.3, lengths=lengths, backend="triton") for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("tile", [32, 128])
def test_both_orientations_of_the_products(tile, heads_first):
    inputs, lengths = cache(2, 3, 140, 5, 2, 2), torch.tensor([140, 31])
    launch = Launch(tile, warps=4, stages=2, programs=2, heads_first=heads_first)
    q, *factors = inputs.values()
    got = kernel.decode(q, *factors, 0.3, lengths, launch=launch)
    assert_close(got, truth(inputs, lengths), torch.float16)


def test_what_it_cannot_run_is_refused_with_the_reason():
    inputs = cache(2, 1, 9, 3, 2, 1)

    def refused(reason: str, **changes) -> None:
        with pytest.raises(ValueError, match=f"backend 'triton' cannot run here: {reason}"):
            decode(**{**inputs, "scale": 0.3, "backend": "triton", **changes})

    refused("it takes lengths, not a mask", mask=torch.ones(2, 1, 1, 9, dtype=torch.bool))
    refused("it has no backward pass", q_BTHD=inputs["q_BTHD"].clone().requires_grad_())
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(inputs["q_BTHD"], inputs["q_BTHD"])
        refused("it has no forward-mode derivatives", q_BTHD=dual)
    refused("queries and factors must all be", q_BTHD=inputs["q_BTHD"].double())
    refused("the last dimension of every factor", b_k_BMSD=inputs["b_k_BMSD"].mT.contiguous().mT)
    refused("it takes at most 16 query tokens", **cache(2, 17, 9, 3, 1, 1))
    refused("it takes keys of at most 576", **cache(2, 1, 9, 3, 1, 1, D=584))
    refused(
        "it takes keys of at most 576 features and values of at most 512", **cache(2, 1, 9, 3, 1, 1, E=520)
    )
    refused("it takes heads of at most 256", **cache(2, 1, 9, 3, 1, 1, D=264, dtype=torch.float32))
    refused("the tokens of a page must be a multiple of 64", pages=torch.zeros(2, 1, dtype=torch.int32))


@pytest.mark.parametrize("paged", [False, True])
def test_new_tokens_of_short_rows_as_the_other_backends_write_them(paged):
    """Rows without tokens, and of fewer than the queries: idle rows of a batch."""
    M = 64 if paged else 70
    found = {}
    for backend in ("triton", "plain", "sdpa"):
        inputs = cache(4, 3, M, 5, 2, 1)
        options = {"pages": torch.tensor([[2], [0], [3], [1]])} if paged else {}
        lengths = torch.tensor([0, 2, 3, M])
        decode(**inputs, scale=0.3, lengths=lengths, new=appended(4, 3, 5, 2, 1), backend=backend, **options)
        found[backend] = inputs
    for backend in ("plain", "sdpa"):
        for name, expected in found["triton"].items():
            assert torch.equal(found[backend][name], expected), (backend, name)


@pytest.mark.parametrize(("B", "T"), [(0, 1), (2, 0)])
def test_nothing_to_decode_gives_an_empty_result(B, T):
    found = decode(**cache(B, T, 9, 3, 2, 1), scale=0.3, backend="triton")
    assert found.shape == (B, T, 3, 32)
