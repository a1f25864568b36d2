"""Training steps are those of an earlier commit to the last bit: `fit` of both versions side by side.

A change that should alter numbers moves BEFORE to the commit that makes it.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from record_steps import (
    BATCH,
    FOLDER_OF_THIS_FILE,
    RECORD_STEPS,
    STEPS,
    lines_of,
    settings,
    windows_at_most,
    write_corpus,
)

BEFORE = "b8d6b712413b281620f185aa856e654c6fe53d41"
SECONDS = 300
FIGURES = ("lr", "loss", "grad_norm", "samples", "tokens")


def repository() -> Path:
    """The root of the working tree, wherever below it this file is."""
    return next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").exists())


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tree of BEFORE."""
    folder = tmp_path_factory.mktemp("before")
    if shutil.which("git") is None:
        pytest.skip(f"git is needed to take commit {BEFORE[:7]} from the history")
    archive = folder / "tree.tar"
    done = subprocess.run(
        ["git", "archive", "--output", archive, BEFORE], cwd=repository(), capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"commit {BEFORE[:7]} is not in this repository's history: {done.stderr.strip()}")
    (folder / "tree").mkdir()
    subprocess.run(["tar", "-xf", archive, "-C", folder / "tree"], check=True)
    return folder / "tree"


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def start(
    tree: Path, folder: Path, world: int, flags: list[str], home: Path | None = None
) -> list[subprocess.Popen[bytes]]:
    """Start `fit` of the version in `tree` on `world` ranks, as torchrun would.

    All it writes is below `folder`, its runs in `home` if one is given.
    """
    command = [sys.executable, "-m", "t6_lightning", "fit", "--run", "steps", *settings(world), *flags]
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    environment |= {
        "PYTHONPATH": os.pathsep.join(map(str, (tree, FOLDER_OF_THIS_FILE))),
        "T6_HOME": str(home or folder / "home"),
        RECORD_STEPS: str(folder),
        "OMP_NUM_THREADS": "1",
    }
    if world > 1:
        command += ["--trainer.devices", str(world), "--trainer.strategy", "ddp"]
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "GROUP_RANK": "0"}
        environment |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        environment |= {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "False"}
    folder.mkdir(parents=True)
    processes = []
    for rank in range(world):
        own = environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {})
        with (folder / f"rank-{rank}.txt").open("wb") as output:
            processes.append(
                subprocess.Popen(command, cwd=tree, env=own, stdout=output, stderr=subprocess.STDOUT)
            )
    return processes


def finish(processes: list[subprocess.Popen[bytes]], folder: Path) -> None:
    """Wait for all ranks, which must end well; none is left behind."""
    try:
        codes = [process.wait(SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    output = "\n".join((folder / f"rank-{rank}.txt").read_text() for rank in range(len(processes)))
    assert codes == [0] * len(processes), output


@pytest.mark.prove
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("corpus", ["TextFiles", "PythonDocs"])
@pytest.mark.parametrize("world", [1, 2], ids=["1 rank", "2 ranks"])
def test_steps_are_those_of_the_commit_before(before: Path, tmp_path: Path, world: int, corpus: str) -> None:
    flags = write_corpus(tmp_path / "corpus") if corpus == "TextFiles" else []
    trees = {"before": before, "now": repository()}
    for name, tree in trees.items():
        finish(start(tree, tmp_path / name, world, flags), tmp_path / name)

    compared = 0
    for rank in range(world):
        found = {name: lines_of(tmp_path / name, rank) for name in trees}
        for name, tree in trees.items():
            assert Path(found[name][0]["package"]).is_relative_to(tree), "each version imports its own code"
            assert found[name][0]["world"] == world
        (_, old, old_validations), (_, new, new_validations) = found["before"], found["now"]
        assert [line["step"] for line in old] == [line["step"] for line in new] == list(range(1, STEPS + 1))
        for old_line, new_line in zip(old, new, strict=True):
            for figure in FIGURES:
                assert new_line[figure] == old_line[figure], (
                    f"{figure} of step {old_line['step']}, rank {rank}"
                )
                compared += 1
        assert len(old_validations) >= 2
        # At the same steps; their text is not the same since a test split was carved out of it.
        assert [v["validated_at"] for v in new_validations] == [v["validated_at"] for v in old_validations]
        assert all(len(line["samples"]) == 2 and len(line["samples"][0]) == BATCH for line in old)
        assert len({line["loss"] for line in old}) == len({line["grad_norm"] for line in old}) == STEPS
        if corpus == "TextFiles":
            last = old[-1]["samples"][-1][-1]
            assert last > windows_at_most(tmp_path / "corpus"), "training crosses the end of the data"
    print(f"\n{corpus}, {world} rank(s): {compared} figures of {STEPS} steps equal those of {BEFORE[:7]}")


@pytest.mark.prove
@pytest.mark.timeout(1200)
def test_a_run_of_the_commit_before_goes_on(before: Path, tmp_path: Path) -> None:
    """Killed after its checkpoint, the same command of the working tree ends as if it had always been that."""
    flags = write_corpus(tmp_path / "corpus")
    through, killed, rest = tmp_path / "through", tmp_path / "killed", tmp_path / "rest"
    finish(start(repository(), through, 1, flags), through)
    (process,) = start(before, killed, 1, flags)
    checkpoints = killed / "home" / "runs" / "steps" / "checkpoints"
    while not list(checkpoints.glob("step-*.ckpt")):
        assert process.poll() is None, (killed / "rank-0.txt").read_text()
        time.sleep(0.02)
    process.kill()
    process.wait()
    finish(start(repository(), rest, 1, flags, killed / "home"), rest)
    output = (rest / "rank-0.txt").read_text()
    assert "going on from step-00000040.ckpt" in output, output
    (_, expected, _), (_, found, _) = lines_of(through, 0), lines_of(rest, 0)
    assert found == expected[40:]
    print(f"\na run that {BEFORE[:7]} began: steps 41 to {STEPS} equal to the last bit")
