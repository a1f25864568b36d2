"""Several ranks train what one does: the same samples at each step, the same losses, on any number of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import ranks
import torch
import yaml
from commands import TINY, command
from elastic import EXACT, assert_close, elastic, record_samples, samples, stop_after, stopped
from run_records import logged_step, metrics, weights

from t6_lightning.__main__ import main
from t6_lightning.checkpoint import files as checkpoint_files
from t6_lightning.checkpoint import shards as checkpoint_shards
from t6_lightning.distributed import fsdp2, launch
from t6_lightning.runs.folder import RunFolder

# --- what ranks are made to do; each is pickled and called in every rank before the command ---


def signal_before_training(moment: str) -> None:
    """A signal reaches rank 0 while it prepares data, or rank 1 before it meets the other or builds the model."""
    from datamodules.base import TokenData
    from t6_lightning.training.module import T6Module

    rank, owner, name = {
        "prepare": ("0", TokenData, "prepare_data"),
        "connect": ("1", launch, "on_every_rank"),
        "build": ("1", T6Module, "configure_model"),
    }[moment]
    function = getattr(owner, name)

    def with_signal(*args: Any) -> Any:
        if os.environ["RANK"] == rank:
            os.kill(os.getpid(), signal.SIGUSR1)
        return function(*args)

    setattr(owner, name, with_signal)


def wait_for_one_that_never_joins(absent: str, before: bool) -> None:
    """One rank dies at once; the other is asked to stop before or while it waits for it."""
    if os.environ["RANK"] == absent:
        os._exit(9)
    from t6_lightning.distributed import launch

    launch.SECONDS_TO_JOIN = 1
    join = torch.distributed.init_process_group

    def with_signal(*args: Any, **options: Any) -> None:
        kill = partial(os.kill, os.getpid(), signal.SIGTERM)
        kill() if before else threading.Timer(1, kill).start()
        join(*args, **options)

    torch.distributed.init_process_group = with_signal


def mask_targets() -> None:
    """Leave out of the loss as many targets of a window as its number says, so that ranks count different tokens."""
    from t6_lightning.training.module import T6Module

    training_step = T6Module.training_step

    def masked(self: Any, batch: Any, batch_idx: int) -> Any:
        targets = batch["targets"].clone()
        for row, sample in enumerate(batch["sample"].tolist()):
            targets[row, : (sample * 7) % 31] = -100
        return training_step(self, batch | {"targets": targets}, batch_idx)

    T6Module.training_step = masked


@pytest.fixture(scope="module")
def one(shared_home: Path) -> str:
    """A run on one device, and the samples of its steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("T6_HOME", str(shared_home))
        (shared_home / "samples-one").mkdir()
        ranks.fit(1, "one", *EXACT, preparation=partial(record_samples, str(shared_home / "samples-one")))
    return "one"


def test_any_number_of_ranks_goes_on_with_the_same_samples_and_losses(home: Path, one: str) -> None:
    expected = samples(home / "samples-one")
    assert [i for step in expected for i in step] == list(range(12 * 8)), (
        "nothing is missing, nothing comes twice"
    )
    elastic(home, "elastic", one, [3, 6, 9])


@pytest.mark.prove
@pytest.mark.timeout(3000)
def test_elastic_resume_over_fifty_steps(home: Path) -> None:
    fifty = ["--trainer.max_steps", "50"]
    (home / "samples-fifty").mkdir()
    ranks.fit(1, "fifty", *EXACT, *fifty, preparation=partial(record_samples, str(home / "samples-fifty")))
    elastic(home, "elastic50", "fifty", [12, 25, 38], *fifty)
    print("1 -> 2 -> 4 -> 2 ranks: the same samples at each of 50 steps, losses and weights to 1e-10")


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp2_full_shard"])
def test_sharded_parameters_train_the_same_model(home: Path, one: str, strategy: str) -> None:
    """Gathered once a step, as a small model is where nothing is said, and for each pass of a block."""
    ranks.fit(2, strategy, *EXACT, "--trainer.strategy", strategy)
    assert_close(home, strategy, one, 1e-12)


def test_whole_weights_and_gradients_are_kept_where_memory_is_plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    net, cpu = torch.nn.Linear(100, 10, bias=False), torch.device("cpu")
    whole = 2 * 4 * 1000
    for quarter, kept in ((whole, True), (whole - 1, False)):
        monkeypatch.setattr(fsdp2, "memory", lambda device, quarter=quarter: 4 * quarter)
        assert fsdp2.has_room_for_whole(net, cpu) is kept


def test_every_counted_token_weighs_the_same_on_any_number_of_ranks(home: Path) -> None:
    short = [*EXACT, "--trainer.max_steps", "3"]
    ranks.fit(1, "masked-1", *short, "--data.batch_size", "8", preparation=mask_targets)
    ranks.fit(2, "masked-2", *short, preparation=mask_targets)
    assert_close(home, "masked-2", "masked-1", 1e-12)


def test_the_launcher_of_lightning_and_a_signal_to_the_first_process(home: Path, one: str) -> None:
    """The command as a user types it; what one process started goes on in two, and the other way round."""
    arguments = [*TINY, *EXACT, "--trainer.accelerator", "cpu", "--run", "launched"]
    process = subprocess.Popen(
        command("fit", *arguments, "--trainer.devices", "2", "--trainer.strategy", "ddp"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while logged_step(home, "launched") < 3:
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 75, errors
    assert errors.count("stopped by SIGTERM after a checkpoint") == 1
    assert output.count("run launched in") == 1
    assert RunFolder("launched").record["status"] == "interrupted"
    assert "devices" not in yaml.safe_load(RunFolder("launched").config_file.read_text())["trainer"]
    ranks.fit(1, "launched", *EXACT)
    assert_close(home, "launched", one, 1e-12)


def test_torchrun_starts_one_run(home: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
    line = next(line for line in page.splitlines() if line.startswith("torchrun --standalone"))
    words = (
        line.replace("nproc_per_node 8", "nproc_per_node 2").replace("--config paper/medium-tpa ", "").split()
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", *words[1:]),
            *(*TINY, *EXACT, "--trainer.max_steps", "2"),
            *("--trainer.accelerator", "cpu"),  # how many ranks there are is torchrun's business
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation bits per byte") == 1
    assert "--run medium" in line
    assert RunFolder("medium").record["status"] == "finished"
    assert [step for step, _ in metrics(home, "medium")["train/loss"]] == [1, 2]


def test_slurm_asks_for_a_checkpoint_before_the_time_is_up(home: Path) -> None:
    """SLURM's variables around two real processes; its signal, SIGUSR1, reaches one of them."""
    said = home / "said" / "slurm"
    arguments = ["fit", *TINY, *EXACT, "--trainer.accelerator", "cpu", "--run", "slurm"]
    stop = partial(stop_after, 2, signal.SIGUSR1)
    assert ranks.finish(ranks.start(2, said, *arguments, preparation=stop, slurm=True)) == [75, 75]
    assert "stopped by SIGUSR1 after a checkpoint at step 2" in (said / "rank-0.txt").read_text()
    assert weights("slurm")["global_step"] == 2


@pytest.mark.parametrize("moment", ["prepare", "connect", "build"])
def test_a_signal_to_one_rank_before_training_ends_both_alike(home: Path, moment: str) -> None:
    name, said = f"early-{moment}", home / "said" / f"early-{moment}"
    arguments = ["fit", *TINY, *EXACT, "--trainer.accelerator", "cpu", "--run", name]
    preparation = partial(signal_before_training, moment)
    codes = ranks.finish(ranks.start(2, said, *arguments, preparation=preparation))
    everything = "\n".join((said / f"rank-{rank}.txt").read_text() for rank in range(2))
    assert codes == [75, 75], everything
    assert everything.count("stopped by SIGUSR1 before training began: go on with the same command") == 1
    assert "Traceback" not in everything
    assert RunFolder(name).exists == (moment == "build")
    assert RunFolder(name).last_checkpoint() is None
    if moment == "build":
        ranks.fit(2, name, *EXACT, "--trainer.max_steps", "12")


@pytest.mark.parametrize(("absent", "before"), [(0, False), (1, False), (1, True)])
def test_a_signal_ends_a_rank_that_waits_for_one_that_never_joins(
    home: Path, absent: int, before: bool
) -> None:
    said = home / "said" / f"alone-{absent}-{before}"
    arguments = ["fit", *TINY, *EXACT, "--trainer.accelerator", "cpu", "--run", "alone"]
    preparation = partial(wait_for_one_that_never_joins, str(absent), before)
    began = time.monotonic()
    codes = ranks.finish(ranks.start(2, said, *arguments, preparation=preparation))
    waited = (said / f"rank-{1 - absent}.txt").read_text()
    assert sorted(codes) == [9, 75], waited
    assert "stopped by SIGTERM before all ranks had joined: go on with the same command" in waited
    assert time.monotonic() - began < 60
    assert not RunFolder("alone").exists


def test_what_rank_0_refuses_is_said_once_and_ends_every_rank(home: Path, one: str) -> None:
    said = home / "said" / "refused"
    processes = ranks.start(
        2,
        said,
        *("fit", *TINY, *EXACT, "--run", one, "--model.optimizer.lr", "0.1"),
        *("--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"),
    )
    assert ranks.finish(processes) == [2, 1]
    both = (said / "rank-0.txt").read_text() + (said / "rank-1.txt").read_text()
    assert both.count("error: ") == 1
    assert "exists with another configuration (model.optimizer.lr was 0.003 and is 0.1)" in both


# --- checkpoints in shards ---


def test_shards_go_on_on_any_number_of_ranks_and_become_one_file(
    home: Path, one: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = ["--trainer.strategy", "fsdp2", "--checkpoints.sharded", "true", "--model.recompute", "full"]
    stopped(2, "shards", partial(stop_after, 3), *shards)
    folder = RunFolder("shards").last_checkpoint()
    assert folder is not None
    assert sorted(file.name for file in folder.iterdir() if file.suffix == ".pt") == [
        *("rest.pt", "shard-00000-of-00002.pt", "shard-00001-of-00002.pt")
    ]
    stopped(4, "shards", partial(stop_after, 6), *shards)

    # The folder and one file of it, on one device.
    whole = str(home / "whole.ckpt")
    assert main(["consolidate", "--run", "shards", "--ckpt_path", "last", "--output", whole]) == 0
    capsys.readouterr()
    texts = []
    for arguments in (["--ckpt_path", whole], ["--run", "shards", "--ckpt_path", "last"]):
        assert main(["generate", *arguments, "--prompt", "def", "--seed", "1"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]

    ranks.fit(1, "shards", *EXACT, "--model.recompute", "selective")
    assert_close(home, "shards", one, 1e-12)


def write_shards(folder: Path, world: int = 3) -> Path:
    """A small checkpoint in shards, as `save_shards` leaves it."""
    for rank in range(world):
        mine = {"weight/net.w": torch.arange(7.0)[:, None][rank * 3 : rank * 3 + 3].clone()}
        checkpoint_files.save(mine, checkpoint_shards.shard_file(folder, rank, world))
    rest = {"state_dict": {}, "optimizer_states": [], "hyper_parameters": {"net": {}}, "global_step": 1}
    checkpoint_files.save(rest, folder / checkpoint_shards.REST)
    return folder


def test_any_rows_of_a_sharded_tensor_can_be_read(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "step-00000001.ckpt")
    rows = checkpoint_files.load(folder, whole=False)["state_dict"]["net.w"]
    whole = checkpoint_files.load(folder)["state_dict"]["net.w"]
    assert torch.equal(whole[:, 0], torch.arange(7.0))
    assert rows.shape == (7, 1)
    for first in range(8):
        for behind in range(first, 8):
            assert torch.equal(rows.rows(first, behind), whole[first:behind])


def test_shards_that_are_cut_or_missing_are_passed_over(tmp_path: Path) -> None:
    old, new = (write_shards(tmp_path / f"step-0000000{i}.ckpt") for i in (1, 2))
    assert checkpoint_files.newest_verified(tmp_path) == new
    for file in sorted(new.iterdir()):
        content = file.read_bytes()
        for cut in (None, 0, len(content) // 2, len(content) - 1):
            file.unlink(missing_ok=True)
            if cut is not None:
                file.write_bytes(content[:cut])
            if file.suffix == ".sha256" and cut == len(content) - 1:
                continue  # a line end is no part of a checksum
            assert checkpoint_files.newest_verified(tmp_path) == old, (file.name, cut)
        file.write_bytes(content)
    assert checkpoint_files.newest_verified(tmp_path) == new
    checkpoint_files.prune(tmp_path, keep=1)
    assert list(tmp_path.iterdir()) == [new]


@pytest.mark.parametrize("strategy", ["ModelParallelStrategy", "fsdp2", "FSDP2"])
def test_lightnings_name_of_the_sharded_strategy(strategy: str) -> None:
    config = {"strategy": strategy, "accelerator": "cpu", "devices": 2, "precision": "64-true"}
    trainer = launch.build_trainer(lambda given: pl.Trainer(**given, logger=False), config, shards=True)
    assert isinstance(trainer.strategy, fsdp2.ShardedStrategy)
    assert trainer.strategy.writes_shards


def test_a_rank_that_is_killed_ends_the_others_with_one_sentence(home: Path, one: str) -> None:
    """And the same command goes on, to the same figures."""
    said = home / "said" / "rank-killed"
    often = ["--checkpoints.every_tokens", "512"]
    arguments = ["fit", *TINY, *EXACT, *often, "--trainer.accelerator", "cpu", "--run", "rank-killed"]
    preparation = partial(stop_after, 5, signal.SIGKILL)
    began = time.monotonic()
    assert ranks.finish(ranks.start(2, said, *arguments, preparation=preparation)) == [1, -signal.SIGKILL]
    assert time.monotonic() - began < 120
    errors = (said / "rank-0.txt").read_text()
    assert (
        errors.count("error: another rank is gone or does not answer, and the run stops: go on from step-")
        == 1
    )
    assert "with the same command" in errors
    assert "Traceback" not in errors
    assert RunFolder("rank-killed").record["status"] == "failed"
    ranks.fit(2, "rank-killed", *EXACT, *often)
    assert_close(home, "rank-killed", one, 1e-12)


def test_what_strategies_refuse(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, sentence in (
        (
            ["--checkpoints.sharded", "true"],
            "checkpoints.sharded=True is not possible: it needs --trainer.strategy",
        ),
        (
            ["--trainer.strategy", "fdsp2"],
            "trainer.strategy='fdsp2' is not possible: choose auto, ddp, fsdp2, fsdp2_full_shard, fsdp2_shard_grad_op",
        ),
        (
            ["--trainer.strategy", "ModelParallelStrategy", "--trainer.strategy.tensor_parallel_size", "2"],
            "trainer.strategy.tensor_parallel_size=2 is not possible",
        ),
        (["--model.recompute", "some"], "model.recompute"),
        (
            ["--trainer.devices", "3"],
            "trainer.devices='3' is not possible: the launcher started 2; leave it out",
        ),
    ):
        if "--trainer.devices" in arguments:
            for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("LOCAL_WORLD_SIZE", "2"), ("WORLD_SIZE", "2")):
                monkeypatch.setenv(name, value)
        assert main(["fit", *TINY, *arguments]) == 2
        assert sentence in capsys.readouterr().err
