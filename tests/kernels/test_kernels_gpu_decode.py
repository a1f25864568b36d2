"""Decoding on a GPU: every backend against float64 plain on the same GPU, graphs, memory, equal bits.

Shapes: B batch, T query tokens, M cached tokens, H heads, G KV heads, D head dimension, S and U ranks.
"""

import pytest
import torch
from gpu_helpers import DTYPES, inputs, needs_triton

from kernels.attention import attention
from kernels.decode import decode, layout, visible
from kernels.decode.grouped import decode_grouped
from kernels.tolerances import assert_close, assert_matches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("backend", ["plain", "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all visible", "ragged mask"])
@pytest.mark.parametrize("T", [1, 4])
def test_decode(T, masked, dtype, backend):
    M, H, D = 333, 34, 64
    lengths = torch.tensor([0, 7, M], device="cuda").view(3, 1, 1, 1)
    mask = (torch.arange(M, device="cuda") < lengths).expand(3, 1, T, M) if masked else None
    assert_matches(
        lambda **tensors: decode(**tensors, scale=0.125, mask=mask, backend=backend),
        lambda **tensors: decode(**tensors, scale=0.125, mask=mask, backend="plain"),
        inputs(
            q_BTHD=(3, T, H, D),
            a_k_BMSH=(3, M, 2, H),
            b_k_BMSD=(3, M, 2, D),
            a_v_BMUH=(3, M, 1, H),
            b_v_BMUE=(3, M, 1, D),
        ),
        dtype,
    )


def cache(B, T, M, H, S, U, D=64, E=64, dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    shapes = {
        "q_BTHD": (B, T, H, D),
        "a_k_BMSH": (B, M, S, H),
        "b_k_BMSD": (B, M, S, D),
        "a_v_BMUH": (B, M, U, H),
        "b_v_BMUE": (B, M, U, E),
    }
    return {name: x.to(dtype) for name, x in inputs(**shapes).items()}


def check_decode(tensors, lengths, *, truth=None, **how) -> None:
    """The dtype's tolerance, and of half precisions at most 2·2⁻⁸ max|O| in each head."""
    dtype = tensors["q_BTHD"].dtype
    got = decode(**tensors, scale=0.125, lengths=lengths, backend="triton", **how)
    wide = {name: x.double() for name, x in (truth or tensors).items()}
    mask = None if lengths is None else visible(lengths, wide["q_BTHD"].shape[1], wide["b_k_BMSD"].shape[1])
    expected = decode(**wide, scale=0.125, mask=mask, backend="plain")
    if dtype == torch.float32:
        assert_close(got, expected, dtype)
    error_BTH = (got.double() - expected).abs().amax(-1)
    assert (error_BTH <= 2 * 2**-8 * expected.abs().amax(-1)).all()


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("T", "M", "H", "S", "U", "D", "E"),
    [
        (1, 1, 1, 1, 1, 32, 32),
        (1, 4099, 16, 1, 1, 64, 64),
        (1, 1000, 32, 1, 2, 128, 64),
        (1, 1000, 32, 4, 4, 64, 64),
        (1, 1000, 34, 2, 2, 64, 64),
        (1, 1000, 47, 2, 2, 64, 64),
        (1, 1000, 61, 2, 2, 64, 64),
        (1, 1000, 78, 2, 2, 64, 64),
        (1, 1000, 64, 4, 4, 128, 128),
        (1, 300, 130, 1, 1, 96, 80),
        (1, 300, 16, 16, 16, 64, 64),
        (1, 300, 34, 2, 6, 256, 256),
        (2, 300, 32, 1, 1, 64, 64),
        (4, 1000, 47, 2, 2, 64, 64),
        (5, 300, 34, 2, 2, 64, 64),
        (16, 300, 32, 2, 2, 64, 64),
    ],
)
def test_triton_decode(T, M, H, S, U, D, E, dtype):
    tensors = cache(5, T, M, H, S, U, D, E, dtype)
    check_decode(tensors, torch.tensor([0, T, M // 3, M, M - 1], device="cuda").clamp(max=M))
    check_decode(tensors, None)


@needs_triton
@pytest.mark.parametrize("H", [34, 47, 78])
def test_triton_decode_of_records(H):
    tensors = cache(3, 2, 500, H, 2, 1)
    records = torch.zeros(
        3, 500, layout.record_width(H, 64, 64, 2, 1, 2), dtype=torch.bfloat16, device="cuda"
    )
    views = layout.views(records, H, 64, 64, 2, 1)._asdict()
    for name, view in views.items():
        view.copy_(tensors[name])
    check_decode({"q_BTHD": tensors["q_BTHD"], **views}, torch.tensor([500, 2, 131], device="cuda"))


@needs_triton
@pytest.mark.parametrize("side", ["a", "b"])
def test_triton_decode_of_non_contextual_factors(side):
    tensors = cache(3, 1, 500, 34, 2, 2)
    for name in [name for name in tensors if name.startswith(side)]:
        tensors[name] = tensors[name][0, 0].expand(3, 500, -1, -1)
    check_decode(tensors, torch.tensor([500, 2, 131], device="cuda"))


@needs_triton
@pytest.mark.parametrize(("H", "T", "N"), [(16, 1, 64), (32, 1, 128), (47, 4, 64)])
def test_triton_decode_of_pages(H, T, N):
    n = 640 // N
    tensors = cache(3, T, 640, H, 2, 1)
    pages = torch.randperm(3 * n + 4, device="cuda")[: 3 * n].view(3, n)
    paged = {"q_BTHD": tensors["q_BTHD"]}
    for name, x in list(tensors.items())[1:]:
        paged[name] = torch.zeros(3 * n + 4, N, *x.shape[2:], dtype=x.dtype, device="cuda")
        paged[name][pages] = x.unflatten(1, (n, N))
    check_decode(paged, torch.tensor([640, 4, 211], device="cuda"), truth=tensors, pages=pages)


@needs_triton
def test_triton_decode_of_log_sum_exps_far_apart():
    M = 20000
    tensors = cache(1, 1, M, 34, 1, 1, dtype=torch.float32)
    tensors["q_BTHD"].fill_(1.0)
    tensors["a_k_BMSH"].fill_(1.0)
    # Whole numbers, so that no rounding of logits this large decides between tokens.
    height = torch.linspace(-625, 625, M, device="cuda").round()
    tensors["b_k_BMSD"] = height.view(1, M, 1, 1).expand(1, M, 1, 64).contiguous()
    check_decode(tensors, None)
    check_decode({**tensors, "b_k_BMSD": tensors["b_k_BMSD"].flip(1)}, None)


@needs_triton
def test_triton_decode_gives_equal_bits_between_runs():
    tensors, lengths = cache(3, 4, 5000, 47, 2, 2), torch.tensor([5000, 77, 3001], device="cuda")
    results = [decode(**tensors, scale=0.125, lengths=lengths, backend="triton") for _ in range(3)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@needs_triton
def test_triton_decode_in_a_graph_follows_the_lengths_and_compiles_nothing():
    from kernels.decode import triton as kernel

    tensors, lengths = cache(3, 1, 700, 47, 2, 2), torch.tensor([1, 9, 600], device="cuda")

    def step() -> torch.Tensor:
        lengths.add_(1)
        return decode(**tensors, scale=0.125, lengths=lengths, backend="triton")

    step()
    compiled = kernel.n_compiled()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for _ in range(70):
        graph.replay()
    wide = {name: x.double() for name, x in tensors.items()}
    expected = decode(**wide, scale=0.125, mask=visible(lengths, 1, 700), backend="plain")
    assert lengths.tolist() == [72, 80, 671]
    assert_close(got, expected, torch.bfloat16)
    for length in (1, 2, 63, 64, 65, 700):
        part = {name: x if name == "q_BTHD" else x[:, :length].contiguous() for name, x in tensors.items()}
        check_decode(part, torch.full((3,), length, device="cuda"))
    assert kernel.n_compiled() == compiled


@needs_triton
def test_triton_decode_allocates_nothing_of_the_cache_times_heads():
    M, H, D = 100_000, 47, 64
    tensors = cache(1, 1, M, H, 2, 2)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    decode(**tensors, scale=0.125, backend="triton")
    assert torch.cuda.max_memory_allocated() - before < M * H * D * 2 / 50


@needs_triton
def test_auto_takes_triton_and_compiles_as_one_operator():
    tensors, lengths = cache(2, 1, 300, 34, 2, 2), torch.tensor([300, 9], device="cuda")

    def attend(lengths: torch.Tensor) -> torch.Tensor:
        return 2 * decode(**tensors, scale=0.125, lengths=lengths)

    expected = 2 * decode(**tensors, scale=0.125, lengths=lengths, backend="triton")
    assert torch.equal(attend(lengths), expected)
    assert torch.equal(torch.compile(attend, fullgraph=True)(lengths), expected)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "H", "S", "U"), [(1, 47, 2, 2), (4, 34, 1, 3), (3, 130, 2, 1), (16, 32, 2, 2)])
def test_triton_decode_appends_new_factors_first(T, H, S, U, dtype):
    tensors, kept = cache(4, T, 700, H, S, U, dtype=dtype), cache(4, T, 700, H, S, U, dtype=dtype)
    new = tuple(x.flip(1) for x in list(cache(4, 1, T, H, S, U, dtype=dtype).values())[1:])
    lengths = torch.tensor([700, T, 131, 402], device="cuda")
    for _ in range(3):
        got = decode(**tensors, scale=0.125, lengths=lengths, new=new, backend="triton")
    decode(**kept, scale=0.125, lengths=lengths, new=new, backend="plain")
    for name, x in tensors.items():
        assert torch.equal(x, kept[name]), name
    assert torch.equal(got, decode(**kept, scale=0.125, lengths=lengths, backend="triton"))
    check_decode(kept, lengths)


@needs_triton
def test_append_and_decode_compile_without_a_copy_of_the_cache():
    tensors, lengths = cache(2, 1, 50_000, 34, 2, 2), torch.tensor([300, 9], device="cuda")
    new = tuple(x.clone() for x in list(cache(2, 1, 1, 34, 2, 2).values())[1:])

    def attend(lengths: torch.Tensor) -> torch.Tensor:
        return 2 * decode(**tensors, scale=0.125, lengths=lengths, new=new)

    expected = attend(lengths)
    compiled = torch.compile(attend, fullgraph=True)
    assert torch.equal(compiled(lengths), expected)
    tensors["a_k_BMSH"][:, :300] = 1
    expected = attend(lengths)
    tensors["a_k_BMSH"][0, 299] = 1
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert torch.equal(compiled(lengths), expected)
    assert torch.cuda.max_memory_allocated() - before < tensors["a_k_BMSH"].nbytes


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize(
    ("backend", "H", "G", "D", "E"),
    [
        ("sdpa", 30, 2, 64, 64),
        ("flash", 30, 2, 64, 64),
        ("flash", 16, 16, 128, 128),
        ("flash", 31, 1, 64, 64),
        pytest.param("triton", 31, 1, 64, 64, marks=needs_triton),
        pytest.param("triton", 16, 16, 64, 64, marks=needs_triton),
        pytest.param("triton", 24, 3, 74, 74, marks=needs_triton),
        pytest.param("triton", 32, 8, 128, 128, marks=needs_triton),
        pytest.param("triton", 23, 1, 288, 256, marks=needs_triton),
        pytest.param("triton", 19, 1, 444, 412, marks=needs_triton),
        pytest.param("triton", 23, 1, 576, 512, marks=needs_triton),
    ],
)
def test_grouped_decode(backend, H, G, D, E, T, dtype):
    M = 500
    wide = inputs(q_BTHD=(3, T, H, D), k_BMGD=(3, M, G, D), v_BMGE=(3, M, G, E))
    half = {name: x.to(dtype) for name, x in wide.items()}
    if G == 1:  # in the same memory
        half["v_BMGE"] = half["k_BMGD"][..., :E]
    lengths = torch.tensor([M, T, 77], device="cuda")
    got = decode_grouped(**half, scale=0.05, lengths=lengths, backend=backend)
    truth = attention(
        **{name: x.double() for name, x in half.items()},
        scale=0.05,
        causal=False,
        mask=visible(lengths, T, M),
        backend="plain",
    )
    assert_close(got, truth, dtype)
