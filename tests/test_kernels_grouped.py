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
    """Heads of a width that no other kernel takes (74), and as many KV heads as the Triton kernel takes."""
    given, lengths = inputs(T, H, G, D, E, dtype), torch.tensor([M, 33])
    got = decode_grouped(**given, scale=0.05, lengths=lengths, backend=backend)
    wide = {name: x.double() for name, x in given.items()}
    truth = attention(**wide, scale=0.05, causal=False, mask=visible(lengths, T, M), backend="plain")
    assert_close(got, truth, dtype)


@needs_interpreter
def test_more_kv_heads_than_the_triton_kernel_takes_are_refused_by_name():
    given = inputs(1, 9, 9, 16, 16, torch.float16)
    with pytest.raises(ValueError, match="'triton' cannot run here: it reads at most 8 KV heads"):
        decode_grouped(**given, scale=0.05, lengths=torch.tensor([M, 33]), backend="triton")


@needs_interpreter
def test_a_mask_alone_is_for_backends_that_read_masks():
    given, mask = inputs(1, 4, 2, 16, 16, torch.float16), torch.rand(2, 1, 1, M) < 0.5
    wide = {name: x.double() for name, x in given.items()}
    truth = attention(**wide, scale=0.05, causal=False, mask=mask, backend="plain")
    assert_close(decode_grouped(**given, scale=0.05, mask=mask), truth, torch.float16)
    with pytest.raises(ValueError, match="'triton' cannot run here: it takes lengths, not a mask"):
        decode_grouped(**given, scale=0.05, mask=mask, backend="triton")
