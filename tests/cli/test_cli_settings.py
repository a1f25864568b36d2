"""What the command line accepts: presets, flags, and what its commands say without training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import fit, run

from t6_lightning.__main__ import COMMANDS, main
from t6_lightning.presets import preset_names
from t6_lightning.runs.folder import RunFolder

HEAVY = ("mlflow", "datasets", "transformers", "optuna", "lm_eval")


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_parses_and_survives_its_own_dump(preset: str, tmp_path: Path) -> None:
    from t6_lightning.cli.configuration import T6CLI, with_config_files

    model = ["--config", "quickstart"] if preset.startswith("data/") else []
    cli = T6CLI("fit", with_config_files("fit", [*model, "--config", preset]))
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(cli.settings))
    again = T6CLI("fit", ["--config", str(tmp_path / "again.yaml")])
    assert again.settings == cli.settings
    written = cli.settings
    assert written["model"]["net"]["attention"]["class_path"].startswith("t6_lightning.")


@pytest.mark.parametrize(
    ("given", "files"),
    [("some/folder", "some/folder"), ("[a, b c]", ["a", "b c"]), ("[ab]*.txt", "[ab]*.txt")],
)
def test_files_are_one_path_or_a_list(given: str, files: str | list[str]) -> None:
    from t6_lightning.cli.configuration import T6CLI, with_config_files

    cli = T6CLI("fit", with_config_files("fit", ["--data", "TextFiles", "--data.files", given]))
    assert cli.settings["data"]["init_args"]["files"] == files


def test_flags_win_over_the_checkpoint_and_say_so(home: Path) -> None:
    assert fit("flags", "--trainer.max_steps", "30").returncode == 0
    done = run(
        *("fit", "--run", "flags", "--ckpt_path", "last"),
        *("--trainer.max_steps", "32", "--model.optimizer.lr", "0.5", "--model.net.dropout", "0"),
    )
    assert done.returncode == 0, done.stderr
    assert (
        "changed since the checkpoint, and used as it is now: model.optimizer.lr was 0.003 and is 0.5"
        in done.stderr
    )
    from t6_lightning.runs.tracking_store import open_client

    history = open_client().get_metric_history(RunFolder("flags").record["mlflow_run_id"], "optim/lr")
    assert max(m.value for m in history if m.step > 30) > 0.04


def test_init_from_takes_weights_only(home: Path, trained: Path) -> None:
    done = fit("warm", "--init_from", trained, "--trainer.max_steps", "1")
    assert done.returncode == 0, done.stderr
    warm = json.loads(RunFolder("warm").summary_file.read_text())
    cold = json.loads(RunFolder("trained").summary_file.read_text())
    assert warm["step"] == 1
    assert warm["val/loss"] == pytest.approx(cold["val/loss"], rel=0.05)


def test_dry_run_says_the_costs_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T6_HOME", str(tmp_path / "none"))
    done = run("fit", "--config", "paper/small-tpa", "--dry_run")
    assert done.returncode == 0, done.stderr
    for part in ("124,342,272", "49,152,000,000 = 100,000 steps", "disk", "memory", "time, at least"):
        assert part in done.stdout
    assert not (tmp_path / "none").exists()


def test_commands_that_only_count_do_not_import_lightning() -> None:
    for arguments in (["params", "quickstart"], ["cache", "quickstart"]):
        code = (
            f"import sys; from t6_lightning.__main__ import main; main({arguments!r}); "
            "sys.exit('lightning' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_print_config_imports_nothing_heavy_that_lightning_does_not() -> None:
    code = (
        "import sys, lightning.pytorch; before = set(sys.modules)\n"
        "from t6_lightning.__main__ import main\n"
        "try: main(['fit', '--print_config'])\n"
        "except SystemExit: pass\n"
        f"sys.exit(str([m for m in {HEAVY} if m in sys.modules and m not in before] or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == ""


def test_params_json_has_the_promised_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["params", "paper/medium-tpa", "paper/medium-mha", "--json"]) == 0
    tpa, mha = json.loads(capsys.readouterr().out)
    promised = {
        "preset",
        "mechanism",
        "n_parameters",
        "cache_elements_per_token_per_layer",
        "cache_bytes_per_token",
    }
    assert promised | {"flops_per_token"} <= tpa.keys()
    assert (tpa["cache_elements_per_token_per_layer"], mha["cache_elements_per_token_per_layer"]) == (
        444,
        2048,
    )


def test_cache_measures_what_it_predicts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "quickstart", "--context", "7", "64", "--batch", "1", "3", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["context"], row["batch"]) for row in rows] == [(7, 1), (7, 3), (64, 1), (64, 3)]
    for row in rows:
        assert row["measured_bytes"] == row["predicted_bytes"] > 0


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    assert left.value.code == 0
    assert "usage: python -m t6_lightning " + name in " ".join(capsys.readouterr().out.split())
