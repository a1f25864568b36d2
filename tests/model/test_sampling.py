"""What is drawn from logits: exactly k candidates, no padding, and rows that do not depend on each other."""

from __future__ import annotations

import pytest
import torch
from variants import one_per_family, random_model, random_tokens

from t6_lightning.common.errors import BadInput
from t6_lightning.model.config import T6Config
from t6_lightning.model.generate import generate, row_generators, sample

CPU = torch.device("cpu")


@pytest.mark.parametrize("k", [1, 2, 5, 49, 50, 60])
def test_top_k_keeps_exactly_k_and_of_ties_the_smallest_ids(k: int) -> None:
    torch.manual_seed(0)
    logits = torch.randint(-3, 3, (40, 50)).to(torch.bfloat16)  # six values: nearly all are tied
    order = logits.float().sort(dim=-1, descending=True, stable=True).indices
    drawn = torch.stack([sample(logits, 5.0, k) for _ in range(60 * min(k, 50))], dim=1)
    for row in range(0, 40, 8):
        assert set(drawn[row].tolist()) == set(order[row, :k].tolist())


def test_padding_of_the_embedding_is_never_drawn() -> None:
    config = next(iter(one_per_family().values()))
    model, prompt = random_model(config), random_tokens(config, 4, 3)
    n_symbols = 5
    with torch.no_grad():
        model.embedding.weight[n_symbols:] *= 50  # the likeliest by far, one way or the other
    for temperature in (0.0, 1.0):
        ids = torch.stack(
            list(generate(model, prompt % n_symbols, 20, temperature=temperature, n_symbols=n_symbols))
        )
        assert int(ids.max()) < n_symbols
    for wrong in (0, config.vocab_size + 1):
        with pytest.raises(BadInput, match=f"n_symbols={wrong} is not possible: it must be from 1 to"):
            generate(model, prompt, 1, n_symbols=wrong)


@pytest.mark.parametrize("config", one_per_family().values(), ids=list(one_per_family()))
def test_a_rows_sample_does_not_depend_on_the_batch(config: T6Config) -> None:
    """In float64: products of other shapes are rounded otherwise."""
    model, prompt = random_model(config).double(), random_tokens(config, 1, 4)

    def rows(batch: int) -> torch.Tensor:
        generators = row_generators(7, batch, CPU)
        return torch.stack(list(generate(model, prompt.expand(batch, -1), 12, generator=generators)), dim=1)

    five = rows(5)
    assert torch.equal(rows(1), five[:1])
    assert torch.equal(rows(3), five[:3])
    assert len({tuple(row) for row in five.tolist()}) > 1


def test_every_row_needs_its_generator() -> None:
    config = next(iter(one_per_family().values()))
    with pytest.raises(BadInput, match="one for each of the 3 rows is needed"):
        generate(random_model(config), random_tokens(config, 3, 2), 1, generator=row_generators(0, 2, CPU))


def test_rows_and_seeds_have_generators_of_their_own() -> None:
    drawn = {
        float(torch.rand(1, generator=generator))
        for seed in (0, 1, 2**62)
        for generator in row_generators(seed, 3, CPU)
    }
    assert len(drawn) == 9
