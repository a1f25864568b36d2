"""Softmax attention: every backend against a loop over heads in float64.

Shapes: B batch, T query tokens, M cached tokens, H heads, G KV heads, D head dimension, E value dimension.
"""

import pytest
import torch

from kernels.attention import attention, offsets
from kernels.tolerances import assert_close, assert_matches

BACKENDS = ["plain", "sdpa"]


def head_by_head(q, k, v, *, scale, mask):
    """Attention of each head with its group's K and V; `mask` bool, broadcastable to (B, 1, T, M)."""
    H, G = q.shape[2], k.shape[2]
    heads = []
    for h in range(H):
        g = h // (H // G)
        scores = scale * q[:, :, h] @ k[:, :, g].transpose(1, 2)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True).detach()) * mask[:, 0]
        heads.append(weights @ v[:, :, g] / weights.sum(-1, keepdim=True).clamp_min(1e-300))
    return torch.stack(heads, 2)


def qkv(B: int, T: int, M: int, H: int, G: int, D: int = 16, E: int = 16) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "q": torch.randn(B, T, H, D, dtype=torch.float64),
        "k": torch.randn(B, M, G, D, dtype=torch.float64),
        "v": torch.randn(B, M, G, E, dtype=torch.float64),
    }


def ragged_mask(B: int, T: int, M: int) -> torch.Tensor:
    """Every row sees a different number of tokens; the first row of the first sequence sees none."""
    lengths = torch.randint(1, M + 1, (B, 1, T, 1))
    lengths[0, 0, 0] = 0
    return torch.arange(M) < lengths


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("T", "H", "G"), [(1, 3, 3), (63, 3, 1), (63, 34, 2), (63, 47, 47), (1, 34, 17)])
def test_causal(T, H, G, dtype, backend):
    mask = torch.ones(T, T, dtype=torch.bool).tril()[None, None]
    assert_matches(
        lambda q, k, v: attention(q, k, v, scale=0.3, backend=backend),
        lambda q, k, v: head_by_head(q, k, v, scale=0.3, mask=mask),
        qkv(2, T, T, H, G),
        dtype,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("T", "M", "H", "G"), [(1, 63, 34, 34), (63, 33, 6, 2), (5, 1, 3, 1)])
def test_ragged_mask_with_a_row_that_sees_nothing(T, M, H, G, dtype, backend):
    mask = ragged_mask(2, T, M)
    inputs = qkv(2, T, M, H, G, E=24)
    assert_matches(
        lambda q, k, v: attention(q, k, v, scale=0.3, causal=False, mask=mask, backend=backend),
        lambda q, k, v: head_by_head(q, k, v, scale=0.3, mask=mask),
        inputs,
        dtype,
    )
    blind = attention(**_suffixed(inputs), scale=0.3, causal=False, mask=mask, backend=backend)[0, 0]
    assert (blind == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_visible_and_transposed_views(backend):
    inputs = qkv(2, 5, 63, 6, 3)
    views = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in inputs.items()}
    assert not views["q"].is_contiguous()
    got = attention(**_suffixed(views), scale=0.3, causal=False, backend=backend)
    everything = torch.ones(1, 1, 5, 63, dtype=torch.bool)
    assert_close(got, head_by_head(**inputs, scale=0.3, mask=everything), torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_keeps_the_expected_value(backend):
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 64, 8, 16)
    v = torch.ones(4, 64, 8, 16)
    o = attention(q, k, v, scale=0.3, causal=False, dropout=0.25, backend=backend)
    assert o.std() > 0.01
    assert abs(o.mean() - 1) < 0.01


def test_plain_stays_in_float32_under_autocast():
    inputs = {name: x.float() for name, x in _suffixed(qkv(1, 9, 9, 3, 3)).items()}
    alone = attention(**inputs, scale=0.3, backend="plain")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(**inputs, scale=0.3, backend="plain"), alone)


def test_inputs_that_do_not_fit_are_refused():
    q, k, v = torch.randn(3, 1, 4, 6, 8)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="exclude each other"):
        attention(q, k, v, scale=1.0, mask=mask)
    with pytest.raises(ValueError, match="as many queries as keys"):
        attention(q, k[:, :3], v[:, :3], scale=1.0)
    with pytest.raises(ValueError, match="multiple of G"):
        attention(q, k[:, :, :4], v[:, :, :4], scale=1.0)
    with pytest.raises(ValueError, match="mask must be bool"):
        attention(q, k, v, scale=1.0, causal=False, mask=mask.float())
    with pytest.raises(ValueError, match="mask must be bool"):
        attention(q, k, v, scale=1.0, causal=False, mask=mask[0, 0])
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        attention(q, k, v, scale=1.0, backend="fast")


def _suffixed(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"q_BTHD": inputs["q"], "k_BMGD": inputs["k"], "v_BMGE": inputs["v"]}


# --- packed documents ---


def test_documents_are_where_their_index_changes():
    documents = torch.tensor([[4, 4, 4, 5, 5], [5, 5, 5, 5, 9]])
    begins = offsets(documents)
    assert begins.dtype == torch.int32
    assert begins[:5].tolist() == [0, 3, 5, 9, 10]
    assert begins[4:].eq(10).all()
    assert len(begins) == 64
    with pytest.raises(ValueError, match=r"offsets: documents must be \(B, T\), are \(5,\)"):
        offsets(documents[0])


def test_documents_see_themselves_alone():
    torch.manual_seed(0)
    inputs = {name: torch.randn(2, 7, 3, 8, dtype=torch.float64) for name in ("q_BTHD", "k_BMGD", "v_BMGE")}
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [3] * 7])
    whole = attention(**inputs, scale=0.3, documents=offsets(documents))
    for row, first, past in ((0, 0, 3), (0, 3, 5), (0, 5, 7), (1, 0, 7)):
        alone = {name: tensor[row : row + 1, first:past] for name, tensor in inputs.items()}
        expected = attention(**alone, scale=0.3, backend="plain")
        assert_close(whole[row : row + 1, first:past], expected, torch.float64)


def test_named_implementations_say_why_they_cannot_run_here():
    q = torch.randn(1, 4, 2, 8)
    for name, why in (("cudnn", "NVIDIA GPU"), ("flash", "NVIDIA GPU"), ("varlen", "packed documents")):
        with pytest.raises(ValueError, match=f"backend '{name}' cannot run here: .*{why}"):
            attention(q, q, q, scale=1.0, backend=name)
    with pytest.raises(ValueError, match="documents need causal=True"):
        attention(q, q, q, scale=1.0, causal=False, documents=offsets(torch.zeros(1, 4)))


def three(B=2, T=3, M=3, H=4, G=2):
    return torch.randn(B, T, H, 8), torch.randn(B, M, G, 8), torch.randn(B, M, G, 5)


@pytest.mark.parametrize("backend", ["auto", "plain", "sdpa"])
def test_nothing_to_attend_gives_an_empty_result(backend):
    assert attention(*three(T=0), scale=0.3, causal=False, backend=backend).shape == (2, 0, 4, 5)
    for B, T in ((0, 3), (2, 0)):
        none = offsets(torch.zeros(B, T).long())
        assert attention(*three(B, T, T), scale=0.3, documents=none, backend=backend).shape == (B, T, 4, 5)


def test_mixed_dtypes_take_a_backend_that_can():
    q, k, v = three()
    expected = attention(q.half().float(), k, v, scale=0.3, backend="plain")
    torch.testing.assert_close(attention(q.half(), k, v, scale=0.3), expected.half())
    with pytest.raises(ValueError, match=r"'sdpa' cannot run here: .* must be of one dtype"):
        attention(q.half(), k, v, scale=0.3, backend="sdpa")


@pytest.mark.parametrize(
    ("inputs", "options", "sentence"),
    [
        (three(G=0), {}, "with H a multiple of G"),
        ([x[0] for x in three()], {}, r"must be \(B, T, H, D\)"),
        ([x.long() for x in three()], {}, "q must be of a floating-point dtype, is torch.int64"),
        (three(), {"dropout": -0.1}, "dropout must be 0 to 1, got -0.1"),
        (three(), {"dropout": 1.5}, "dropout must be 0 to 1, got 1.5"),
        (three(), {"documents": torch.zeros(2, 3).long()}, "documents must be what `offsets` gives"),
        (
            three(),
            {"documents": torch.tensor([0, 3])},
            "documents must be from 0 to B T = 6, are from 0 to 3",
        ),
        (
            three(),
            {"documents": torch.tensor([2, 6])},
            "documents must be from 0 to B T = 6, are from 2 to 6",
        ),
        (three(), {"documents": torch.tensor([0, 3, 2, 6])}, "documents must not fall, fall from 3 to 2"),
        (three(), {"documents": torch.tensor([4, 0, 2, 6])}, "are from 4 to 6"),
        (three(), {"documents": torch.tensor([0, 2, 6])}, "over the end of a row of 3 tokens, .* at token 3"),
        (three(), {"documents": torch.tensor([6])}, r"of at least 1, are torch.int64 \(1,\)"),
        (three(), {"documents": torch.tensor([]).int()}, r"of at least 1, are torch.int32 \(0,\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused(inputs, options, sentence):
    with pytest.raises(ValueError, match=f"attention: .*{sentence}"):
        attention(*inputs, scale=0.3, **options)
