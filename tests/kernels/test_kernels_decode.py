"""Decoding over a cache of factors: every backend against attention over K and V formed in float64.

Shapes: B batch, T query tokens, M cached tokens, H heads, D head dimension, E value dimension, S rank of K,
U rank of V.
"""

import itertools
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels.decode.plain
from kernels.attention import attention
from kernels.decode import decode, launch
from kernels.tolerances import assert_close, assert_matches

BACKENDS = ["plain", "sdpa"]


def over_full_keys_and_values(q_BTHD, a_k_BMSH, b_k_BMSD, a_v_BMUH, b_v_BMUE, *, scale, mask=None):
    k_BMHD = torch.einsum("bmsh,bmsd->bmhd", a_k_BMSH, b_k_BMSD) / a_k_BMSH.shape[2]
    v_BMHE = torch.einsum("bmuh,bmue->bmhe", a_v_BMUH, b_v_BMUE) / a_v_BMUH.shape[2]
    return attention(q_BTHD, k_BMHD, v_BMHE, scale=scale, causal=False, mask=mask, backend="plain")


def cache(
    B: int, T: int, M: int, H: int, S: int, U: int, D: int = 16, E: int = 16
) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {
        "q_BTHD": (B, T, H, D),
        "a_k_BMSH": (B, M, S, H),
        "b_k_BMSD": (B, M, S, D),
        "a_v_BMUH": (B, M, U, H),
        "b_v_BMUE": (B, M, U, E),
    }
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def ragged_mask(B: int, T: int, M: int) -> torch.Tensor:
    """Sequences of different lengths with a causal tail; the first one is empty."""
    lengths = torch.randint(1, M + 1, (B, 1, 1, 1))
    lengths[0] = 0
    visible = torch.arange(M) < lengths - torch.arange(T - 1, -1, -1).view(1, 1, T, 1)
    return visible.expand(B, 1, T, M)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 8 cached tokens, so that short caches cross several of their borders."""
    monkeypatch.setattr(kernels.decode.plain, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(kernels.decode.plain, "MIN_CHUNK_TOKENS", 8)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("T", "M", "H", "S", "U"), [(1, 1, 3, 1, 1), (1, 63, 34, 2, 6), (1, 64, 47, 6, 1), (3, 63, 3, 1, 2)]
)
def test_forward_and_gradients(T, M, H, S, U, dtype, backend):
    assert_matches(
        lambda **inputs: decode(**inputs, scale=0.3, backend=backend),
        lambda **inputs: over_full_keys_and_values(**inputs, scale=0.3),
        cache(2, T, M, H, S, U, E=24),
        dtype,
    )


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("T", "M"), [(1, 63), (4, 33)])
def test_ragged_lengths_with_an_empty_sequence(T, M, dtype, backend):
    mask = ragged_mask(3, T, M)
    inputs = cache(3, T, M, 34, 2, 1)
    assert_matches(
        lambda **inputs: decode(**inputs, scale=0.3, mask=mask, backend=backend),
        lambda **inputs: over_full_keys_and_values(**inputs, scale=0.3, mask=mask),
        inputs,
        dtype,
    )
    assert (decode(**inputs, scale=0.3, mask=mask, backend=backend)[0] == 0).all()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_online_softmax_survives_logits_far_apart(order):
    """Logits over a range of 10,000: chunks far below the running maximum, and a maximum that jumps."""
    inputs = {name: x.float() for name, x in cache(1, 1, 63, 3, 1, 1).items()}
    inputs["q_BTHD"].fill_(1.0)
    inputs["a_k_BMSH"].fill_(1.0)
    height = torch.linspace(-5000, 5000, 63) * (1 if order == "ascending" else -1)
    inputs["b_k_BMSD"] = (height / 16).view(1, 63, 1, 1).expand(1, 63, 1, 16)
    o = decode(**inputs, scale=1.0, backend="plain")
    top = 62 if order == "ascending" else 0
    expected = inputs["a_v_BMUH"][:, top].transpose(1, 2) * inputs["b_v_BMUE"][:, top]
    assert_close(o[:, 0], expected.double(), torch.float32)


@pytest.mark.parametrize("T", [1, 4])
def test_auto_agrees_with_both_backends(T):
    inputs = cache(2, T, 63, 34, 2, 6)
    results = [decode(**inputs, scale=0.3, backend=backend) for backend in ("auto", "plain", "sdpa")]
    truth = over_full_keys_and_values(**inputs, scale=0.3)
    for result in results:
        assert_close(result, truth, torch.float64)


class LargestStorage(TorchDispatchMode):
    """Records the most elements that any tensor returned by an operator has storage for."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_factor_space_never_forms_keys_or_values(dtype):
    M, H, D = 4096, 34, 64
    inputs = {name: x.to(dtype) for name, x in cache(1, 1, M, H, 6, 2, D=D, E=D).items()}
    largest = {}
    for backend in BACKENDS:
        with LargestStorage() as recorded, torch.no_grad():
            decode(**inputs, scale=0.125, backend=backend)
        largest[backend] = recorded.elements
    assert largest["sdpa"] >= M * H * D, "the recorder does not see K"
    assert largest["plain"] < M * H * D


def test_inputs_that_do_not_fit_are_refused():
    inputs = cache(2, 1, 9, 3, 2, 2)
    with pytest.raises(ValueError, match="decode: q, a_k, b_k, a_v, b_v are"):
        decode(**{**inputs, "a_k_BMSH": inputs["a_k_BMSH"][:, :, :1]}, scale=1.0)
    with pytest.raises(ValueError, match="mask must be bool"):
        decode(**inputs, scale=1.0, mask=torch.ones(2, 1, 1, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="lengths must be int32 or int64"):
        decode(**inputs, scale=1.0, lengths=torch.ones(3, dtype=torch.long))
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    with pytest.raises(ValueError, match="lengths and mask both say"):
        decode(**inputs, scale=1.0, mask=mask, lengths=torch.ones(2, dtype=torch.long))
    with pytest.raises(ValueError, match="pages must be int32 or int64"):
        decode(**inputs, scale=1.0, pages=torch.ones(3, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="unknown backend 'cutlass'"):
        decode(**inputs, scale=1.0, backend="cutlass")


def test_triton_on_a_cpu_is_refused_by_name_and_passed_over_by_auto(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = cache(2, 1, 9, 3, 2, 2)
    with pytest.raises(ValueError, match="'triton' cannot run here: (it needs an|the package)"):  # noqa: RUF043
        decode(**inputs, scale=1.0, backend="triton")
    assert decode(**inputs, scale=1.0).shape == (2, 1, 3, 16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T", [1, 4])
def test_lengths_are_a_mask_with_a_causal_tail(T, backend):
    inputs, lengths = cache(3, T, 33, 5, 2, 1), torch.tensor([0, 2, 33])
    expected = torch.zeros(3, 1, T, 33, dtype=torch.bool)
    for b, t, m in itertools.product(range(3), range(T), range(33)):
        expected[b, 0, t, m] = m < lengths[b] - (T - 1 - t)
    got = decode(**inputs, scale=0.3, lengths=lengths, backend=backend)
    assert_close(got, over_full_keys_and_values(**inputs, scale=0.3, mask=expected), torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_under_vmap(backend):
    inputs, lengths_NB = cache(2, 1, 9, 3, 2, 1), torch.tensor([[1, 2], [9, 0], [3, 4]])
    run = partial(decode, *inputs.values(), scale=0.3, backend=backend)
    got = torch.func.vmap(lambda lengths: run(lengths=lengths))(lengths_NB)
    assert_close(got, torch.stack([run(lengths=lengths) for lengths in lengths_NB]), torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_hold_the_rows_in_pieces(backend):
    inputs = cache(2, 1, 12, 5, 2, 1)
    pages = torch.tensor([[4, 0, 2], [1, 3, 5]])
    paged = {"q_BTHD": inputs["q_BTHD"]}
    for name, x in list(inputs.items())[1:]:
        paged[name] = torch.empty(6, 4, *x.shape[2:], dtype=x.dtype)
        paged[name][pages] = x.unflatten(1, (3, 4))
    got = decode(**paged, scale=0.3, pages=pages, backend=backend)
    assert_close(got, over_full_keys_and_values(**inputs, scale=0.3), torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("B", "T", "M"), [(0, 1, 9), (2, 0, 9), (2, 3, 0)])
def test_nothing_to_decode_gives_an_empty_result_or_zeros(backend, B, T, M):
    found = decode(**cache(B, T, M, 3, 2, 1), scale=0.3, backend=backend)
    assert found.shape == (B, T, 3, 16)
    assert not found.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_with_room_for_some_new_tokens_gets_the_last_of_them(backend):
    """Rows of 0, 1, 3 and 9 tokens get the last 0, 1, 3 and 3 of three; nothing else is touched."""
    inputs, new = cache(4, 3, 9, 3, 2, 1), cache(4, 3, 3, 3, 2, 1)
    names, lengths = list(inputs)[1:], torch.tensor([0, 1, 3, 9])
    expected = {name: inputs[name].clone() for name in names}
    for row, length in enumerate(lengths.tolist()):
        fits = min(3, length)
        for name in names:
            expected[name][row, length - fits : length] = new[name][row, 3 - fits :]
    decode(**inputs, scale=0.3, lengths=lengths, new=tuple(new[name] for name in names), backend=backend)
    for name in names:
        assert torch.equal(inputs[name], expected[name]), name
    decode(**inputs, scale=0.3, lengths=lengths.clamp(max=0), new=tuple(new[name] for name in names))
    decode(**inputs, scale=0.3, lengths=lengths, new=(None,) * 4, backend=backend)
    for name in names:
        assert torch.equal(inputs[name], expected[name]), name


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lengths": torch.tensor([9, 10])}, "lengths must be 0 to 9 here, are 9 to 10"),
        ({"lengths": torch.tensor([-1, 3])}, "lengths must be 0 to 9 here, are -1 to 3"),
        ({"pages": torch.tensor([[0], [2]])}, "pages must be 0 to 1 here, are 0 to 2"),
        ({"pages": torch.tensor([[0], [-1]])}, "pages must be 0 to 1 here, are -1 to 0"),
        ({"pages": torch.tensor([0, 1])}, r"pages must be int32 or int64 \(2, n\), are torch.int64 \(2,\)"),
        ({"q_BTHD": torch.randn(1, 3, 16)}, r"must have 4 dimensions, are q \(1, 3, 16\)"),
        ({"q_BTHD": torch.ones(2, 1, 3, 16).long()}, "q must be of a floating-point dtype, is torch.int64"),
        (
            {"a_k_BMSH": torch.randn(2, 9, 0, 3), "b_k_BMSD": torch.randn(2, 9, 0, 16)},
            "rank of K must be at least 1, got 0",
        ),
        (
            {"q_BTHD": torch.randn(2, 1, 3, 16), "backend": "sdpa"},
            "queries and factors must all be of one dtype",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_sizes_and_dtypes_that_do_not_fit_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=f"decode: .*{sentence}"):
        decode(**{**cache(2, 1, 9, 3, 2, 1), "scale": 0.3, **changes})


def test_mixed_dtypes_take_a_backend_that_can():
    inputs = cache(2, 3, 9, 3, 2, 1)
    found = decode(**{**inputs, "q_BTHD": inputs["q_BTHD"].float()}, scale=0.3)
    assert_close(found, decode(**inputs, scale=0.3, backend="plain"), torch.float32)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("D", [32, 64, 96, 128, 256, 300])
@pytest.mark.parametrize("H", [8, 16, 34, 47, 64, 78, 128, 200])
def test_no_launch_wants_more_shared_memory_than_there_is(H, D, wide):
    """By what Triton 3.6 and 3.7 take for sm_90: the tiles on their way and, with heads first, weights as wide as q.

    A turned feature of a token has its partners of each rank, cosine and sine: 18 + 2 S bytes in three stages, in
    two 4 + 4 S and at least 10.
    """
    widest = launch.padded(D)
    for T, S, U in itertools.product((1, 2, 4, 16), range(1, 13), (1, 2, 4, 16)):
        queries, heads = launch.columns(T, H, widest)
        groups = -(-T // queries) * -(-H // heads)
        for cached, turned in ((widest, 0), (widest, widest), (widest // 4, 0)):
            work = launch.Work(
                queries,
                heads,
                groups,
                (widest, widest),
                (cached, cached),
                (S, U),
                torch.bfloat16,
                turned,
                wide,
            )
            chosen = launch.choose_launch(work)
            taken = chosen.stages * chosen.tile * (S + U) * (cached + heads) * 2
            if chosen.heads_first:
                of_turned = 18 + 2 * S if chosen.stages > 2 else max(10, 4 + 4 * S)
                taken += queries * heads * widest * 2 + chosen.tile * turned * of_turned
            assert chosen.stages == 1 or taken <= 232_448, (work, chosen)
            assert chosen.stages == 1 or chosen.programs * (taken + 1024) <= 233_472, (work, chosen)


@pytest.mark.parametrize("width", [16, 64, 128, 512])
def test_columns_of_a_program_are_bounded_and_no_program_is_idle(width):
    for T, H in itertools.product((1, 2, 3, 4, 8, 16), (8, 16, 34, 47, 78, 200)):
        queries, heads = launch.columns(T, H, width)
        assert queries * heads <= (256 if T == 1 else 128), (T, H)
        assert queries < 2 * T, (T, H)
        assert heads < 2 * max(H, 16), (T, H)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS, "triton"])
def test_new_factors_are_floats_for_factors_that_are_not_expanded(backend):
    inputs = {name: x.half() for name, x in cache(2, 1, 9, 3, 2, 2).items()}
    new = tuple(torch.ones(2, 1, *x.shape[2:]).half() for name, x in inputs.items() if name != "q_BTHD")

    def refused(sentence: str, new=new, **changes: torch.Tensor) -> None:
        with pytest.raises(ValueError, match=f"decode: {sentence}"):
            decode(**{**inputs, **changes}, scale=0.3, new=new, backend=backend)

    refused(
        "the new a_v must be of a floating-point dtype, is torch.int64", (*new[:2], new[2].long(), new[3])
    )
    b_v = inputs["b_v_BMUE"]
    for expanded in (b_v[:, :1].expand(b_v.shape), b_v[:1].expand(b_v.shape)):
        kept = expanded.clone()
        refused("b_v is expanded, strides .* new must be None for it", b_v_BMUE=expanded)
        assert torch.equal(expanded, kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_new_factors_of_another_precision_are_converted(backend):
    inputs = cache(2, 1, 9, 3, 2, 2)
    new = tuple(torch.randn(2, 1, *x.shape[2:]) for name, x in inputs.items() if name != "q_BTHD")
    decode(**inputs, scale=0.3, new=new, backend=backend)
    for part, factor in zip(new, list(inputs.values())[1:], strict=True):
        assert torch.equal(factor[:, -1:], part.double())
