"""The pages on adding a corpus and a callback do what they say, from a folder with the page's files."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A tiny model in place of the quickstart's; everything else of the commands stays.
SHRUNK = shlex.split(
    "--model.net.d_model 32 --model.net.n_layers 1 --model.net.context 64 --model.net.vocab_size 257"
    " --data.tokenizer bytes --data.batch_size 2 --data.val_tokens 500 --cadence.tokens_per_step 256"
)
STEPS = "10"


class Page:
    """A page's blocks, by language."""

    def __init__(self, name: str) -> None:
        self.text = (ROOT / "docs" / f"{name}.md").read_text()

    def blocks(self, language: str) -> list[str]:
        return re.findall(rf"```{language}\n(.*?)```", self.text, flags=re.S)

    def write(self, folder: Path) -> None:
        """The page's files, under the names that stand before them."""
        for language, suffix in (("python", "py"), ("yaml", "yaml")):
            names = dict.fromkeys(re.findall(rf"`(\w+\.{suffix})`", self.text))
            for name, block in zip(names, self.blocks(language), strict=True):
                (folder / name).write_text(block)

    def commands(self) -> list[list[str]]:
        return [shlex.split(line) for block in self.blocks("bash") for line in block.splitlines()]


def run(words: list[str], folder: Path) -> str:
    if "fit" in words:
        words = [*words, "--trainer.max_steps", STEPS, *SHRUNK]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "T6_HOME": str(folder / "home")}
    environment.pop("MLFLOW_TRACKING_URI", None)
    words = [sys.executable if word == "python" else word for word in words]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout + done.stderr


def history(
    folder: Path, run_name: str, monkeypatch: pytest.MonkeyPatch
) -> dict[str, list[tuple[int, float]]]:
    """Metric -> (step, value) in the run's MLflow store."""
    from mlflow.tracking import MlflowClient

    from t6_lightning.runs.folder import RunFolder
    from t6_lightning.runs.tracking_store import tracking_uri

    monkeypatch.setenv("T6_HOME", str(folder / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    client, run_id = MlflowClient(tracking_uri()), RunFolder(run_name).record["mlflow_run_id"]
    names = client.get_run(run_id).data.metrics
    return {name: [(m.step, m.value) for m in client.get_metric_history(run_id, name)] for name in names}


@pytest.mark.timeout(900)
def test_adding_a_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Page("adding-a-corpus")
    page.write(tmp_path)
    rows = [
        f'"Row {i} says ""{" ".join(map(str, range(i, i + 40)))}"".",{"odd" if i % 2 else "even"}'
        for i in range(300)
    ]
    (tmp_path / "rows.csv").write_text("\n".join(["text,kind", *rows]) + "\n")
    inspected, trained, _, validated = (run(words, tmp_path) for words in page.commands())
    assert "Row " in inspected
    assert "300" in inspected
    assert f"step {STEPS}" in trained
    assert "bits_per_byte" in validated
    for name in ("table", "table-by-flag"):
        found = history(tmp_path, name, monkeypatch)
        assert {"val/odd/bits_per_byte", "val/even/bits_per_byte"} <= set(found)


@pytest.mark.timeout(900)
def test_adding_a_callback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Page("adding-a-callback")
    page.write(tmp_path)
    for words in page.commands():
        run(words, tmp_path)
    watched = history(tmp_path, "watched", monkeypatch)
    last_step, norm = watched["optim/weight_norm"][-1]
    assert last_step == int(STEPS)
    ((step, accuracy),) = watched["val/token_accuracy"]
    assert step == int(STEPS)
    assert 0 < accuracy < 1
    for name in ("by-flag", "stopping"):
        by_flag = history(tmp_path, name, monkeypatch)
        assert by_flag["optim/weight_norm"][-1] == (last_step, pytest.approx(norm))
