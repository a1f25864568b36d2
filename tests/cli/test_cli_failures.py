"""What the command line refuses, and how runs fail: one sentence, an exit code, nothing lost."""

from __future__ import annotations

import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from commands import TINY, command, fit, refused

from t6_lightning.__main__ import main
from t6_lightning.runs.folder import RunFolder

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
        (
            ["--model.net.d_model", "wide"],
            "model.net.d_model='wide' is not possible: it must be a whole number",
        ),
        (["--model.optimizer.lr", "-1"], "optimizer.lr=-1.0 is not possible: it must be above 0"),
        (["--config", "paper/smal-tpa"], "neither a file nor a preset: did you mean paper/small-tpa"),
        (
            ["--cadence.tokens_per_step", "1000"],
            "cadence.tokens_per_step=1000 is not possible: it must be a multiple",
        ),
        (["--trainer.profiler", "torch"], "trainer.profiler='torch' is not possible: choose one of simple,"),
        (["--trainer.max_steps", "0"], "trainer.max_steps=0 is not possible"),
        # What Lightning would do behind the back of what counts steps and tokens here.
        (["--trainer.max_epochs", "0"], "trainer.max_epochs=0 is not possible: it must be at least 1, or -1"),
        (["--trainer.max_steps", "-1"], "trainer.max_steps=-1 is not possible: it must be at least 1, or -1"),
        (
            ["--trainer.limit_train_batches", "3"],
            "trainer.limit_train_batches=3 is not possible: leave it out",
        ),
        (["--trainer.limit_val_batches", "0"], "as data.val_tokens says on how much is validated"),
        (["--trainer.accumulate_grad_batches", "4"], "as cadence.tokens_per_step decides it"),
        (["--trainer.val_check_interval", "1"], "as cadence.validate_every_tokens decides it"),
        (["--trainer.fast_dev_run", "true"], "trainer.fast_dev_run=True is not possible"),
        (
            ["--trainer.gradient_clip_val", "-1"],
            "trainer.gradient_clip_val=-1 is not possible: it must be above",
        ),
        (["--trainer.gradient_clip_algorithm", "value"], "gradients are clipped by their norm"),
        (
            ["--trainer.devices", "-1"],
            "trainer.devices='-1' is not possible: it must be at least 1, `auto` for",
        ),
        (
            ["--trainer.num_nodes", "2"],
            "trainer.num_nodes=2 is not possible: nothing has started processes on",
        ),
        (
            ["--trainer.precision", "half"],
            "trainer.precision='half' is not possible: choose one of 64, 32, 16",
        ),
        (["--seed_everything", "-1"], "seed_everything=-1 is not possible: it must be a whole number from 0"),
        (["--data.seed", "5"], "--data.seed is not possible: --seed_everything sets it"),
        (
            ["--data.init_args.context=16"],
            "--data.init_args.context is not possible: --model.net.context sets",
        ),
        (["--data", "Nope"], "data='Nope' is not possible: choose one of C4, FineWebEdu, Mixture, Pile"),
        (
            ["--cadence.tokens_per_step", "0"],
            "cadence.tokens_per_step=0 is not possible: it must be at least 1",
        ),
        (["--init_from", "."], "--init_from='.' is not possible: that folder is no checkpoint"),
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


@pytest.mark.parametrize("arguments", [["--init_from", "no.ckpt"], ["--run", "a/b"]], ids=str)
def test_a_dry_run_refuses_what_the_run_would(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is not possible" in refused(capsys, "fit", *TINY, "--dry_run", *arguments)


def test_less_training_text_than_one_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before there is a run: the corrected command takes its name."""
    monkeypatch.setenv("T6_HOME", str(tmp_path / "t6"))
    (tmp_path / "little.txt").write_text("".join(f"Line {i}.\n" for i in range(50)))
    little = [
        "--data",
        "TextFiles",
        "--data.files",
        str(tmp_path / "little.txt"),
        "--data.txt_documents",
        "line",
    ]
    long = ["--model.net.context", "4000", "--cadence.tokens_per_step", "16000", "--run", "little"]
    said = refused(capsys, "fit", *TINY, *little, "--data.val_fraction", "0.3", *long)
    assert "context: 4000 is longer than all training text, which has" in said
    assert not (tmp_path / "t6" / "runs").exists()


def test_a_home_that_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "home").write_text("")
    monkeypatch.setenv("T6_HOME", str(tmp_path / "home"))
    assert "is a file; allowed: a folder" in refused(capsys, "fit", *TINY)


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
    shutil.copytree(trained.parent, RunFolder("taken").checkpoints, dirs_exist_ok=True)
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


def test_a_run_that_failed_before_its_first_checkpoint_takes_another_configuration(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from t6_lightning.runs.tracking_store import open_client

    done = fit("too-fast", "--model.optimizer.lr", "1e30", "--trainer.gradient_clip_val", "1e30")
    assert done.returncode == 1
    folder = RunFolder("too-fast")
    before = folder.record["mlflow_run_id"]
    for number in range(2):
        done = fit("too-fast", "--trainer.max_steps", "2")
        assert done.returncode == 0, done.stderr
        # The second start finds the run finished, of this configuration.
        assert (
            done.stderr.count("run too-fast ended before its first checkpoint and begins again") == 1 - number
        )
    assert "model.optimizer.lr was 1e+30 and is 0.003" not in done.stderr
    now = folder.record["mlflow_run_id"]
    assert before != now, "parameters of an MLflow run stay"
    lr = [open_client().get_run(run_id).data.params["model.optimizer.lr"] for run_id in (before, now)]
    assert lr == ["1e+30", "0.003"]
    assert open_client().get_run(before).info.status == "FAILED"

    # What has trained is not given up so.
    again = ["fit", *TINY, "--run", "too-fast", "--trainer.max_steps", "2"]
    said = refused(capsys, *again, "--model.optimizer.lr", "0.1")
    assert "exists with another configuration (model.optimizer.lr was 0.003 and is 0.1)" in said
    # Nor where all that it saved is damaged.
    for checkpoint in folder.checkpoints.glob("*.ckpt"):
        checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    for other in ([], ["--model.optimizer.lr", "0.1"]):
        said = refused(capsys, *again, *other)
        assert "--run='too-fast' is not possible: none of that run's 1 checkpoints is whole; choose" in said
    assert folder.record["status"] == "finished"


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
