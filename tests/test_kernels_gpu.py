"""The same operations on a GPU: every backend, forward and gradients, against float64 plain on the same GPU.

Shapes: B batch, T query tokens, M cached tokens, H heads, G KV heads, D head dimension, R rank.
"""

import pytest
import torch

from kernels.attention import attention
from kernels.contract import contract
from kernels.decode import decode
from kernels.loss import linear_cross_entropy
from kernels.tolerances import assert_matches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape, dtype=torch.float64, device="cuda") for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("R", [1, 2, 6])
def test_contract(R, dtype):
    assert_matches(contract, contract, inputs(a_BTRH=(2, 63, R, 47), b_BTRD=(2, 63, R, 64)), dtype)


@pytest.mark.parametrize("backend", ["plain", "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "H", "G"), [(1, 34, 34), (63, 47, 1), (63, 34, 2), (129, 3, 3)])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "ragged mask"])
def test_attention(masked, T, H, G, dtype, backend):
    lengths = torch.randint(1, T + 1, (2, 1, T, 1), device="cuda")
    lengths[0, 0, 0] = 0
    mask = torch.arange(T, device="cuda") < lengths if masked else None
    assert_matches(
        lambda **tensors: attention(**tensors, scale=0.125, causal=not masked, mask=mask, backend=backend),
        lambda **tensors: attention(**tensors, scale=0.125, causal=not masked, mask=mask, backend="plain"),
        inputs(q_BTHD=(2, T, H, 64), k_BMGD=(2, T, G, 64), v_BMGE=(2, T, G, 64)),
        dtype,
    )


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


@pytest.mark.parametrize("chunk_tokens", [100, None])
def test_loss(chunk_tokens):
    targets = torch.randint(50304, (333,), device="cuda")
    targets[::7] = -100
    assert_matches(
        lambda **tensors: linear_cross_entropy(**tensors, targets_N=targets, chunk_tokens=chunk_tokens),
        lambda **tensors: linear_cross_entropy(**tensors, targets_N=targets),
        {"x_NC": inputs(x=(333, 64))["x"], "weight_VC": inputs(w=(50304, 64))["w"]},
        torch.float32,
    )
