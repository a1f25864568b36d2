"""Generation on a GPU: one graph from a fixed cache gives what eager decoding gives."""

from __future__ import annotations

import pytest
import torch
from variants import one_per_family, random_model, random_tokens

from t6_lightning.evaluation.cache import measure
from t6_lightning.model.attention.tpa import TPAConfig
from t6_lightning.model.config import T6Config
from t6_lightning.model.generate import Decoder, generate, sample
from t6_lightning.model.t6 import T6

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

FAMILIES = one_per_family()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tokens(model: T6, graph: bool, temperature: float, n: int = 30) -> torch.Tensor:
    prompt = random_tokens(model.config, 3, 11).cuda()
    generator = torch.Generator("cuda").manual_seed(5)
    options = {"temperature": temperature, "top_k": 20, "generator": generator}
    return torch.stack(list(generate(model, prompt, n, graph=graph, **options)), dim=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("config", FAMILIES.values(), ids=list(FAMILIES))
def test_graph_and_eager_give_the_same_tokens(
    config: T6Config, temperature: float, dtype: torch.dtype
) -> None:
    model = random_model(config, dtype).cuda()
    graph = tokens(model, True, temperature)
    assert torch.equal(graph, tokens(model, False, temperature))
    if dtype == torch.float32 and temperature == 0:
        prompt = random_tokens(config, 3, 11)
        on_cpu = list(generate(model.cpu(), prompt, 30, temperature=0))
        assert torch.equal(graph.cpu(), torch.stack(on_cpu, dim=1))


def test_a_growing_sequence_compiles_nothing() -> None:
    triton = pytest.importorskip("kernels.decode.triton")
    config = T6Config(attention=TPAConfig(n_heads=47, head_dim=64), d_model=64, n_layers=2, vocab_size=61)
    model = random_model(config, torch.bfloat16).cuda()
    tokens(model, True, 0.9, n=4)
    before = triton.n_compiled()
    tokens(model, True, 0.9, n=200)
    assert before > 0
    assert triton.n_compiled() == before


def test_a_full_cache_says_so_before_anything_is_written() -> None:
    model = random_model(next(iter(FAMILIES.values())), torch.bfloat16).cuda()
    with torch.inference_mode(), model.frozen():
        cache = model.new_cache(1, 4)
        model(random_tokens(model.config, 1, 1).cuda(), cache=cache)
        cache.fix()
        decoder = Decoder(model, cache, lambda x: sample(model.logits(x[:, -1]), 0, None), graph=True)
        token = torch.zeros(1, dtype=torch.long, device="cuda")
        for _ in range(3):
            token = decoder.next(token)
        with pytest.raises(ValueError, match="holds 4 tokens a row: 1 more after 4 do not fit"):
            decoder.next(token)


@pytest.mark.parametrize("context", [16384, 131072])
def test_cache_memory_is_the_formula_and_declared_padding(context: int) -> None:
    row = measure("paper/medium-tpa", context, 1, torch.bfloat16)
    assert row["logical_bytes"] == row["predicted_bytes"] == context * 24 * 444 * 2
    assert row["padding_bytes"] == context * 24 * 4 * 2
    assert row["measured_bytes"] == row["logical_bytes"] + row["padding_bytes"]
    # torch's allocator hands out whole blocks of 2 MiB of this size.
    assert 0 <= row["allocator_rounding_bytes"] < 4 * 2**21
