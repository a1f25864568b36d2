"""`evaluate` says where the text that it is given is text that the run trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from commands import refused

from datamodules.corpora import TextFiles
from datamodules.tokenizer import Tokenizer
from t6_lightning.__main__ import main
from t6_lightning.checkpoint import files
from t6_lightning.model.attention.mha import MHAConfig
from t6_lightning.model.config import T6Config
from t6_lightning.model.t6 import T6
from t6_lightning.runs.folder import RunFolder

CONFIG = T6Config(
    attention=MHAConfig(n_heads=2, head_dim=16), d_model=32, n_layers=1, vocab_size=257, context=32
)


@pytest.fixture
def run_on_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """The folder of a run over `texts`, lines of which a third was held out."""
    monkeypatch.setenv("T6_HOME", str(tmp_path / "home"))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("".join(f"Line {i} of a text.\n" for i in range(60)))
    (tmp_path / "other.txt").write_text("".join(f"Another line, {i}.\n" for i in range(9)))
    arguments = {"files": str(tmp_path / "texts"), "txt_documents": "line", "val_fraction": 0.3}
    arguments |= {"tokenizer": "bytes", "context": 32}
    data = TextFiles(**arguments)
    data.prepare_data()
    run = RunFolder("mine")
    run.create(yaml.safe_dump({"data": {"class_path": "datamodules.TextFiles", "init_args": arguments}}))
    (run.path / "expected").write_text(str(len(data.corpus.training_documents)))
    torch.manual_seed(0)
    state = {
        "state_dict": {f"net.{name}": value for name, value in T6(CONFIG).state_dict().items()},
        "hyper_parameters": {"net": CONFIG.architecture(), "confine_to_documents": False},
        "tokenizer": Tokenizer("bytes").to_json(),
    }
    files.save(state, run.checkpoints / "step-00000001.ckpt")
    return run


def test_training_text_is_named_as_such(
    run_on_texts: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = int((run_on_texts.path / "expected").read_text())
    command = [
        "evaluate",
        "--ckpt_path",
        "last",
        "--run",
        "mine",
        "--txt_documents",
        "line",
        "--json",
        "--files",
    ]
    assert main([*command, str(tmp_path / "texts"), str(tmp_path / "other.txt")]) == 0
    written = capsys.readouterr()
    assert f"warning: the model was trained on {expected} of these 69 documents" in written.err
    assert json.loads(written.out)["training_documents"] == expected
    assert 30 < expected < 60

    assert main([*command, str(tmp_path / "other.txt")]) == 0
    written = capsys.readouterr()
    assert "warning" not in written.err
    assert json.loads(written.out)["training_documents"] == 0


def test_where_it_cannot_be_told_cheaply_nothing_is_said(
    run_on_texts: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (tmp_path / "home" / "tokens").iterdir():
        file.unlink()
    command = ["evaluate", "--ckpt_path", "last", "--txt_documents", "line", "--json", "--files"]
    assert main([*command, str(tmp_path / "other.txt")]) == 0
    assert json.loads(capsys.readouterr().out)["training_documents"] is None


def test_windows_far_beyond_the_training_context_are_refused(
    run_on_texts: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--ckpt_path", "last", "--files", tmp_path / "other.txt", "--context"]
    said = refused(capsys, *command, "99999999999")
    assert "--context=99999999999 is not possible: it must be at most 2048, 64 times the training's" in said
