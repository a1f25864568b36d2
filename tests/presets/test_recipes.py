"""`recipe: paper | released`: what it chooses, what wins over it, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import refused

from t6_lightning import presets
from t6_lightning.__main__ import main
from t6_lightning.cli.configuration import T6CLI, with_config_files
from t6_lightning.common.errors import BadInput
from t6_lightning.presets import load_net, model_presets, preset_names, settings
from t6_lightning.runs.fit import RunConfig, changed_settings
from t6_lightning.runs.folder import RunFolder

SMALL = ["--model.net.d_model", "32", "--model.net.n_layers", "1", "--model.net.vocab_size", "50304"]


def parsed(*arguments: str | Path) -> T6CLI:
    return T6CLI("fit", with_config_files("fit", [str(argument) for argument in arguments]))


def written(folder: Path, **content: Any) -> Path:
    file = folder / "own.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


# --- what it chooses ---

# Of the released configurations: windows per micro-batch times this number and the GPUs are 480.
SUMMED = {"small": 5, "medium": 3, "large": 4, "xl": 10} | {"small-mla": 3, "xl-mha": 6}
PEAK = {"small": 6e-4, "medium": 6e-4, "large": 2e-4, "xl": 1e-4}
LAST = {"small": 3e-5, "medium": 3e-5, "large": 1e-5, "xl": 1e-5}
RELEASED = ["mha", "mqa", "gqa", "mla", "mla-as-released", "tpa", "tpa-kvonly"]


@pytest.mark.parametrize("size", PEAK)
@pytest.mark.parametrize("mechanism", RELEASED)
def test_released_presets_have_what_the_released_configurations_say(size: str, mechanism: str) -> None:
    found = settings(presets.FOLDER / "paper" / f"{size}-{mechanism}.yaml", "released")
    model, data = found["model"], found["data"]
    of_size = f"{size}-{mechanism}".removesuffix("-as-released")
    assert model["summed_losses"] == SUMMED.get(of_size, SUMMED[size])
    assert model["optimizer"]["lr"] == PEAK[size]
    assert model["optimizer"]["lr"] * model["schedule"]["init_args"]["min_factor"] == pytest.approx(
        LAST[size]
    )
    assert data["class_path"] == "FineWebEdu"
    assert (data["init_args"]["config"], data["init_args"]["tokenizer"]) == ("sample-100BT", "gpt2")
    attention = model["net"]["attention"]["init_args"]
    if "mla" in mechanism:
        assert (attention["kv_rank"], attention["q_rank"]) == (256, 512)
        assert attention["n_heads"] == {"small": 13, "medium": 23, "large": 34, "xl": 49}[size]


def test_of_all_models_it_chooses_what_no_preset_says(tmp_path: Path) -> None:
    for config in ([], ["--config", written(tmp_path, extends="ablations/kvonly")]):
        cli = parsed(*config, "--recipe", "released")
        attention: Any = cli.model.config.attention
        assert (attention.rope.tables, attention.init_q) == ("reference", "xavier")
        assert cli.model.schedule.warmup_from_zero  # pyright: ignore[reportAttributeAccessIssue]
        assert cli.model.summed_losses is None
        assert cli.settings["model"]["summed_losses"] == 1, "as many as quickstart's micro-batches"
        assert cli.settings["recipe"] == "released"


def test_each_mechanism_takes_of_it_what_it_has(tmp_path: Path) -> None:
    for name in ("mfa", "mla", "gqa"):
        net = load_net(str(written(tmp_path, extends=f"paper/small-{name}", recipe="released")))
        assert net.attention.rope.tables == "reference"
    other = ["--model.net.attention", "MHAConfig", "--model.schedule", "WarmupStableDecay"]
    cli = parsed("--recipe", "released", *other)
    assert cli.model.config.attention.rope.tables == "reference"


@pytest.mark.parametrize(
    "name", ["quickstart", "paper/small-tpa-kvonly", "paper/medium-mla", "data/fineweb-edu"]
)
def test_the_default_is_the_paper_as_ever(name: str, tmp_path: Path) -> None:
    file = presets.FOLDER / f"{name}.yaml"
    assert settings(file) == settings(file, "paper")
    assert settings(file).get("recipe", "paper") == "paper"
    assert "recipes" not in settings(file)


def test_recipes_change_no_model_that_is_listed() -> None:
    assert not [name for name in preset_names() if name.startswith("recipes")]
    assert {load_net(name).attention.rope.tables for name in model_presets()} == {"exact"}


# --- what wins over it ---


def test_files_and_flags_win_over_the_recipe(tmp_path: Path) -> None:
    net = {"attention": {"init_args": {"rope": {"tables": "exact"}}}}
    file = written(tmp_path, extends="paper/small-tpa-kvonly", recipe="released", model={"net": net})
    flags = ["--model.summed_losses", "1", "--data", "PythonDocs", *SMALL]
    for recipe in ([], ["--recipe", "released"], ["--recipe=released"]):
        cli = parsed("--config", file, *recipe, *flags)
        attention: Any = cli.model.config.attention
        assert (attention.rope.tables, attention.init_q, cli.model.summed_losses) == ("exact", "xavier", 1)
        assert type(cli.datamodule).__name__ == "PythonDocs"
        assert cli.settings["recipe"] == "released"
    net = load_net(str(file))
    assert net.attention.rope.tables == "exact"
    assert net.attention.init_q == "xavier"  # pyright: ignore[reportAttributeAccessIssue]


def test_a_flag_wins_over_the_recipe_that_a_file_states(tmp_path: Path) -> None:
    file = written(tmp_path, extends="paper/small-tpa", recipe="released")
    cli = parsed("--config", file, "--recipe", "paper", "--data", "PythonDocs", *SMALL)
    assert (cli.settings["recipe"], cli.model.summed_losses) == ("paper", 1)
    assert cli.model.config.attention.rope.tables == "exact"


def test_a_run_reads_its_own_configuration_back_as_it_was(tmp_path: Path) -> None:
    """Everything is stated in it: neither the table nor a preset's part of the recipe is applied again."""
    flags = ["--model.net.attention.rope.tables", "exact", "--data", "PythonDocs", *SMALL]
    first = parsed("--config", "paper/medium-tpa", "--recipe", "released", *flags).settings
    again = parsed("--config", written(tmp_path, **first)).settings
    assert again == first
    assert first["model"]["optimizer"]["lr"] == 6e-4


# --- what is said and refused ---


def test_a_dry_run_shows_what_the_recipe_decides(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("t6_lightning.cli.dry_run.measure_matrix_rate", lambda *_: 1e12)
    monkeypatch.setattr("datamodules.FineWebEdu.check_sources", lambda data: None)
    flags = ["--data.path", str(home), "--model.summed_losses", "2"]
    assert main(["fit", "--config", "paper/medium-mla", "--recipe", "released", "--dry_run", *flags]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("recipe")]
    assert line == (
        "recipe released: model.net.attention.kv_rank=256, model.net.attention.q_rank=512, "
        "model.net.attention.rope.tables=reference, model.optimizer.lr=0.0006, model.schedule.min_factor=0.05, "
        "model.schedule.warmup_from_zero=True, model.summed_losses=2, data=datamodules.FineWebEdu, "
        "data.config=sample-100BT, data.tokenizer=gpt2"
    )
    assert main(["fit", "--dry_run"]) == 0
    assert "recipe paper\n" in capsys.readouterr().out


def test_unknown_recipes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "fit", "--recipe", "relased")
    assert "recipe='relased' is not possible: choose one of paper, released" in said
    file = written(tmp_path, extends="quickstart", recipe="mine")
    assert f"recipe in {file}='mine' is not possible" in refused(capsys, "params", file)
    assert "'mine' is not possible: choose one of paper" in refused(
        capsys, "fit", "--config", file, "--dry_run"
    )
    for recipes in ({"mine": {}}, {"released": 3}, ["released"], "released"):
        with pytest.raises(BadInput, match=r"recipes in .* it maps some of paper, released to settings"):
            settings(written(tmp_path, extends="quickstart", recipes=recipes))
    assert "model.summed_losses=0 is not possible" in refused(
        capsys, "fit", "--model.summed_losses", "0", "--dry_run"
    )
    said = refused(capsys, "fit", "--model.net.attention.init_q", "normal", "--dry_run")
    assert "init_q='normal' is not possible: choose one of linear, xavier" in said


PAGE = (Path(__file__).parents[2] / "docs" / "paper-and-release.md").read_text()


def test_the_page_names_what_the_recipe_decides_and_its_example_works(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.S)
    file = tmp_path / "example.yaml"
    file.write_text(example)
    cli = parsed("--config", file, "--data", "PythonDocs", *SMALL)
    assert (cli.model.summed_losses, cli.model.schedule.factor(0, 9), cli.settings["recipe"]) == (
        1,
        0,
        "released",
    )
    for name in cli.recipe_settings:
        assert name.rpartition(".")[2] in PAGE, name


# --- runs of versions before these settings ---


def without(plain: Any, *names: str) -> Any:
    if not isinstance(plain, dict):
        return plain
    return {name: without(value, *names) for name, value in plain.items() if name not in names}


def test_a_run_of_a_version_without_these_settings_goes_on(home: Path) -> None:
    cli = parsed()
    run = RunFolder("of-a-version-before")
    run.create(yaml.safe_dump(without(cli.settings, "recipe", "summed_losses", "init_q", "warmup_from_zero")))
    config = RunConfig(cli.settings, as_now=cli.as_now)
    assert changed_settings(run, config) == []
    other = parsed("--recipe", "released", "--model.summed_losses", "2")
    changes = changed_settings(run, RunConfig(other.settings, as_now=other.as_now))
    assert "model.summed_losses was 1 and is 2" in changes
    assert "recipe was 'paper' and is 'released'" in changes
