"""A step that would break the model changes nothing, is counted, and a killed run meets it again just so."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from commands import TINY
from run_records import metrics, weights

from t6_lightning.checkpoint.files import in_order, load
from t6_lightning.common.errors import BadInput
from t6_lightning.runs.folder import RunFolder
from t6_lightning.training.callbacks.spikes import SpikeGuard

# 16 steps of two micro-batches with dropout, a regular checkpoint every 5, no validation before the end.
SHORT = [
    *("--trainer.max_steps", "16", "--data.num_workers", "0", "--cadence.log_every_steps", "1"),
    *("--cadence.validate_every_tokens", "100000", "--data.val_tokens", "700", "--spikes.window", "4"),
]


def break_steps(
    nan: tuple[int, ...], spikes: tuple[int, ...] = (), stop: int | None = None, rank: int = 0
) -> None:
    """At the optimizer steps `nan` (from 1) one micro-batch of one rank has a loss that is no number; at `spikes` it
    is 10 times what it was. A signal comes during step `stop`."""
    from t6_lightning.distributed.signals import signals
    from t6_lightning.training.callbacks.checkpoints import Checkpoints
    from t6_lightning.training.module import T6Module

    summed_loss, after_step = T6Module._summed_loss, Checkpoints._after_step

    def broken(self: Any, batch: Any) -> Any:
        nats = summed_loss(self, batch)
        step = self.trainer.global_step + 1
        if self.trainer.global_rank != rank:
            return nats
        return nats * (float("nan") if step in nan else 10.0 if step in spikes else 1.0)

    def with_signal(self: Any, trainer: Any) -> None:
        if trainer.global_step == stop:
            signals.note(signal.SIGTERM)
        after_step(self, trainer)

    T6Module._summed_loss = broken
    Checkpoints._after_step = with_signal


def explode(steps: tuple[int, ...]) -> None:
    """The learning rate of some optimizer steps (from 1) is absurd."""
    from t6_lightning.training.schedule import FollowSchedule

    get_lr = FollowSchedule.get_lr

    def absurd(self: Any) -> list[Any]:
        rates = get_lr(self)
        return [1e25 for _ in rates] if self.taken() + 1 in steps else rates

    FollowSchedule.get_lr = absurd


def killed_after(step: int, preparation: Callable[[], None]) -> None:
    """The process ends without a word after a step."""
    from t6_lightning.training.callbacks.monitor import Monitor

    preparation()
    on_batch_end = Monitor.on_train_batch_end

    def ends(self: Any, trainer: Any, *args: Any) -> None:
        on_batch_end(self, trainer, *args)
        if trainer.global_step == step:
            os._exit(9)

    Monitor.on_train_batch_end = ends


def interrupted(name: str, code: int, *arguments: str, preparation: Any) -> str:
    said = Path(os.environ["T6_HOME"]) / "said" / f"{name}-interrupted"
    processes = ranks.start(
        1, said, "fit", *TINY, *SHORT, *arguments, "--run", name, "--trainer.accelerator", "cpu",
        preparation=preparation,
    )  # fmt: skip
    assert ranks.finish(processes) == [code], (said / "rank-0.txt").read_text()
    return (said / "rank-0.txt").read_text()


def assert_same(home: Path, run: str, reference: str) -> None:
    got = metrics(home, run)
    assert got == metrics(home, reference)
    assert [step for step, _ in got["optim/lr"]] == list(range(1, 17)), "each step once"
    a, b = weights(run), weights(reference)
    for name, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][name]), name
    for index, state in a["optimizer_states"][0]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, b["optimizer_states"][0]["state"][index][name]), (index, name)
    assert a["callbacks"]["SpikeGuard"] == b["callbacks"]["SpikeGuard"]


def test_skipped_steps_change_nothing_and_come_again_after_a_kill(home: Path) -> None:
    skip = ["--spikes.action", "skip"]
    said = ranks.fit(1, "skip", *SHORT, *skip, preparation=partial(break_steps, (7,), (12,)))
    assert "step 7 was skipped: loss nan" in said
    assert "step 12 was skipped: loss " in said
    state = weights("skip")
    assert state["callbacks"]["SpikeGuard"]["skipped"] == [7, 12]
    assert state["global_step"] == 16
    assert {int(one["step"]) for one in state["optimizer_states"][0]["state"].values()} == {14}
    counted = dict(metrics(home, "skip")["spikes/skipped_steps"])
    assert [counted[step] for step in (6, 7, 11, 12, 16)] == [0, 1, 1, 2, 2]
    losses = dict(metrics(home, "skip")["train/loss"])
    assert sorted(losses) == [step for step in range(1, 17) if step not in (7, 12)]
    assert dict(metrics(home, "skip")["data/tokens"])[16] == 16 * 256, "the data goes on"

    # Stopped by a signal after the first skipped step, killed after the second, its checkpoint then at 10.
    interrupted("skip2", 75, *skip, preparation=partial(break_steps, (7,), (12,), 8))
    killed = partial(killed_after, 13, partial(break_steps, (7,), (12,)))
    interrupted("skip2", 9, *skip, preparation=killed)
    ranks.fit(1, "skip2", *SHORT, *skip, preparation=partial(break_steps, (7,), (12,)))
    assert_same(home, "skip2", "skip")


def test_rolled_back_weights_are_those_of_the_last_regular_checkpoint(home: Path) -> None:
    back = ["--spikes.action", "rollback", "--checkpoints.keep", "1"]
    said = ranks.fit(1, "back", *SHORT, *back, preparation=partial(break_steps, (3, 9)))
    assert "weights and optimizer are those of step-00000005.ckpt again" in said
    guard = weights("back")["callbacks"]["SpikeGuard"]
    assert (guard["skipped"], guard["rollbacks"]) == ([3, 9], 1), "at step 3 there was nothing to go back to"
    # Steps 1, 2, 4, 5, then 10 to 16 on the weights of 5.
    steps = {int(one["step"]) for one in weights("back")["optimizer_states"][0]["state"].values()}
    assert steps == {11}

    # A checkpoint that a signal caused at step 7 is no goal: the uninterrupted run has none.
    interrupted("back2", 75, *back, preparation=partial(break_steps, (3, 9), (), 7))
    interrupted("back2", 9, *back, preparation=partial(killed_after, 9, partial(break_steps, (3, 9))))
    ranks.fit(1, "back2", *SHORT, *back, preparation=partial(break_steps, (3, 9)))
    assert_same(home, "back2", "back")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp2 sharded"])
def test_ranks_decide_alike(home: Path, strategy: str) -> None:
    """The loss breaks on rank 1 alone."""
    strategy, *sharded = strategy.split()
    name = f"two-{strategy}-{len(sharded)}"
    arguments = ["--spikes.action", "rollback", "--trainer.strategy", strategy, "--trainer.max_steps", "8"]
    arguments += ["--checkpoints.sharded", "true"] if sharded else []
    ranks.fit(2, name, *SHORT, *arguments, preparation=partial(break_steps, (7,), rank=1))
    saved = RunFolder(name).last_checkpoint()
    assert saved is not None
    state = load(saved)
    guard = state["callbacks"]["SpikeGuard"]
    assert (guard["skipped"], guard["rollbacks"]) == ([7], 1)
    assert {int(one["step"]) for one in state["optimizer_states"][0]["state"].values()} == {6}
    assert all(value.isfinite().all() for value in state["state_dict"].values())


def test_too_many_in_a_row_end_the_run(home: Path) -> None:
    broken = partial(break_steps, tuple(range(6, 17)))
    limit = ["--spikes.action", "skip", "--spikes.most_in_a_row", "3"]
    said = interrupted("hopeless", 1, *limit, preparation=broken)
    assert "error: 3 steps in a row were refused, the last of them step 8: the run stops" in said
    assert "step-00000005.ckpt" in said
    assert RunFolder("hopeless").record["status"] == "failed"


def test_a_step_that_makes_weights_overflow_reaches_no_checkpoint(home: Path) -> None:
    """Loss and gradient of the step are as usual, and a checkpoint is due right after it."""
    back = ["--spikes.action", "rollback", "--checkpoints.keep", "9"]
    said = ranks.fit(1, "overflow", *SHORT, *back, preparation=partial(explode, (10,)))
    assert "step 10 made the weights overflow: loss" in said
    assert "step 10: weights and optimizer are those of step-00000005.ckpt again" in said
    assert weights("overflow")["callbacks"]["SpikeGuard"]["skipped"] == [10]
    saved = in_order(RunFolder("overflow").checkpoints)
    assert [file.name[-7:] for file in saved] == ["05.ckpt", "10.ckpt", "15.ckpt", "16.ckpt"]
    for file in saved:
        assert all(value.abs().max() < 100 for value in load(file)["state_dict"].values()), file
    assert [step for step, _ in metrics(home, "overflow")["optim/lr"]] == list(range(1, 17)), "each step once"

    # Every step does: the run ends instead of going back for ever.
    said = interrupted("absurd", 1, *back, preparation=partial(explode, tuple(range(6, 17))))
    assert "error: 10 steps in a row were refused, the last of them step 15: the run stops" in said
    said = interrupted("at-once", 1, *back, preparation=partial(explode, (3,)))
    assert "error: step 3 made the weights overflow, and there is no checkpoint to go back to" in said


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_weights_that_overflowed_are_not_saved(home: Path, action: str) -> None:
    name = f"unsaved-{action}"
    said = interrupted(name, 1, "--spikes.action", action, preparation=partial(explode, (10,)))
    assert "error: the weights overflowed by step 10: the run stops. Last good checkpoint: " in said
    assert [file.name for file in in_order(RunFolder(name).checkpoints)] == ["step-00000005.ckpt"]


def test_a_spike_stands_out_above_the_accepted_losses() -> None:
    guard = SpikeGuard("skip", sigmas=3, window=4)
    norm = torch.tensor(1.0)
    accepted = [
        guard._accepts(torch.tensor(loss), norm) for loss in (9.0, 1.0, 1.1, 0.9, 50.0, 1.0, 50.0, 2.0)
    ]
    # 50 comes after 9, 1, 1.1, 0.9 (deviation 4) and then after 1, 1.1, 0.9, 1; falling losses are no spikes.
    assert accepted == [True, True, True, True, False, True, False, False]
    assert not guard._accepts(torch.tensor(1.0), torch.tensor(float("inf")))
    assert SpikeGuard("skip", sigmas=None)._accepts(torch.tensor(1e9), norm)


def test_impossible_settings() -> None:
    for settings in ({"action": "pray"}, {"sigmas": 0.0}, {"window": 1}, {"most_in_a_row": 0}):
        with pytest.raises(BadInput, match=f"spikes.{next(iter(settings))}"):
            SpikeGuard(**settings)
