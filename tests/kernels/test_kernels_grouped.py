"""Decoding over full keys and values (MHA, GQA, MQA, absorbed MLA), every backend that runs without a GPU.

Shapes: B batch, T query tokens, M cached tokens, H heads, G KV heads, D head dimension, E value dimension.
"""

import pytest
import torch
from interpreter import needs_interpreter

from kernels.attention import attention
from kernels.decode import visible
from kernels.decode.grouped import decode_grouped
from kernels.tolerances import assert_close

BACKENDS = ["auto", "plain", "sdpa", pytest.param("triton", marks=needs_interpreter)]
M = 70


def inputs(T: int, H: int, G: int, D: int, E: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"q_BTHD": (2, T, H, D), "k_BMGD": (2, M, G, D), "v_BMGE": (2, M, G, E)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("T", "H", "G", "D", "E"), [(1, 24, 3, 74, 74), (3, 6, 6, 16, 16), (2, 5, 1, 48, 32), (1, 16, 8, 20, 20)]
)
def test_grouped_decode(backend, T, H, G, D, E, dtype):
    """Widths that are no power of 2, and that no other kernel takes (74)."""
    given, lengths = inputs(T, H, G, D, E, dtype), torch.tensor([M, 33])
    got = decode_grouped(**given, scale=0.05, lengths=lengths, backend=backend)
    wide = {name: x.double() for name, x in given.items()}
    truth = attention(**wide, scale=0.05, causal=False, mask=visible(lengths, T, M), backend="plain")
    assert_close(got, truth, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("T", "H", "D", "E"), [(1, 23, 80, 64), (3, 5, 52, 44), (16, 3, 20, 16), (1, 40, 48, 48)]
)
def test_values_that_are_the_first_features_of_the_keys(backend, T, H, D, E):
    """As MLA's latent; in memory that holds more tokens and more features."""
    torch.manual_seed(0)
    cache = torch.randn(3, M + 9, 1, D + 8).bfloat16()
    q, k = torch.randn(3, T, H, D).bfloat16(), cache[:, :M, :, :D]
    lengths = torch.tensor([M, 0, 37])
    cache[:, M:], cache[..., D:] = torch.nan, torch.nan
    got = decode_grouped(q, k, k[..., :E], scale=0.1, lengths=lengths, backend=backend)
    truth = attention(
        *(x.double() for x in (q, k, k[..., :E])),
        scale=0.1,
        causal=False,
        mask=visible(lengths, T, M),
        backend="plain",
    )
    assert_close(got, truth, torch.bfloat16)


@needs_interpreter
def test_values_are_found_in_keys_of_one_head_however_they_are_spelt():
    from kernels.decode import grouped_triton

    latents = torch.randn(2, 64, 48)
    keys = latents.unsqueeze(2)
    assert grouped_triton.shares(keys, keys[..., :32])
    assert grouped_triton.shares(keys, latents[..., :32].unsqueeze(2))
    assert not grouped_triton.shares(keys, latents[..., 1:33].unsqueeze(2))
    assert not grouped_triton.shares(keys, latents[..., :32].contiguous().unsqueeze(2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("B", "T"), [(0, 1), (2, 0)])
def test_no_rows_and_no_queries(backend, B, T):
    q, k = torch.randn(B, T, 4, 16), torch.randn(B, 9, 2, 16)
    assert decode_grouped(q, k, k, scale=0.1, backend=backend).shape == (B, T, 4, 16)


@needs_interpreter
def test_without_lengths_all_queries_see_all():
    given = inputs(2, 12, 3, 74, 40, torch.float16)
    truth = attention(
        **{name: x.double() for name, x in given.items()}, scale=0.05, causal=False, backend="plain"
    )
    assert_close(decode_grouped(**given, scale=0.05, backend="triton"), truth, torch.float16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_does_not_fit_is_refused(backend):
    def refused(sentence: str, lengths: torch.Tensor | None = None, **changes: torch.Tensor) -> None:
        given = inputs(1, 4, 2, 16, 16, torch.float32) | changes
        with pytest.raises(ValueError, match=f"decode_grouped: {sentence}"):
            decode_grouped(**given, scale=0.05, lengths=lengths, backend=backend)

    refused("lengths must be 0 to 70 here, are -4 to 99", torch.tensor([99, -4]))
    refused(r"lengths must be int32 or int64 \(2,\), are torch.float32 \(2,\)", torch.tensor([9.0, 4.0]))
    refused(r"lengths must be int32 or int64 \(2,\), are torch.int64 \(1,\)", torch.tensor([9]))
    refused(r"q \(2, 1, 4\), k", q_BTHD=torch.randn(2, 1, 4))
    refused(r"q \(2, 1, 3, 16\), k", q_BTHD=torch.randn(2, 1, 3, 16))
    refused("k must be of a floating-point dtype, is torch.int64", k_BMGD=torch.ones(2, M, 2, 16).long())


@needs_interpreter
def test_a_mask_alone_is_for_backends_that_read_masks():
    given, mask = inputs(1, 4, 2, 16, 16, torch.float16), torch.rand(2, 1, 1, M) < 0.5
    wide = {name: x.double() for name, x in given.items()}
    truth = attention(**wide, scale=0.05, causal=False, mask=mask, backend="plain")
    assert_close(decode_grouped(**given, scale=0.05, mask=mask), truth, torch.float16)
    with pytest.raises(ValueError, match="'triton' cannot run here: it takes lengths, not a mask"):
        decode_grouped(**given, scale=0.05, mask=mask, backend="triton")
