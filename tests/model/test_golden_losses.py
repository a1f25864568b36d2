"""The first 50 training losses of every variant: a change that should not alter numbers must not.

`python tests/test_golden_losses.py` writes tests/golden_losses.txt anew, for a change that should.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from variants import variants

from t6_lightning.model.config import T6Config
from t6_lightning.model.t6 import T6

FILE = Path(__file__).with_name("golden_losses.txt")
STEPS, BATCH, TOKENS = 50, 2, 24
# Processors sum in different orders. Losses are about 4; with PyTorch's plainest code (ATEN_CPU_CAPABILITY=default) in
# place of AVX-512 the largest difference over all variants and steps is below 1e-5.
TOLERANCE = 5e-5

# The other presets have the same mechanisms with other numbers of heads.
CHOSEN = {
    name: config
    for name, config in variants().items()
    if not name.startswith(("paper/medium", "paper/large", "paper/xl", "matched/"))
}


def batches(vocab_size: int) -> torch.Tensor:
    """Token ids (STEPS, BATCH, TOKENS + 1) of x → 1,103,515,245 x + 12,345 mod 2³¹, the C standard's example.

    The second half of each row repeats the first: attention has something to find.
    """
    ids, x = [], 1
    for _ in range(STEPS * BATCH * (TOKENS // 2 + 1)):
        x = (1_103_515_245 * x + 12_345) % 2**31
        ids.append((x >> 16) % vocab_size)
    half = torch.tensor(ids).view(STEPS, BATCH, TOKENS // 2 + 1)
    return torch.cat([half[..., :-1], half], dim=-1)


def losses(config: T6Config, steps: int = STEPS) -> list[float]:
    """Training losses in float32 on the CPU with SGD: Adam makes large steps of gradients that are mere rounding."""
    # With zero output matrices most gradients of the first steps would be zero.
    config = dataclasses.replace(config, output_init="scaled")
    torch.manual_seed(0)
    model = T6(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    found = []
    for ids in batches(config.vocab_size)[:steps]:
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def golden() -> dict[str, list[float]]:
    lines = [line.split() for line in FILE.read_text().splitlines() if not line.startswith("#")]
    return {name: list(map(float, values)) for name, *values in lines}


GOLDEN = golden() if FILE.exists() else {}


@pytest.mark.parametrize("name", CHOSEN)
def test_losses_are_the_golden_ones_and_the_same_twice(name: str) -> None:
    first = losses(CHOSEN[name])
    assert first[:10] == losses(CHOSEN[name], steps=10), "two runs on one machine are equal to the last bit"
    assert name in GOLDEN, "python tests/test_golden_losses.py writes a new variant's losses"
    torch.testing.assert_close(torch.tensor(first), torch.tensor(GOLDEN[name]), rtol=0, atol=TOLERANCE)


def test_every_variant_has_its_golden_losses() -> None:
    assert GOLDEN.keys() == CHOSEN.keys()
    assert len(GOLDEN) >= 20
    assert {len(values) for values in GOLDEN.values()} == {STEPS}


def main() -> None:
    header = f"# {STEPS} training losses per variant, see test_golden_losses.py\n"
    lines = [" ".join([name, *(f"{loss:.5f}" for loss in losses(config))]) for name, config in CHOSEN.items()]
    FILE.write_text(header + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
