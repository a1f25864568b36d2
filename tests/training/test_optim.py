"""Learning-rate schedules, weight-decay groups, and accumulation that changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import TINY

from t6_lightning.__main__ import main
from t6_lightning.common.errors import BadInput
from t6_lightning.model.config import T6Config
from t6_lightning.model.t6 import T6
from t6_lightning.runs.folder import RunFolder
from t6_lightning.training.optim import AdamWConfig, Cosine, WarmupStableDecay


def test_cosine_warms_up_and_ends_at_its_floor() -> None:
    schedule = Cosine(warmup_steps=10, min_factor=0.1)
    factors = [schedule.factor(step, 110) for step in range(111)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[10] == 1
    assert factors[60] == pytest.approx(0.55), "half way down"
    assert factors[110] == pytest.approx(0.1)
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_warmup_stable_decay_has_three_stretches() -> None:
    schedule = WarmupStableDecay(warmup_steps=10, decay_steps=20, min_factor=0.0)
    factors = [schedule.factor(step, 100) for step in range(101)]
    assert factors[:10] == sorted(factors[:10])
    assert set(factors[10:81]) == {1.0}
    assert factors[90] == pytest.approx(0.5)
    assert factors[100] == 0


def test_decay_groups() -> None:
    model = T6(T6Config(vocab_size=16, d_model=8, n_layers=1))
    (everything,) = AdamWConfig(weight_decay=0.1, decay="all").build(model).param_groups
    assert len(everything["params"]) == len(list(model.parameters()))
    decayed, spared = AdamWConfig(weight_decay=0.1, decay="matrices").build(model).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert [p.shape for p in spared["params"]] == [model.embedding.weight.shape]


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: AdamWConfig(betas=(0.9, 1.0)), "optimizer.betas"),
        (lambda: AdamWConfig(weight_decay=-1), "optimizer.weight_decay=-1"),
        (lambda: Cosine(warmup_steps=-1), "schedule.warmup_steps=-1"),
        (lambda: WarmupStableDecay(min_factor=2), "schedule.min_factor=2"),
    ],
)
def test_impossible_settings_are_refused(build, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        build()


def test_accumulation_forms_the_gradients_of_one_large_batch(home: Path) -> None:
    """4 micro-batches of 2 windows against 1 of 8, the same samples: equal gradients up to rounding.

    AdamW's steps would not show a gradient that is a multiple of what it should be. Without clipping its first
    moments do: after step 1 they are (1 - beta) · gradient.
    """
    gradients: dict[int, list[torch.Tensor]] = {}
    for batch_size in (2, 8):
        name = f"batch{batch_size}"
        arguments = [
            *("--data.batch_size", str(batch_size), "--data.num_workers", "0", "--model.net.dropout", "0"),
            *("--trainer.precision", "64-true", "--trainer.gradient_clip_val", "null"),
            *("--model.net.output_init", "scaled"),  # zero matrices would leave most gradients zero
            *("--trainer.max_steps", "1", "--run", name),
        ]
        assert main(["fit", *TINY, *arguments]) == 0
        checkpoint = RunFolder(name).last_checkpoint()
        assert checkpoint is not None
        (state,) = torch.load(checkpoint, weights_only=True)["optimizer_states"]
        gradients[batch_size] = [moments["exp_avg"] / (1 - 0.9) for moments in state["state"].values()]
    assert len(gradients[8]) > 10
    for accumulated, whole in zip(gradients[2], gradients[8], strict=True):
        assert whole.any()
        torch.testing.assert_close(accumulated, whole, rtol=1e-10, atol=1e-14)
