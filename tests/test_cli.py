"""The command line: what it accepts, what it refuses and how, and what a run leaves behind."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from commands import TINY, command, fit, run

from t6_lightning import checkpoint_files
from t6_lightning.__main__ import COMMANDS, main
from t6_lightning.presets import preset_names
from t6_lightning.runs import RunFolder

HEAVY = ("mlflow", "datasets", "transformers", "optuna", "lm_eval")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one sentence with which a command line is refused."""
    assert main([str(argument) for argument in arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, errors
    return errors[0]


@pytest.fixture(scope="module")
def trained(shared_home: Path) -> Path:
    """A finished tiny run's checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("T6_HOME", str(shared_home))
        done = fit("trained")
        assert done.returncode == 0, done.stderr
        checkpoint = RunFolder("trained").last_checkpoint()
    assert checkpoint is not None
    return checkpoint


# --- what a run leaves behind ---


def test_a_run_leaves_everything_it_promises(home: Path, trained: Path) -> None:
    from t6_lightning.tracking_store import open_client

    folder = RunFolder("trained")
    assert {"config.yaml", "summary.json", "loss.png", "sample.txt", "environment.json", "data.json"} <= {
        file.name for file in folder.path.iterdir()
    }
    assert (folder.path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    client = open_client()
    run_id = folder.record["mlflow_run_id"]
    tracked = client.get_run(run_id)
    assert tracked.info.status == "FINISHED"
    expected = {
        *("train/loss", "val/loss", "val/perplexity", "val/bits_per_byte", "val/code/bits_per_byte"),
        *("val/prose/bits_per_byte", "perf/tokens_per_second", "perf/peak_memory_bytes", "optim/lr"),
        *("optim/grad_norm", "data/tokens", "kv_cache/bytes_per_token", "kv_cache/predicted_bytes_per_token"),
        *(
            "kv_cache/bytes_at_full_context",
            "kv_cache/ratio_to_mha",
            "decode/tokens_per_second",
            "n_parameters",
        ),
    }
    assert expected <= set(tracked.data.metrics)
    assert tracked.data.metrics["kv_cache/bytes_per_token"] == 2 * (2 + 2) * (3 + 16) * 4
    assert tracked.data.params["model.net.attention.init_args.rank_k"] == "2"
    assert tracked.data.params["model.optimizer.lr"] == "0.003"
    tags = tracked.data.tags
    assert (tags["mechanism"], tags["preset"], tags["corpus"], tags["seed"]) == (
        "tpa",
        "quickstart",
        "PythonDocs",
        "0",
    )
    assert len(tags["data_fingerprint"]) == 64
    if "mlflow.source.git.commit" in tags:
        assert tags["git_dirty"] in ("true", "false")
    artifacts = {file.path for file in client.list_artifacts(run_id)}
    assert artifacts == {
        *("config.yaml", "loss.png", "sample.txt", "summary.json", "environment.json", "data.json"),
    }
    summary = json.loads(folder.summary_file.read_text())
    data = json.loads((folder.path / "data.json").read_text())
    assert summary["val/bits_per_byte"] < summary["unigram_bits_per_byte"] * 1.2
    assert summary["data/tokens"] == 30 * 256
    assert data["domains"].keys() == {"code", "prose"}


def test_what_a_kill_leaves_is_removed_with_old_checkpoints(tmp_path: Path) -> None:
    kept = [f"step-0000000{i}.ckpt{suffix}" for i in (2, 3) for suffix in ("", ".sha256")]
    litter = [
        "step-00000000.ckpt.sha256",
        "step-00000001.ckpt",
        ".step-00000002.ckpt.99",
        ".step-00000009.ckpt.7.sha256",
    ]
    for name in (*kept, *litter, "notes.txt"):
        (tmp_path / name).write_text("x")
    checkpoint_files.prune(tmp_path, keep=2)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*kept, "notes.txt"])


def test_old_checkpoints_are_pruned(home: Path, trained: Path) -> None:
    names = sorted(file.name for file in trained.parent.iterdir())
    assert names == [
        *("step-00000025.ckpt", "step-00000025.ckpt.sha256"),
        *("step-00000030.ckpt", "step-00000030.ckpt.sha256"),
    ]


def test_generate_goes_on_from_the_prompt_and_follows_its_seed(
    home: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        arguments = ["--prompt", "def é", "--max_new_tokens", "40", "--seed", seed]
        assert main(["generate", "--ckpt_path", str(trained), *arguments]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("def é")
    assert texts[0] == texts[1] != texts[2]


def test_evaluate_agrees_with_the_validation_of_the_same_text(
    home: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two files, one with a character of three bytes: every byte is counted, "all" is their sum."""
    (tmp_path / "a.txt").write_text("import os\n" * 30, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "€uro " * 20}) + "\n")
    assert main(["evaluate", "--ckpt_path", str(trained), "--files", str(tmp_path), "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert files["a.txt"]["bytes"] == 300
    assert files["b.jsonl"]["bytes"] == 20 * 7
    assert files["all"]["tokens"] == 300 + 1 + 140 + 1
    nats = files["a.txt"]["loss"] * 301 + files["b.jsonl"]["loss"] * 141
    assert files["all"]["loss"] == pytest.approx(nats / 442)
    assert files["all"]["bits_per_byte"] == pytest.approx(nats / torch.tensor(2.0).log().item() / 440)


def test_validate_and_predict_find_the_configuration_of_the_run(home: Path, trained: Path) -> None:
    import numpy as np

    summary = json.loads(RunFolder("trained").summary_file.read_text())
    done = run("validate", "--ckpt_path", trained)
    assert done.returncode == 0, done.stderr
    assert f"{summary['val/bits_per_byte']:.4f}" in done.stdout
    done = run("predict", "--ckpt_path", trained)
    assert done.returncode == 0, done.stderr
    written = np.load(RunFolder("trained").path / "predictions.npz")
    counted = written["targets"] != -100
    assert written["nll"][counted].mean() == pytest.approx(summary["val/loss"], rel=1e-5)


# --- configuration ---


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_parses_and_survives_its_own_dump(preset: str, tmp_path: Path) -> None:
    from t6_lightning.cli import T6CLI, with_config_files

    model = ["--config", "quickstart"] if preset.startswith("data/") else []
    cli = T6CLI("fit", with_config_files("fit", [*model, "--config", preset]))
    (tmp_path / "again.yaml").write_text(cli.config_yaml)
    again = T6CLI("fit", ["--config", str(tmp_path / "again.yaml")])
    assert again.config_yaml == cli.config_yaml
    written = yaml.safe_load(cli.config_yaml)
    assert written["model"]["net"]["attention"]["class_path"].startswith("t6_lightning.model.attention.")


def test_flags_win_over_the_checkpoint_and_say_so(home: Path, trained: Path) -> None:
    done = run(
        *("fit", "--run", "trained", "--ckpt_path", "last"),
        *("--trainer.max_steps", "32", "--model.optimizer.lr", "0.5", "--model.net.dropout", "0"),
    )
    assert done.returncode == 0, done.stderr
    assert (
        "changed since the checkpoint, and used as it is now: model.optimizer.lr was 0.003 and is 0.5"
        in done.stderr
    )
    from t6_lightning.tracking_store import open_client

    history = open_client().get_metric_history(RunFolder("trained").record["mlflow_run_id"], "optim/lr")
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


# --- bad input: one sentence, exit code 2, nothing left behind ---


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--model.net.attention.rank_k", "0"],
            "attention.rank_k=0 is not possible: it must be an integer >= 1",
        ),
        (["--model.net.attention.head_dim", "7"], "attention.head_dim=7 is not possible: RoPE turns pairs"),
        (["--model.net.attention.rankk", "2"], "'rankk' is not accepted"),
        (["--model.net.d_modle", "2"], "--model.net.d_modle 2 (did you mean model.net.d_model"),
        (["--model.net.d_model", "wide"], "\"model.net.d_model\": Expected a <class 'int'>. Got value: wide"),
        (["--model.optimizer.lr", "-1"], "optimizer.lr=-1.0 is not possible: it must be above 0"),
        (["--config", "paper/smal-tpa"], "neither a file nor a preset: did you mean paper/small-tpa"),
        (
            ["--cadence.tokens_per_step", "1000"],
            "cadence.tokens_per_step=1000 is not possible: it must be a multiple",
        ),
        (["--trainer.max_steps", "0"], "trainer.max_steps=0 is not possible"),
        (
            ["--checkpoints.keep", "0"],
            "checkpoints.keep=0 is not possible: at least one checkpoint must stay",
        ),
        (["--data", "TextFiles", "--data.files", '["no/such.txt"]'], "'no/such.txt' does not exist"),
        (["--data.tokenizer", "/no/such/folder"], "/no/such/folder"),
        (["--ckpt_path", "last"], "--ckpt_path='last' is not possible: there is no run in"),
        (["--ckpt_path", "no.ckpt"], "--ckpt_path='no.ckpt' is not possible: no such file"),
        (["--run", "a/b"], "--run='a/b' is not possible: a run's name is letters, digits"),
        (["--init_from", "no.ckpt"], "--init_from='no.ckpt' is not possible"),
    ],
)
def test_bad_settings(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("T6_HOME", str(tmp_path / "t6"))
    assert sentence in refused(capsys, "fit", *arguments)
    assert not (tmp_path / "t6" / "runs").exists()


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("empty.jsonl", b"", "empty.jsonl is empty"),
        ("corrupt.jsonl", b'{"text": "fine"}\n{"text": "cut off\n', "corrupt.jsonl: line 2 is not JSON"),
        ("latin.txt", b"caf\xe9\n", "latin.txt"),
        ("column.jsonl", b'{"body": "x"}\n', "body"),
    ],
)
def test_bad_files(
    name: str,
    content: bytes,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("T6_HOME", str(tmp_path / "t6"))
    (tmp_path / name).write_bytes(content)
    said = refused(
        capsys,
        "fit",
        "--data",
        "TextFiles",
        "--data.files",
        f'["{tmp_path / name}"]',
        "--data.tokenizer",
        "bytes",
    )
    assert sentence in said
    assert not (tmp_path / "t6" / "runs").exists()


def test_a_tokenizer_larger_than_the_embedding(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "fit", *TINY, "--model.net.vocab_size", "200", "--run", "too-small")
    assert "model.net.vocab_size=200 is not possible: the tokenizer 'bytes' has 257 symbols" in said
    assert not RunFolder("too-small").path.exists()


def test_a_checkpoint_of_another_architecture(
    home: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(
        capsys, "fit", *TINY, "--ckpt_path", trained, "--run", "other", "--model.net.attention.rank_v", "1"
    )
    assert "is of another architecture: attention.init_args.rank_v is 2 there and 1 here" in said
    said = refused(
        capsys, "fit", *TINY, "--init_from", trained, "--run", "other", "--model.net.n_layers", "1"
    )
    assert "is of another architecture: n_layers is 2 there and 1 here" in said
    assert not RunFolder("other").path.exists()


def test_files_that_are_no_checkpoints(
    tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    assert "cannot be read as a checkpoint" in refused(
        capsys, "generate", "--ckpt_path", tmp_path / "text.ckpt", "--prompt", "x"
    )
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.ckpt")
    assert "is not a checkpoint of t6_lightning" in refused(
        capsys, "generate", "--ckpt_path", tmp_path / "other.ckpt", "--prompt", "x"
    )


def test_a_run_name_taken_by_another_configuration(
    home: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "fit", *TINY, "--run", "warm-or-not", "--trainer.max_steps", "0")
    assert "trainer.max_steps=0" in said
    RunFolder("taken").create((RunFolder("trained").config_file).read_text())
    said = refused(
        capsys, "fit", *TINY, "--run", "taken", "--model.optimizer.lr", "0.1", "--trainer.max_steps", "30"
    )
    assert "exists with another configuration" in said
    assert "model.optimizer.lr" in said


def test_a_run_that_another_process_is_training(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunFolder("busy").locked():
        said = refused(capsys, "fit", *TINY, "--run", "busy")
    assert "--run='busy' is not possible: another process is training it now" in said
    assert not RunFolder("busy").exists


def test_a_tracking_server_that_is_not_there(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    said = refused(capsys, "fit", *TINY, "--run", "untracked")
    assert "MLFLOW_TRACKING_URI='http://***@127.0.0.1:9' cannot be used" in said
    assert "secret" not in said
    assert not RunFolder("untracked").path.exists()


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "'trian' is not a command: choose one of fit, validate" in capsys.readouterr().err


# --- failures on the way ---


def test_a_disk_that_fills_up_keeps_the_older_checkpoint(home: Path) -> None:
    """A limit on file size stops a write in the middle, as a full disk does."""
    wide = ["--model.net.d_model", "256"]  # so that a checkpoint is the largest file that is written
    done = fit("full", *wide, "--trainer.max_steps", "4")
    assert done.returncode == 0, done.stderr
    checkpoints = RunFolder("full").checkpoints
    before = {file.name: file.read_bytes() for file in checkpoints.iterdir()}
    limit = max(len(content) for content in before.values()) * 3 // 4
    done = subprocess.run(
        command("fit", *TINY, *wide, "--run", "full", "--ckpt_path", "last", "--trainer.max_steps", "8"),
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert "could not be written" in said[0]
    assert "earlier checkpoints are untouched" in said[0]
    assert "Traceback" not in done.stderr
    assert {file.name: file.read_bytes() for file in checkpoints.iterdir()} == before


def test_a_loss_that_is_no_number_stops_the_run(home: Path) -> None:
    done = fit("diverged", "--model.optimizer.lr", "1e30", "--trainer.gradient_clip_val", "1e30")
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert "not finite at step" in said[0]
    assert "Last good checkpoint: " in said[0]
    assert "Try a lower model.optimizer.lr" in said[0]
    assert "Traceback" not in done.stderr
    assert RunFolder("diverged").record["status"] == "failed"
    for checkpoint in RunFolder("diverged").checkpoints.glob("*.ckpt"):
        state = torch.load(checkpoint, weights_only=True)["state_dict"]
        assert all(value.isfinite().all() for value in state.values())


def test_a_damaged_checkpoint_is_passed_over(home: Path, trained: Path) -> None:
    newest = RunFolder("trained").last_checkpoint()
    assert newest is not None
    whole = newest.read_bytes()
    try:
        for cut in (0, 1, len(whole) - 1, *(len(whole) * eighth // 8 for eighth in range(1, 8))):
            newest.write_bytes(whole[:cut])
            fallback = RunFolder("trained").last_checkpoint()
            assert fallback is not None
            assert fallback.name < newest.name
    finally:
        newest.write_bytes(whole)
    assert RunFolder("trained").last_checkpoint() == newest
