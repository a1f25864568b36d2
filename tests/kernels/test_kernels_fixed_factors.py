"""Section 4: MHA, GQA and MQA are TPA with fixed head factors, exactly.

Shapes: B batch, T tokens, H heads, G KV heads, D head dimension.
"""

import pytest
import torch
import torch.nn.functional as F

from kernels.attention import attention
from kernels.contract import contract
from kernels.decode import decode

B, T, H, D = 2, 63, 6, 16
SCALE = D**-0.5


def head_factors(G: int) -> torch.Tensor:
    """(B, T, G, H): a_j = G on the heads of group j, 0 elsewhere. G = H is MHA, G = 1 is MQA (all ones)."""
    a_GH = G * F.one_hot(torch.arange(H) // (H // G), G).T
    return a_GH.float().expand(B, T, G, H)


@pytest.fixture
def queries() -> torch.Tensor:
    return torch.randn(B, T, H, D, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def keys_and_values() -> torch.Tensor:
    return torch.randn(2, B, T, H, D, generator=torch.Generator().manual_seed(2))


def grouped_attention(q_BTHD: torch.Tensor, k_BTGD: torch.Tensor, v_BTGD: torch.Tensor) -> torch.Tensor:
    """The plain layer, K and V repeated for the heads of their group."""
    repeats = q_BTHD.shape[2] // k_BTGD.shape[2]
    k, v = (x.repeat_interleave(repeats, 2).transpose(1, 2) for x in (k_BTGD, v_BTGD))
    o = F.scaled_dot_product_attention(q_BTHD.transpose(1, 2), k, v, is_causal=True, scale=SCALE)
    return o.transpose(1, 2)


@pytest.mark.parametrize("G", [H, 3, 2, 1], ids=["MHA", "GQA3", "GQA2", "MQA"])
def test_fixed_head_factors_give_the_plain_layer(G, queries, keys_and_values):
    k_BTGD, v_BTGD = keys_and_values[:, :, :, :G]
    a = head_factors(G)
    # The layer's rank of Q is H in all three: q itself contracted from unit factors.
    q = contract(head_factors(H), queries)
    o = attention(q, contract(a, k_BTGD), contract(a, v_BTGD), scale=SCALE)
    torch.testing.assert_close(o, grouped_attention(queries, k_BTGD, v_BTGD), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["plain", "sdpa"])
@pytest.mark.parametrize("G", [H, 3, 2, 1], ids=["MHA", "GQA3", "GQA2", "MQA"])
def test_decoding_a_cache_of_fixed_factors_gives_the_plain_layer(G, backend, queries, keys_and_values):
    k_BTGD, v_BTGD = keys_and_values[:, :, :, :G]
    a = head_factors(G)
    causal = torch.ones(T, T, dtype=torch.bool).tril().expand(B, 1, T, T)
    o = decode(queries, a, k_BTGD, a, v_BTGD, scale=SCALE, mask=causal, backend=backend)
    torch.testing.assert_close(o, grouped_attention(queries, k_BTGD, v_BTGD), rtol=0, atol=1e-6)
