"""What a sweep is, its study, statistics and report, without training anything."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from sweeps import study as study_module
from sweeps.__main__ import main
from sweeps.definition import BadInput, Cell, Sweep, load_sweep
from sweeps.report import markdown
from sweeps.statistics import compare_with_best, mean_and_spread
from sweeps.trials import Signals, last_words, locked, run_trial

SWEEP_FILE = """
from sweeps.definition import Cell, Sweep

sweep = Sweep(
    hypothesis="A larger rank is better.",
    stopping_rule="All trials to the last step.",
    max_steps=3,
    seeds=[0, 1],
    cells=[Cell(f"rank{rank}", {"model.net.attention.rank_k": rank}) for rank in (1, 2)],
)
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("T6_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    file = tmp_path / "rank.py"
    file.write_text(SWEEP_FILE)
    return load_sweep(str(file))


def some_sweep(**changed) -> Sweep:
    stated = {"hypothesis": "h", "stopping_rule": "s", "max_steps": 1, "seeds": [0], "cells": [Cell("a", {})]}
    return Sweep(**(stated | changed), name="some")


def test_sweep_is_named_for_its_file(sweep):
    assert sweep.name == "rank"
    assert sweep.run_name(sweep.cells[0], 1) == "rank-rank1-seed1"


def test_trials_cover_all_cells_of_a_seed_before_the_next_seed(sweep):
    assert [(cell.name, seed) for cell, seed in sweep.trials] == [
        ("rank1", 0),
        ("rank2", 0),
        ("rank1", 1),
        ("rank2", 1),
    ]


def test_trial_is_a_fit_command_with_the_overrides_of_sweep_and_cell():
    cell = Cell("a", {"model.optimizer.betas": [0.9, 0.99], "data.tokenizer": "bytes"})
    sweep = some_sweep(cells=[cell], overrides={"trainer.precision": "32-true"})
    assert sweep.fit_arguments(cell, 7) == [
        "fit",
        "--config=quickstart",
        "--run=some-a-seed7",
        "--seed_everything=7",
        "--trainer.max_steps=1",
        "--trainer.precision=32-true",
        "--model.optimizer.betas=[0.9, 0.99]",
        "--data.tokenizer=bytes",
    ]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"cells": []}, "cells"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "each seed once"),
        ({"seeds": [-1]}, "seeds -1"),
        ({"max_steps": 0}, "max_steps 0"),
        ({"cells": [Cell("a", {}), Cell("a", {})]}, "cell name 'a'"),
        ({"cells": [Cell("../a", {})]}, "cell name '../a'"),
        ({"overrides": {"seed_everything": 3}}, "override 'seed_everything'"),
        ({"overrides": {"data.files": {1, 2}}}, "JSON"),
    ],
)
def test_impossible_sweep_is_one_sentence(changed, says):
    with pytest.raises(BadInput, match=says):
        some_sweep(**changed)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1\n", "builds no Sweep objects"),
        (SWEEP_FILE + "other = sweep.__class__(**vars(sweep))\n", "builds 2 Sweep objects"),
        ("def broken(:\n", "line 1: invalid syntax"),
        ("1 / 0\n", "ZeroDivisionError: division by zero"),
        (SWEEP_FILE.replace("max_steps=3", "max_steps=-3"), "max_steps -3 is not possible"),
    ],
)
@pytest.mark.parametrize("command", ["run", "status", "report"])
def test_bad_file_exits_2_with_one_line(tmp_path, capsys, text, says, command):
    file = tmp_path / "question.py"
    file.write_text(text)
    assert main([command, str(file)]) == 2
    errors = capsys.readouterr().err
    assert says in errors
    assert errors.count("\n") == 1


def test_missing_file_exits_2(capsys):
    assert main(["run", "no/such/file.py"]) == 2
    assert "FILE 'no/such/file.py' does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    "storage", ["nonsense", "postgresql+nodriver://ada:s3cret@localhost/none", "sqlite:////no/x.db"]
)
def test_bad_storage_exits_2_without_its_password(sweep, tmp_path, capsys, storage):
    assert main(["run", str(tmp_path / "rank.py"), "--storage", storage]) == 2
    errors = capsys.readouterr().err
    assert "--storage" in errors
    assert "s3cret" not in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize("command", ["status", "report"])
def test_status_and_report_of_a_sweep_never_started_exit_2(sweep, tmp_path, home, capsys, command):
    assert main([command, str(tmp_path / "rank.py")]) == 2
    assert "was not started yet" in capsys.readouterr().err
    assert not home.exists()


def take(study, sweep) -> tuple[str, int]:
    trial = study_module.next_trial(study, sweep)
    assert trial is not None
    return study_module.key(trial)


def finish(study, sweep, value: float) -> None:
    trial = study_module.next_trial(study, sweep)
    assert trial is not None
    trial.set_user_attr("run", "x")
    trial.set_user_attr("summary", {"val/bits_per_byte": value})
    study.tell(trial, value)


def test_study_hands_out_each_trial_once_in_order(sweep):
    study = study_module.open_study(sweep, None)
    study_module.queue_unfinished(study, sweep)
    taken = [take(study, sweep) for _ in sweep.trials]
    assert taken == [(cell.name, seed) for cell, seed in sweep.trials]
    assert study_module.next_trial(study, sweep) is None


def test_killed_trial_is_queued_again_and_finished_ones_are_not(sweep):
    study = study_module.open_study(sweep, None)
    study_module.queue_unfinished(study, sweep)
    finish(study, sweep, 2.0)
    killed = take(study, sweep)

    again = study_module.open_study(sweep, None)
    assert study_module.queue_unfinished(again, sweep) == 1
    left = [take(again, sweep) for _ in range(3)]
    assert sorted(left) == [("rank1", 1), ("rank2", 0), ("rank2", 1)]
    assert killed in left
    assert study_module.next_trial(again, sweep) is None


def test_trial_of_another_machine_is_left_to_it(sweep, monkeypatch):
    study = study_module.open_study(sweep, None)
    study_module.queue_unfinished(study, sweep)
    monkeypatch.setattr("platform.node", lambda: "elsewhere")
    there = take(study, sweep)
    monkeypatch.undo()
    assert study_module.queue_unfinished(study, sweep) == 0
    assert there not in [take(study, sweep) for _ in range(3)]
    assert study_module.next_trial(study, sweep) is None


def test_seeds_may_be_added_but_cells_may_not_change(sweep):
    study = study_module.open_study(sweep, None)
    study_module.keep_plan(study, sweep, {})
    stated = {field: getattr(sweep, field) for field in ("hypothesis", "stopping_rule", "max_steps", "cells")}
    study_module.open_study(Sweep(**stated, seeds=[0, 1, 2], name=sweep.name), None)
    with pytest.raises(BadInput, match="started with other cells"):
        study_module.open_study(
            Sweep(**(stated | {"cells": [Cell("rank1", {})]}), seeds=[0], name=sweep.name), None
        )


def test_locked_sweep_refuses_a_second_process(sweep):
    program = "import sys; from sweeps.__main__ import main; sys.exit(main(['run', sys.argv[1]]))"
    with locked(sweep.folder, Signals()):
        second = subprocess.run(
            [sys.executable, "-c", program, str(sweep.folder.parents[2] / "rank.py")],
            capture_output=True,
            text=True,
        )
    assert second.returncode == 2
    assert "is being run by another process already" in second.stderr
    assert second.stderr.count("\n") == 1


def test_failed_trial_gives_exit_code_and_last_words(sweep, tmp_path):
    signals, log = Signals(), tmp_path / "trial.log"
    with locked(sweep.folder, signals) as lock:
        assert run_trial(["no-such-command"], log, lock, signals) == 2
    assert "no-such-command" in last_words(log)
    assert not last_words(log).startswith("error")


def test_mean_and_sample_standard_deviation():
    assert mean_and_spread([1.0, 3.0]) == (2.0, math.sqrt(2))
    assert mean_and_spread([1.0]) == (1.0, None)


def test_paired_p_is_that_of_scipy():
    from scipy.stats import ttest_rel

    a, b = [2.0, 2.1, 2.3, 2.2], [2.05, 2.2, 2.31, 2.3]
    (comparison,) = compare_with_best({"a": dict(enumerate(a)), "b": dict(enumerate(b))})
    assert (comparison.best, comparison.other, comparison.n_pairs) == ("a", "b", 4)
    assert comparison.mean == pytest.approx(0.065)
    assert comparison.p == pytest.approx(ttest_rel(b, a).pvalue)


def test_only_seeds_that_both_have_are_compared():
    (comparison,) = compare_with_best({"a": {0: 1.0, 1: 1.0}, "b": {1: 1.5, 2: 9.0}})
    assert (comparison.mean, comparison.n_pairs, comparison.p) == (0.5, 1, None)


def rows(values: dict[str, list[float]]) -> list[dict]:
    fixed = {"kv_cache/bytes_per_token": 320, "kv_cache/dtype": "float32", "val/perplexity": 30.0}
    return [
        {"cell": cell, "seed": seed, "run": "x", "val/bits_per_byte": value} | fixed
        for cell, found in values.items()
        for seed, value in enumerate(found)
    ]


def table(values: dict[str, list[float]]) -> str:
    seeds = range(max(len(found) for found in values.values()))
    sweep = some_sweep(cells=[Cell(cell, {}) for cell in values], seeds=list(seeds), target_parameters=1000)
    costs = {cell: {"n_heads": 4, "n_parameters": 999, "cache_elements": 80, "tokens": 50} for cell in values}
    return markdown(sweep, rows(values), costs, {})


def test_two_seeds_put_nothing_in_bold_however_clear_it_looks():
    text = table({"a": [2.0, 2.1], "b": [3.0, 3.1001]})
    assert "| a | 4 | 999 | 99.90 % | 320 (float32) | 2 | 2.0500 ± 0.0707 | 30.00 |" in text
    assert "No cell is in bold: 2 paired seeds show nothing, it takes 3 or more." in text


def test_best_is_bold_when_it_differs_from_every_other_cell():
    text = table({"a": [2.0, 2.1, 2.05], "b": [2.5, 2.61, 2.54], "c": [2.6, 2.72, 2.66]})
    assert "| **2.0500 ± 0.0500** |" in text
    assert "a is in bold" in text


def test_best_is_not_bold_when_one_other_cell_is_as_good():
    text = table({"a": [2.0, 2.1, 2.05], "b": [2.5, 2.61, 2.54], "c": [2.1, 2.0, 2.06]})
    assert "| **" not in text
    assert "a does not differ from every other cell" in text


def test_cells_without_a_result_keep_their_line():
    text = table({"a": [2.0], "b": []})
    assert "| b | 4 | 999 | 99.90 % | – | 0 | – | – |" in text
    assert "Nothing to compare yet" in text


def test_importing_the_package_loads_nothing_heavy():
    heavy = ("torch", "optuna", "mlflow", "lightning", "scipy")
    program = f"import sys, sweeps.__main__; print([m for m in {heavy} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"
