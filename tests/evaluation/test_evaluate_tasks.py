"""`evaluate --tasks` and lm-eval's own command line, on a checkpoint and local rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import refused
from evaluation_rows import write_rows

from datamodules.tokenizer import Tokenizer
from t6_lightning.__main__ import main
from t6_lightning.checkpoint import files
from t6_lightning.evaluation import lm_eval
from t6_lightning.model.attention.tpa import TPAConfig
from t6_lightning.model.config import T6Config
from t6_lightning.training.module import T6Module


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small model of random weights, in a run's folder."""
    torch.manual_seed(0)
    module = T6Module(T6Config(257, 32, 2, 512, TPAConfig(n_heads=3, head_dim=16)))
    module.configure_model()
    with torch.no_grad():
        for value in module.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    file = tmp_path / "run/checkpoints/step-00000001.ckpt"
    file.parent.mkdir(parents=True)
    state = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams), "global_step": 1}
    torch.save(state | {"tokenizer": Tokenizer("bytes").to_json()}, file)
    files.add_checksum(file)
    return file


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for task, split in (
        ("arc_easy", "test"),
        ("boolq", "validation"),
        ("arc_easy", "train"),
        ("boolq", "train"),
    ):
        write_rows(tmp_path / "rows", task, split, 9)
    return tmp_path / "rows"


def test_tasks_are_scored_with_and_without_examples(
    checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [
        "evaluate",
        "--ckpt_path",
        str(checkpoint),
        "--task_data",
        str(data),
        "--tasks",
        "arc_easy",
        "boolq",
    ]
    assert main([*asked, "--num_fewshot", "0", "1", "--limit", "7", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["task"], row["num_fewshot"], row["metric"]) for row in found["tasks"]] == [
        ("arc_easy", 0, "acc_norm"),
        ("arc_easy", 1, "acc_norm"),
        ("boolq", 0, "acc"),
        ("boolq", 1, "acc"),
    ]
    assert all(row["answer_bits_per_byte"]["n"] == 7 for row in found["tasks"])
    scores = [row[row["metric"]]["value"] for row in found["tasks"] if row["num_fewshot"] == 0]
    assert found["averages"]["0"]["score"]["value"] == pytest.approx(sum(scores) / 2)
    # Cloze forms are asked without examples, once.
    bits = [row["answer_bits_per_byte"]["value"] for row in found["tasks"]]
    assert bits[2] == bits[3]
    assert bits[0] != bits[1]
    assert main(asked) == 0
    assert "average of 2" in capsys.readouterr().out


def test_lm_evals_own_command_gives_the_same_accuracy(
    checkpoint: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    task: dict[str, Any] = {
        "task": "made_up",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data / "arc_easy/test.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{choices.label.index(answerKey)}}",
        "doc_to_choice": "{{choices.text}}",
        "metric_list": [{"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "own").mkdir()
    (tmp_path / "own/made_up.yaml").write_text(json.dumps(task))
    run = [
        *("lm_eval", "run", "--model", "t6", "--model_args", f"ckpt_path={tmp_path / 'run'}"),
        *(
            "--tasks",
            "made_up",
            "--include_path",
            str(tmp_path / "own"),
            "--output_path",
            str(tmp_path / "out"),
        ),
    ]
    monkeypatch.setattr(sys, "argv", run)
    assert lm_eval.main() == 0
    (written,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(written.read_text())["results"]["made_up"]["acc_norm,none"]
    capsys.readouterr()
    asked = [
        "evaluate",
        "--ckpt_path",
        str(checkpoint),
        "--task_data",
        str(data),
        "--tasks",
        "arc_easy",
        "--json",
    ]
    assert main(asked) == 0
    assert json.loads(capsys.readouterr().out)["tasks"][0]["acc_norm"]["value"] == theirs
    for arguments, sentence in (
        ("ckpt_path=nowhere.ckpt", "error: "),
        ("pretrained=gpt2", "model_args.pretrained='gpt2' is not possible: choose from ckpt_path"),
    ):
        monkeypatch.setattr(sys, "argv", [*run[:5], arguments, *run[6:]])
        assert lm_eval.main() == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "--files=None is not possible: give --files, --tasks or both"),
        (["--tasks", "arc"], "--tasks='arc' is not possible: choose paper or of arc_easy, arc_challenge"),
        (["--tasks", "piqa", "--task_data", "nowhere"], "--task_data='nowhere' is not possible"),
        (["--tasks", "piqa", "--limit", "0"], "--limit=0 is not possible: it must be at least 1"),
        (["--tasks", "piqa", "--num_fewshot", "-1"], "--num_fewshot=-1 is not possible"),
    ],
)
def test_what_is_refused_before_anything_is_read(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refused(capsys, "evaluate", "--ckpt_path", "any.ckpt", *arguments)
