"""The same operations on a GPU: every backend, forward and gradients, against float64 plain on the same GPU.

Shapes: B batch, T query tokens, M cached tokens, H heads, G KV heads, D head dimension, R rank.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from gpu_helpers import DTYPES, inputs, needs_triton

from kernels.attention import attention, offsets
from kernels.contract import contract
from kernels.factors import query_and_key
from kernels.linear import linear
from kernels.linear.stacked import stack, stacked_linear
from kernels.loss import linear_cross_entropy, linear_cross_entropy_sum
from kernels.swiglu import swiglu
from kernels.tolerances import assert_close, assert_matches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("R", [1, 2, 6])
def test_contract(R, dtype):
    assert_matches(contract, contract, inputs(a_BTRH=(2, 63, R, 47), b_BTRD=(2, 63, R, 64)), dtype)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("T", "R", "H", "D", "W", "pairing"),
    [
        (63, 6, 47, 64, 64, "halves"),
        (1, 1, 34, 64, 0, "halves"),
        (63, 2, 61, 64, 20, "halves"),
        (33, 6, 78, 64, 64, "interleaved"),
        (9, 17, 5, 128, 128, "halves"),
        (9, 2, 34, 256, 64, "halves"),
        (5, 3, 3, 32, 32, "interleaved"),
        (9, 6, 130, 96, 96, "halves"),
    ],
)
def test_triton_contract(T, R, H, D, W, pairing, dtype):
    angles = torch.rand(T, W // 2, device="cuda") * 6

    def by(backend: str):
        def run(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            wide = torch.promote_types(a.dtype, torch.float32)
            turn = (angles.cos().to(wide), angles.sin().to(wide)) if W else (None, None)
            return contract(a, b, *turn, pairing=pairing, backend=backend)

        return run

    # Slices of one projection, as the model has them.
    projected = inputs(x=(2, T, R * (H + D)))["x"]
    factors = {
        "a": projected[..., : R * H].unflatten(-1, (R, H)),
        "b": projected[..., R * H :].unflatten(-1, (R, D)),
    }
    assert_matches(by("triton"), by("plain"), factors, dtype)


@needs_triton
def test_a_block_compiles_into_one_graph_with_the_same_gradients():
    from t6_lightning.model.attention.tpa import TPAConfig
    from t6_lightning.model.config import T6Config
    from t6_lightning.model.t6 import T6

    tokens = torch.randint(97, (2, 300), device="cuda")
    documents = (torch.arange(300, device="cuda") // 70).expand(2, -1)
    found = {}
    for saves in ("qkv", "factors"):
        for compiled in (False, True):
            torch.manual_seed(0)
            attention_config = TPAConfig(5, 64)
            config = T6Config(97, 128, 2, 300, attention_config, output_init="scaled", attention_saves=saves)
            model = T6(config).cuda()
            if compiled:
                torch._dynamo.reset()
                for block in model.blocks:
                    block.compile(fullgraph=True)
            with torch.autocast("cuda", torch.bfloat16):
                loss = model.loss(tokens, tokens.roll(-1, 1), documents)
            loss.backward()
            found[saves, compiled] = torch.cat([p.grad.flatten() for p in model.parameters()])
    expected = found["qkv", False]
    for gradient in found.values():
        assert float((gradient - expected).norm() / expected.norm()) < 0.01


def test_gradients_of_a_model_are_those_of_the_cpu():
    """In float32, whose products torch leaves alone: padding, record, SwiGLU's kernel and the tied embedding."""
    from t6_lightning.model.attention.mha import MHAConfig
    from t6_lightning.model.attention.tpa import TPAConfig
    from t6_lightning.model.config import T6Config
    from t6_lightning.model.t6 import T6

    tokens = torch.randint(97, (2, 100))
    for attention_config in (TPAConfig(5, 64), MHAConfig(4, 32)):
        torch.manual_seed(0)
        model = T6(T6Config(97, 128, 2, 100, attention_config, output_init="scaled"))
        gradients = []
        for device in ("cpu", "cuda"):
            model.to(device).zero_grad()
            model.loss(tokens.to(device), tokens.roll(-1, 1).to(device)).backward()
            gradients.append({name: p.grad.cpu().clone() for name, p in model.named_parameters()})
        for name, gradient in gradients[1].items():
            expected = gradients[0][name]
            assert not gradient.is_sparse
            assert float((gradient - expected).norm() / expected.norm()) < 1e-4, name


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 63, 2 * 2752), (3, 2), (5, 2 * 4099)], ids=str)
def test_swiglu(shape, dtype):
    assert_matches(
        partial(swiglu, backend="triton"), partial(swiglu, backend="plain"), inputs(gate_up=shape), dtype
    )


def test_stacked_weights_get_float32_gradients():
    x, *weights = (x.bfloat16().float() for x in inputs(x=(2, 63, 64), a=(9, 64), b=(40, 64)).values())
    upstream = torch.randn(2, 63, 64, device="cuda").bfloat16()
    exact = [tensor.double().requires_grad_() for tensor in (x, *weights)]
    truth = F.linear(exact[0], stack(exact[1:], [16, 48]))
    expected = torch.autograd.grad(truth, exact, upstream.double())
    leaves = [tensor.requires_grad_() for tensor in (x, *weights)]
    with torch.autocast("cuda", torch.bfloat16):
        y = stacked_linear(leaves[0], leaves[1:], [16, 48])
    got = torch.autograd.grad(y, leaves, upstream)
    assert_close(y, truth, torch.bfloat16)
    assert_close(got[0], expected[0], torch.bfloat16)
    for mine, true in zip(got[1:], expected[1:], strict=True):
        # Products of bfloat16 numbers added up in float32, never rounded to bfloat16.
        assert_close(mine, true, torch.float32)


@pytest.mark.parametrize("backend", ["auto", "cudnn", "flash", "efficient"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("T", "H", "G", "D"), [(63, 47, 47, 64), (129, 34, 2, 64), (1030, 6, 1, 128), (257, 3, 3, 96)]
)
def test_named_attention(T, H, G, D, dtype, backend):
    if backend == "efficient" and G != H:
        pytest.skip("it shares no heads")
    assert_matches(
        lambda **tensors: attention(**tensors, scale=0.125, backend=backend),
        lambda **tensors: attention(**tensors, scale=0.125, backend="plain"),
        inputs(q_BTHD=(2, T, H, D), k_BMGD=(2, T, G, D), v_BMGE=(2, T, G, D)),
        dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("T", "H", "G", "D", "E"), [(63, 47, 47, 64, 64), (300, 34, 2, 64, 64), (257, 3, 3, 96, 64)]
)
def test_documents_of_their_own_lengths(T, H, G, D, E, dtype):
    documents = offsets((torch.rand(2, T, device="cuda") < 0.05).cumsum(1))
    assert_matches(
        lambda **tensors: attention(**tensors, scale=0.125, documents=documents, backend="varlen"),
        lambda **tensors: attention(**tensors, scale=0.125, documents=documents, backend="plain"),
        inputs(q_BTHD=(2, T, H, D), k_BMGD=(2, T, G, D), v_BMGE=(2, T, G, E)),
        dtype,
    )


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_summed_loss(dtype):
    targets = torch.randint(50304, (333,), device="cuda")
    targets[::7] = -100
    assert_matches(
        lambda **tensors: linear_cross_entropy_sum(**tensors, targets_N=targets, chunk_tokens=100).view(1),
        lambda **tensors: linear_cross_entropy(**tensors, targets_N=targets).sum().view(1),
        {"x_NC": inputs(x=(333, 64))["x"], "weight_VC": inputs(w=(50304, 64))["w"] / 8},
        dtype,
    )


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    ("B", "K", "N"), [(16, 1024, 1110), (16, 3008, 1024), (17, 2730, 1024), (1, 1024, 2730)]
)
@pytest.mark.parametrize("around", [(), ("gate", "norm"), ("residual",)], ids=str)
def test_linear_of_few_rows(B, K, N, around, dtype):
    wide = inputs(x=(B, K), w=(N, K), g=(N, K), r=(B, N))
    x, weight, gate, residual = (
        (wide[name] * scale).to(dtype) for name, scale in (("x", 1), ("w", K**-0.5), ("g", K**-0.5), ("r", 1))
    )
    rest = {
        "gate_NK": gate if "gate" in around else None,
        "residual": residual if "residual" in around else None,
    }
    eps = 1e-5 if "norm" in around else None
    got = linear(x, weight, **rest, norm_eps=eps, backend="triton")
    wide_rest = {name: None if part is None else part.double() for name, part in rest.items()}
    truth = linear(x.double(), weight.double(), **wide_rest, norm_eps=eps, backend="plain")
    assert_close(got, truth, dtype)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pairing", ["halves", "interleaved"])
def test_query_and_key(pairing, dtype):
    wide = inputs(a_q=(5, 2, 6, 47), b_q=(5, 2, 6, 64), b_k=(5, 2, 2, 64), angles=(2, 5, 2, 32))
    factors = tuple(wide[name].to(dtype) for name in ("a_q", "b_q", "b_k"))
    queries, keys = ((angle.cos().float(), angle.sin().float()) for angle in wide["angles"])
    got = query_and_key(*factors, queries, keys, pairing=pairing, backend="triton")
    truth = query_and_key(*(x.double() for x in factors), queries, keys, pairing=pairing, backend="plain")
    for one, other in zip(got, truth, strict=True):
        assert_close(one, other, dtype)
