"""`fit --dry_run` refuses what the run would refuse, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from commands import TINY, refused

from datamodules import PythonDocs
from t6_lightning.__main__ import main
from t6_lightning.runs.folder import RunFolder

TEXTS = ["--data", "TextFiles", "--data.files"]


@pytest.fixture
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "t6"
    monkeypatch.setenv("T6_HOME", str(home))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return home


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([*TEXTS, "FOLDER/missing"], "data.files: 'FOLDER/missing' does not exist"),
        ([*TEXTS, "FOLDER/empty.txt"], "data.files: FOLDER/empty.txt is empty"),
        ([*TEXTS, "FOLDER/good.txt", "--data.val_files", "{a: FOLDER/none}"], "'FOLDER/none' does not exist"),
        (["--data", "Pile", "--data.path", "FOLDER/missing"], "there is no folder 'FOLDER/missing'"),
        (["--data.tokenizer", "FOLDER/missing"], "there is no folder 'FOLDER/missing'"),
        (["--model.net.vocab_size", "200"], "the tokenizer 'bytes' has 257 symbols"),
        (["--init_from", "/dev/null"], "init_from: /dev/null cannot be read as a checkpoint"),
        (["--init_from", "FOLDER/good.txt"], "cannot be read as a checkpoint"),
        (["--init_from", "FOLDER/other.ckpt"], "is not a checkpoint of t6_lightning"),
        (["--ckpt_path", "/"], "/ is a folder, and no checkpoint"),
        (["--ckpt_path", "FOLDER/other.ckpt"], "is not a checkpoint of t6_lightning"),
        (["--trainer.accelerator", "gpu"], "trainer.accelerator='gpu' is not possible"),
        (["--trainer.devices", "3"], "it must be a multiple of batch size 4 · context 32 · 3 ranks"),
        (
            ["--data", "FineWebEdu", "--trainer.max_steps", "-1", "--trainer.max_epochs", "1"],
            "trainer.max_epochs=1 is not possible: FineWebEdu is a stream of unknown length",
        ),
        (["--tracking.experiment", " "], "tracking.experiment=' ' is not possible"),
    ],
)
def test_what_the_run_would_refuse(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    empty_home: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "gpu" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "good.txt").write_text("text\n" * 100)
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.ckpt")
    filled = [argument.replace("FOLDER", str(tmp_path)) for argument in arguments]
    assert sentence.replace("FOLDER", str(tmp_path)) in refused(capsys, "fit", *TINY, "--dry_run", *filled)
    assert not empty_home.exists()


def test_a_tracking_server_that_is_not_there(
    empty_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert "MLFLOW_TRACKING_URI='http://127.0.0.1:9' cannot be used" in refused(
        capsys, "fit", *TINY, "--dry_run"
    )


def test_a_checkpoint_that_does_not_fit(
    home: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = RunFolder("trained").record
    for option in ("--init_from", "--ckpt_path"):
        said = refused(
            capsys, "fit", *TINY, "--dry_run", option, trained, "--model.net.attention.rank_v", "1"
        )
        assert "is of another architecture: attention.init_args.rank_v is 2 there and 1 here" in said
        assert main(["fit", *TINY, "--dry_run", option, str(trained)]) == 0
    assert "is further already" in refused(
        capsys, "fit", *TINY, "--dry_run", "--ckpt_path", trained, "--trainer.max_steps", "7"
    )
    assert "exists with another configuration" in refused(
        capsys, "fit", *TINY, "--dry_run", "--run", "trained", "--model.optimizer.lr", "0.5"
    )
    assert RunFolder("trained").record == before


def test_a_signal_ends_a_dry_run_that_reads_data(
    empty_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def asked_to_stop(data: PythonDocs) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(PythonDocs, "prepare_data", asked_to_stop)
    began = time.monotonic()
    epochs = ["--trainer.max_steps", "-1", "--trainer.max_epochs", "1"]
    assert main(["fit", *TINY, *epochs, "--dry_run"]) == 75
    assert time.monotonic() - began < 50
    assert "stopped by SIGTERM before training began" in capsys.readouterr().err
