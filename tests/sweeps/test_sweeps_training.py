"""Sweeps that train: real `fit` processes at a minimal size, in a T6_HOME of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

# On raw bytes: nothing has to be trained first.
TINY = {
    "model.net.vocab_size": 257,
    "model.net.n_layers": 1,
    "model.net.d_model": 32,
    "model.net.context": 64,
    "model.net.attention.n_heads": 4,
    "model.net.attention.head_dim": 8,
    "data.init_args.tokenizer": "bytes",
    "data.init_args.val_tokens": 4000,
    "data.init_args.batch_size": 4,
    "cadence.tokens_per_step": 256,
    "cadence.validate_every_tokens": 25600,
    "cadence.log_every_steps": 1,
    "checkpoints.every_tokens": 2560,
}
RANKS = {
    f"rank{rank}": {"model.net.attention.rank_k": rank, "model.net.attention.rank_v": rank} for rank in (1, 2)
}


def write_sweep(folder: Path, cells: dict[str, dict], seeds: list[int], max_steps: int) -> Path:
    file = folder / "tiny.py"
    file.write_text(
        "from sweeps.definition import Cell, Sweep\n"
        "sweep = Sweep(\n"
        "    hypothesis='Rank helps.', stopping_rule='All to the last step.',\n"
        f"    max_steps={max_steps}, seeds={seeds}, overrides={TINY},\n"
        f"    cells=[Cell(name, overrides) for name, overrides in {cells}.items()],\n"
        ")\n"
    )
    return file


def environment(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    return kept | {"T6_HOME": str(home), "MLFLOW_DISABLE_TELEMETRY": "true"}


def start(home: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sweeps", *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=550)
    return process.returncode, output, errors


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


def checkpoints(home: Path, run: str) -> list[Path]:
    return list((home / "runs" / run / "checkpoints").glob("*.ckpt"))


def mlflow_runs(home: Path) -> tuple[dict[str, str], dict[str, dict[str, str]], Counter]:
    """Of the store in `home`: status by run name, tags by run name, and how often each (run, metric, step) is."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    experiment = client.get_experiment_by_name("t6")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    names = [run.info.run_name for run in runs]
    assert len(set(names)) == len(names), f"a run was made twice: {names}"
    points = Counter(
        (run.info.run_name, metric, point.step)
        for run in runs
        for metric in run.data.metrics
        for point in client.get_metric_history(run.info.run_id, metric)
    )
    by_id = {run.info.run_id: run.info.run_name for run in runs}
    tags = {run.info.run_name: dict(run.data.tags) for run in runs}
    for found in tags.values():
        found["parent"] = by_id.get(found.get("mlflow.parentRunId", ""), "")
    return {run.info.run_name: run.info.status for run in runs}, tags, points


def artifacts(home: Path, run_name: str) -> set[str]:
    """Names of the files that MLflow keeps of the run of that name."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    experiment = client.get_experiment_by_name("t6")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{run_name}'")
    return {file.path for file in client.list_artifacts(run.info.run_id)}


def assert_complete(home: Path, cells: dict[str, dict], seeds: list[int], max_steps: int) -> None:
    """Every trial finished once, in one MLflow run under the sweep's, with each step of the loss once."""
    names = {f"tiny-{cell}-seed{seed}" for cell in cells for seed in seeds}
    status, tags, points = mlflow_runs(home)
    assert status == dict.fromkeys({"tiny", *names}, "FINISHED")
    assert {tags[name]["parent"] for name in names} == {"tiny"}
    assert {(tags[name]["sweep"], tags[name]["cell"]) for name in names} == {("tiny", cell) for cell in cells}
    assert {point for point, times in points.items() if times > 1} == set()
    for name in names:
        steps = {step for run, metric, step in points if (run, metric) == (name, "train/loss")}
        assert max(steps) == max_steps
    assert (home / "sweeps" / "tiny.png").stat().st_size > 10_000, "the loss curves were drawn"
    assert artifacts(home, "tiny") == {"tiny.md", "tiny.png"}
    report = (home / "sweeps" / "tiny.md").read_text()
    assert f"{len(names)} of {len(names)} trials finished." in report


@pytest.mark.parametrize(
    ("override", "says"),
    [
        pytest.param({"model.net.attention.rank_w": 1}, "rank_w", id="unknown"),
        pytest.param({"model.net.attention.rank_k": 0}, "rank_k", id="impossible", marks=pytest.mark.prove),
    ],
)
def test_bad_cell_is_refused_before_anything_is_spent(tmp_path, override, says):
    file = write_sweep(tmp_path, {"good": {}, "bad": override}, [0], 2)
    code, output, errors = finish(start(tmp_path / "home", "run", file))
    assert code == 2
    assert output == ""
    assert "cell 'bad' of sweep 'tiny'" in errors
    assert says in errors
    assert errors.strip().count("\n") == 0
    assert not (tmp_path / "home" / "runs").exists()


def test_sweep_trains_every_cell_nests_the_runs_and_reports(tmp_path):
    home = tmp_path / "home"
    file = write_sweep(tmp_path, RANKS, [0], 4)
    code, output, errors = finish(start(home, "run", file, "--json"))
    assert code == 0, errors
    rows = json.loads(output)
    assert [(row["cell"], row["seed"]) for row in rows] == [("rank1", 0), ("rank2", 0)]
    assert [row["kv_cache/bytes_per_token"] for row in rows] == [2 * (4 + 8) * 4, 4 * (4 + 8) * 4]
    assert "[2/2] rank2 seed 0" in errors
    assert_complete(home, RANKS, [0], 4)

    code, output, _ = finish(start(home, "status", file))
    assert code == 0
    assert output.count("finished, val/bits_per_byte") == 2
    code, output, _ = finish(start(home, "report", file))
    assert code == 0
    assert output.strip() == (home / "sweeps" / "tiny.md").read_text().strip()


@pytest.mark.prove
def test_sweep_killed_in_a_trial_goes_on_and_runs_each_trial_once(tmp_path):
    home, killed_trial = tmp_path / "home", "tiny-rank2-seed0"
    file = write_sweep(tmp_path, RANKS, [0, 1], 60)
    first = start(home, "run", file)
    wait_for(lambda: checkpoints(home, killed_trial), first)
    first.send_signal(signal.SIGKILL)
    first.communicate()

    code, _, errors = finish(start(home, "run", file))
    assert code == 0, errors
    assert "go on from their checkpoints" in errors
    assert_complete(home, RANKS, [0, 1], 60)
    log = home / "sweeps" / "tiny" / f"{killed_trial.removeprefix('tiny-')}.log"
    assert log.read_text().count("$ ") == 2, "the killed trial started twice"
    others = [other for other in log.parent.glob("*.log") if other != log]
    assert [other.read_text().count("$ ") for other in others] == [1, 1, 1]
    assert "going on from step-" in log.read_text()


@pytest.mark.prove
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal_is_passed_to_the_trial_and_the_same_command_goes_on(tmp_path, signum):
    home = tmp_path / "home"
    file = write_sweep(tmp_path, RANKS, [0], 60)
    first = start(home, "run", file)
    wait_for(lambda: checkpoints(home, "tiny-rank1-seed0"), first)
    first.send_signal(signum)
    code, output, errors = finish(first)
    assert (code, output) == (75, "")
    assert "the same command goes on" in errors
    assert "Traceback" not in errors
    status, _, _ = mlflow_runs(home)
    assert set(status.values()) == {"KILLED"}

    code, _, errors = finish(start(home, "run", file))
    assert code == 0, errors
    assert_complete(home, RANKS, [0], 60)


@pytest.mark.prove
def test_failed_trial_is_named_and_the_others_are_trained(tmp_path):
    home = tmp_path / "home"
    cells = {"diverges": {"model.optimizer.lr": 1e30}, "trains": {}}
    file = write_sweep(tmp_path, cells, [0], 10)
    code, output, errors = finish(start(home, "run", file))
    assert code == 1
    assert "diverges seed 0 FAILED" in errors
    assert "1 of 2 trials finished." in output
    assert "- diverges, seed 0: exit code 1" in output
    status, _, _ = mlflow_runs(home)
    assert status == {"tiny": "FAILED", "tiny-diverges-seed0": "FAILED", "tiny-trains-seed0": "FINISHED"}
