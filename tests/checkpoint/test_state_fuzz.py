"""Random damage to the files of a run, and random values in checkpoints: a sentence, or the undamaged result."""

from __future__ import annotations

import copy
import json
import logging
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hostile
import pytest
import small_runs
from commands import refused
from fuzzing import Outcome, Tally, call, call_anew, flip_or_cut
from small_runs import Small

from t6_lightning.checkpoint import files as checkpoint_files
from t6_lightning.runs.folder import RunFolder


@pytest.fixture
def copied(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    """A copy of the finished run."""
    home = small_runs.copy_home(small.home, tmp_path / "home")
    monkeypatch.setenv("T6_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    return Small(home, small.text, RunFolder("good").checkpoints / small.checkpoint.name)


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What the product warns of; a terminal shows it."""
    said: list[str] = []

    class Noting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler = Noting(logging.WARNING)
    logging.getLogger("t6_lightning").addHandler(handler)
    yield said
    logging.getLogger("t6_lightning").removeHandler(handler)


class Damage:
    """Damages one state file of a run after the other, and gives each to one command.

    Args:
        copied: the run; it is restored after every command.
        run_command: in this process or a new one.
    """

    def __init__(self, copied: Small, warnings: list[str], run_command: Callable[..., Outcome]) -> None:
        self.copied, self.warnings, self.run_command = copied, warnings, run_command
        self.run = RunFolder("good")
        fit = ["fit", *small_runs.arguments(copied.text), "--run", "good"]
        read = ["--ckpt_path", "last", "--run", "good"]
        self.commands: dict[str, list[str | Path]] = {
            "resume": list(fit),
            "resume, its configuration": ["fit", *read],
            "finished": list(fit),
            "evaluate": ["evaluate", *read, "--files", copied.text, "--json"],
            "generate": ["generate", *read, "--prompt", "Line", "--max_new_tokens", "8"],
            "validate": ["validate", *read],
            "consolidate": ["consolidate", *read, "--output", Path("one.ckpt").absolute()],
        }
        self.finished = shutil.copytree(self.run.path, "finished")
        small_runs.interrupt(self.run)
        self.interrupted = shutil.copytree(self.run.path, "interrupted")
        self.database = (copied.home / "mlflow.db").read_bytes()
        self.expected: dict[str, set[str]] = {}
        for name in self.commands:
            self.restore(name)
            self.expected[name] = {self.result(name, self.call(name))}
            if not name.startswith(
                "resume"
            ):  # a fallback to the checkpoint before is said, and gives its result
                for file in self.run.checkpoints.glob("step-00000006*"):
                    file.unlink()
                Path("one.ckpt").unlink(missing_ok=True)
                self.expected[name].add(self.result(name, self.call(name)))

    def restore(self, command: str) -> None:
        shutil.rmtree(self.run.path)
        shutil.copytree(self.interrupted if command.startswith("resume") else self.finished, self.run.path)
        (self.copied.home / "mlflow.db").write_bytes(self.database)
        Path("one.ckpt").unlink(missing_ok=True)
        Path("one.ckpt.sha256").unlink(missing_ok=True)

    def call(self, command: str) -> Outcome:
        self.warnings.clear()
        return self.run_command(*self.commands[command])

    def result(self, command: str, outcome: Outcome) -> str:
        """What a command computed, in words that are equal where it is."""
        if outcome.code != 0:
            return f"exit {outcome.code} {outcome.err}{outcome.crash}"
        if command.startswith(("resume", "finished")):
            if not (self.run.checkpoints / self.copied.checkpoint.name).exists():
                return "it was not trained to its end"
            state = small_runs.state(self.run.checkpoints / self.copied.checkpoint.name)
            weights = [value.tolist() for value in state["state_dict"].values()]
            return json.dumps([small_runs.summary(self.run), weights, state["global_step"]])
        if command == "evaluate":
            return json.dumps(json.loads(outcome.out[outcome.out.index("{") :])["files"])
        if command == "consolidate":
            return str(small_runs.state(Path("one.ckpt"))["state_dict"])
        # The title names the checkpoint.
        return "\n".join(line for line in outcome.out.splitlines() if "step-" not in line and "/" not in line)

    def meet(self, tally: Tally, n: int, seed: int) -> None:
        """Damage `n` times."""
        rng = random.Random(seed)
        for number in range(n):
            command = [*self.commands][number % len(self.commands)]
            self.restore(command)
            files = sorted(
                file
                for file in self.run.path.rglob("*")
                if file.suffix in (".json", ".yaml", ".ckpt", ".sha256")
            )
            file = rng.choice(files)
            if rng.random() < 0.1:
                file.unlink()
            else:
                file.write_bytes(flip_or_cut(file.read_bytes(), rng))
            outcome = self.call(command)
            case = f"{number}, {command}, {file.relative_to(self.run.path)}"
            tally.add(
                case, outcome, lambda outcome, name=command: self.result(name, outcome) in self.expected[name]
            )


def test_damaged_state_files(copied: Small, warnings: list[str]) -> None:
    tally = Tally("damaged state files")
    Damage(copied, warnings, call).meet(tally, 28, seed=1)
    tally.close()


@pytest.mark.prove
@pytest.mark.timeout(3600)
def test_500_damaged_state_files(copied: Small, warnings: list[str]) -> None:
    tally = Tally("damaged state files")
    Damage(copied, warnings, call).meet(tally, 500, seed=0)
    tally.close()


@pytest.mark.prove
@pytest.mark.timeout(3600)
def test_15_damaged_state_files_as_real_commands(
    copied: Small, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    tally = Tally("damaged state files, new processes")
    Damage(copied, warnings, call_anew).meet(tally, 15, seed=2)
    tally.close()


# --- checkpoints with unusable values ---


def readers(file: Path, copied: Small) -> dict[str, list[str | Path]]:
    settings = small_runs.arguments(copied.text)
    return {
        "resume": ["fit", *settings, "--ckpt_path", file, "--run", "from-file"],
        "evaluate": ["evaluate", "--ckpt_path", file, "--files", copied.text, "--json"],
        "validate": ["validate", *settings, "--ckpt_path", file],
        "generate": ["generate", "--ckpt_path", file, "--prompt", "Line", "--max_new_tokens", "8"],
    }


def meet_unusable(copied: Small, n: int, seed: int, run_command: Callable[..., Outcome]) -> None:
    """Checkpoints of step 4 with an unusable value each; `n` of them are given to one command each."""
    rng, marker = random.Random(seed), Path("code-was-run").absolute()
    tally = Tally("checkpoints with unusable values", marker)
    good = small_runs.state(checkpoint_files.of_step(RunFolder("good").checkpoints, 4))
    run = RunFolder("from-file")

    def result(command: str, outcome: Outcome) -> Any:
        if outcome.code != 0:
            return outcome
        if command == "resume":
            if not (run.checkpoints / copied.checkpoint.name).exists():
                return "it was not trained to its end"
            return str(small_runs.state(run.checkpoints / copied.checkpoint.name)["state_dict"])
        return [line for line in outcome.out.splitlines() if ".ckpt" not in line]

    expected: dict[str, Any] = {}
    for number in range(-4, n):  # the first ones are whole
        state = copy.deepcopy(good)
        what = hostile.mutate(state, rng) if number >= 0 else "nothing"
        file = hostile.write(state, Path("mutant.ckpt").absolute())
        command = [*readers(file, copied)][number % 4]
        shutil.rmtree(run.path, ignore_errors=True)
        outcome = run_command(*readers(file, copied)[command])
        if number < 0:
            expected[command] = result(command, outcome)
            assert outcome.code == 0, outcome
        else:
            case = f"{number}, {command}, {what}"
            tally.add(case, outcome, lambda outcome, name=command: result(name, outcome) == expected[name])
    tally.close()


def test_a_position_in_the_data_that_is_damaged_is_named(
    copied: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    good = small_runs.state(checkpoint_files.of_step(RunFolder("good").checkpoints, 4))
    for name in ("fingerprint", "samples"):
        state = copy.deepcopy(good)
        del state["loops"]["fit_loop"]["state_dict"]["combined_loader"][0][name]
        file = hostile.write(state, Path("mutant.ckpt").absolute())
        said = refused(capsys, *readers(file, copied)["resume"])
        assert f"checkpoint {file} cannot be restored: '{name}'" in said


def test_checkpoints_with_unusable_values(copied: Small) -> None:
    meet_unusable(copied, 40, 1, call)


@pytest.mark.prove
@pytest.mark.timeout(3600)
def test_300_checkpoints_with_unusable_values(copied: Small) -> None:
    meet_unusable(copied, 300, 0, call)


@pytest.mark.prove
@pytest.mark.timeout(3600)
def test_15_checkpoints_with_unusable_values_as_real_commands(
    copied: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    meet_unusable(copied, 15, 2, call_anew)
