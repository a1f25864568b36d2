"""Trainings over a mixture of three sources, two of them from a hub: killed, on other ranks, cut off from the hub."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ranks
import yaml
from commands import TINY
from data_helpers import many_texts, write_jsonl
from elastic import EXACT, elastic, record_samples
from loopback_hub import LoopbackHub
from run_records import logged_step, same_state
from stream_helpers import c4, fineweb_edu, parquet

from t6_lightning.checkpoint.files import step_of
from t6_lightning.runs.folder import RunFolder

MOMENTS = ("step", "checkpoint", "validation", "fetch")


@pytest.fixture(scope="module")
def served() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        hub.add("HuggingFaceFW/fineweb-edu", fineweb_edu())
        hub.add("allenai/c4", c4())
        yield hub


@pytest.fixture
def mixture(home: Path, served: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command line's part for half FineWeb-Edu, a third C4 and the rest local files."""
    monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
    books = write_jsonl(home / "books.jsonl", [f"book {text}" for text in many_texts(120, "b")])
    local = {"class_path": "TextFiles", "init_args": {"files": [str(books)], "val_fraction": 0.1}}
    sources = {"edu": streamed("FineWebEdu"), "c4": streamed("C4"), "books": local}
    options = {"sources": sources, "weights": {"edu": 0.5, "c4": 0.3, "books": 0.2}}
    config = tmp_path / "mixture.yaml"
    config.write_text(yaml.safe_dump({"data": {"class_path": "Mixture", "init_args": options}}))
    return ["--config", str(config), "--data.val_tokens", "400"]


def streamed(name: str) -> dict[str, Any]:
    return {"class_path": name, "init_args": {"patience": 3}}


# --- what a run is made to do before it starts ---


def die(moment: str, step: int, seed: int, folder: str) -> None:
    """Note the samples of each step; SIGKILL this process and its workers at a moment of a step, or soon after.

    "fetch" kills from within a loader's process that reads a window, "checkpoint" while the file is written.
    """
    from datamodules.lanes import LaneReader
    from t6_lightning.checkpoint import files as checkpoint_files
    from t6_lightning.training.module import T6Module

    os.setsid()
    record_samples(folder)
    rng = random.Random(seed)
    reached = False

    def kill() -> None:
        os.killpg(os.getpgid(0), signal.SIGKILL)

    training_step, validation_step = T6Module.training_step, T6Module.validation_step
    save, read = checkpoint_files.save, LaneReader.read
    windows, micro_batches = rng.randint(8, 60), rng.randint(0, 2)

    def trained(self: Any, batch: Any, batch_idx: int) -> Any:
        nonlocal reached
        reached = reached or self.trainer.global_step >= step
        if reached and moment == "step":
            threading.Timer(rng.uniform(0, 0.05), kill).start()
        return training_step(self, batch, batch_idx)

    def validated(self: Any, *args: Any) -> Any:
        nonlocal micro_batches
        micro_batches -= reached
        if reached and moment == "validation" and micro_batches < 0:
            kill()
        return validation_step(self, *args)

    def saved(*args: Any) -> None:
        if reached and moment == "checkpoint":
            threading.Timer(rng.uniform(0, 0.01), kill).start()
        save(*args)

    def fetched(self: Any, *args: Any) -> Any:
        nonlocal windows
        windows -= 1
        if moment == "fetch" and windows == 0:
            kill()
        return read(self, *args)

    T6Module.training_step, T6Module.validation_step = trained, validated
    checkpoint_files.save, LaneReader.read = saved, fetched


def killed(name: str, arguments: list[str], moment: str, step: int, seed: int, folder: Path) -> None:
    """One life of a run, which must end by SIGKILL."""
    said = folder.parent / f"{folder.name}-said"
    started = ranks.start(
        *(1, said, "fit", *arguments, "--run", name, "--trainer.accelerator", "cpu"),
        preparation=partial(die, moment, step, seed, str(folder)),
    )
    assert ranks.finish(started) == [-signal.SIGKILL], (said / "rank-0.txt").read_text()


def samples_of_steps(folder: Path) -> dict[int, dict[int, list[int]]]:
    """step -> micro-batch -> samples; a step taken again must have had the same."""
    steps: dict[int, dict[int, list[int]]] = {}
    for file in folder.iterdir():
        for line in file.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the kill came while it was written
            of_step = steps.setdefault(record["step"], {})
            assert of_step.setdefault(record["micro"], record["samples"]) == record["samples"]
    return steps


def kills(home: Path, name: str, arguments: list[str], steps: int, number: int) -> None:
    """Train once without and once with `number` kills, and compare everything."""
    arguments = [*TINY, *arguments, "--trainer.max_steps", str(steps)]
    folders = [home / f"samples-{name}-{which}" for which in ("whole", "killed")]
    for folder in folders:
        folder.mkdir()
    ranks.fit(
        1, f"{name}-whole", *arguments[len(TINY) :], preparation=partial(record_samples, str(folders[0]))
    )
    rng = random.Random(5)
    lives = []
    for life in range(number):
        moment = MOMENTS[(life + 1) % len(MOMENTS)]
        step = rng.randint(steps * life // (number + 1), steps * (life + 1) // (number + 1))
        killed(f"{name}-killed", arguments, moment, step, life, folders[1])
        lives.append((moment, max(samples_of_steps(folders[1]))))
    ranks.fit(
        1, f"{name}-killed", *arguments[len(TINY) :], preparation=partial(record_samples, str(folders[1]))
    )
    whole, again = map(samples_of_steps, folders)
    assert again == whole
    expected = list(range(steps * 8))
    assert [
        i for step in sorted(whole) for micro in sorted(whole[step]) for i in whole[step][micro]
    ] == expected
    same_state(home, f"{name}-killed", f"{name}-whole", steps)
    print(f"killed (moment, last step begun): {lives}")


def test_a_mixture_killed_at_any_moment_ends_bit_for_bit_as_the_uninterrupted_one(
    home: Path, mixture: list[str]
) -> None:
    kills(home, "mixture", mixture, steps=40, number=3)


@pytest.mark.prove
@pytest.mark.timeout(3000)
def test_twenty_kills_in_two_hundred_steps_of_a_mixture(home: Path, mixture: list[str]) -> None:
    kills(home, "mixture20", mixture, steps=200, number=20)


@pytest.mark.prove
@pytest.mark.timeout(3000)
def test_elastic_resume_of_a_mixture_over_fifty_steps(home: Path, mixture: list[str]) -> None:
    fifty = [*mixture, "--trainer.max_steps", "50"]
    (home / "samples-fifty").mkdir()
    ranks.fit(1, "fifty", *EXACT, *fifty, preparation=partial(record_samples, str(home / "samples-fifty")))
    elastic(home, "elastic50", "fifty", [12, 25, 38], *fifty)
    print("1 -> 2 -> 4 -> 2 ranks: the same samples at each of 50 steps, losses and weights to 1e-10")


# --- a hub that goes away ---


def gone_when(home: Path, hub: LoopbackHub, name: str, step: int) -> threading.Thread:
    """Take the hub down as soon as a run has logged a step."""

    def wait() -> None:
        while logged_step(home, name) < step:
            time.sleep(0.02)
        hub.down = True

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("world", [1, 2])
def test_a_hub_that_stays_away_ends_the_run_and_the_same_command_goes_on(
    home: Path, mixture: list[str], served: LoopbackHub, world: int
) -> None:
    """Down after step 3 of 80: what the lanes hold already lasts for some 20 more."""
    steps = [*mixture, *EXACT, "--trainer.max_steps", "80", "--checkpoints.every_tokens", "100000"]
    ranks.fit(world, f"there-{world}", *steps)
    subprocess.run(["rm", "-r", str(home / "tokens")], check=True)
    name, said = f"away-{world}", home / "said" / f"away-{world}"
    devices = ["--trainer.devices", str(world), *(["--trainer.strategy", "ddp"] if world > 1 else [])]
    arguments = ["fit", *TINY, *steps, "--trainer.accelerator", "cpu", *devices, "--run", name]
    watching = gone_when(home, served, name, 3)
    try:
        codes = ranks.finish(ranks.start(world, said, *arguments))
    finally:
        served.down = False
    watching.join()
    everything = "\n".join((said / f"rank-{rank}.txt").read_text() for rank in range(world))
    assert codes == [75] * world, everything
    assert everything.count(f"error: {served.endpoint} has not given ") >= 1, everything
    assert "Traceback" not in everything, everything
    assert RunFolder(name).record["status"] == "interrupted"
    assert RunFolder(name).last_checkpoint() is not None, "though no regular checkpoint was due"
    ranks.fit(world, name, *steps)
    same_state(home, name, f"there-{world}", 80)


def test_a_signal_ends_a_run_that_waits_for_the_hub(
    home: Path, served: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before the hub's patience is over, and as if the signal had come after the last whole step."""
    monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
    served.add("some/pages", {"sample/10BT/0.parquet": parquet(many_texts(3000), 50)})
    options = {"repository": "some/pages", "lanes": 1, "patience": 900}
    config = tmp_path / "pages.yaml"
    config.write_text(yaml.safe_dump({"data": {"class_path": "FineWebEdu", "init_args": options}}))
    steps = ["--config", str(config), "--trainer.max_steps", "80", "--checkpoints.every_tokens", "100000"]
    steps += ["--cadence.log_every_steps", "1", "--cadence.validate_every_tokens", "100000"]
    ranks.fit(1, "heard", *steps, "--data.val_tokens", "400")
    subprocess.run(["rm", "-r", str(home / "tokens")], check=True)
    said = home / "said" / "deaf"
    arguments = ["fit", *TINY, *steps, "--data.val_tokens", "400", "--trainer.accelerator", "cpu"]
    watching = gone_when(home, served, "deaf", 3)
    try:
        processes = ranks.start(1, said, *arguments, "--run", "deaf")
        watching.join()
        while True:
            before = logged_step(home, "deaf")
            time.sleep(3)
            if logged_step(home, "deaf") == before:
                break
        assert before < 80
        began = time.monotonic()
        os.kill(processes[0].pid or 0, signal.SIGTERM)
        assert ranks.finish(processes) == [75], (said / "rank-0.txt").read_text()
        assert time.monotonic() - began < 30
    finally:
        served.down = False
    assert "while data was waited for: go on with the same command" in (said / "rank-0.txt").read_text()
    saved = RunFolder("deaf").last_checkpoint()
    assert saved is not None
    assert step_of(saved) == before
    ranks.fit(1, "deaf", *steps, "--data.val_tokens", "400")
    same_state(home, "deaf", "heard", 80)


def unreachable(where: str) -> None:
    """The last rank cannot reach the hub: for its first window, or (rank 0) for what is prepared."""
    from datamodules.base import TokenData
    from datamodules.lanes import LaneReader
    from t6_lightning.common.errors import SourceUnavailable

    def refuse(*_: Any) -> None:
        raise SourceUnavailable("the hub has not given a byte")

    if where == "preparation":
        TokenData.prepare_data = refuse
    elif os.environ["RANK"] == "1":
        LaneReader.read = refuse


@pytest.mark.parametrize("where", ["preparation", "first window"])
def test_a_hub_away_before_the_first_batch_ends_every_rank_alike(
    home: Path, mixture: list[str], where: str
) -> None:
    name = f"never-{where.split()[0]}"
    said, mixture = home / "said" / name, [*mixture, "--trainer.max_steps", "2"]
    arguments = ["fit", *TINY, *mixture, "--trainer.accelerator", "cpu", "--run", name]
    codes = ranks.finish(ranks.start(2, said, *arguments, preparation=partial(unreachable, where)))
    everything = "\n".join((said / f"rank-{rank}.txt").read_text() for rank in range(2))
    assert codes == [75, 75], everything
    assert everything.count("error: the hub has not given a byte\n") == 1, everything
    assert "Traceback" not in everything, everything
    if where == "first window":
        assert RunFolder(name).record["status"] == "interrupted"
        ranks.fit(2, name, *mixture)
