"""The page on adding a variant does what it says, on a copy of the package."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "adding-a-variant.md").read_text()
# A tiny model in place of the quickstart's; everything else of the commands stays.
SHRUNK = shlex.split(
    "--model.net.d_model 32 --model.net.n_layers 1 --model.net.context 64 --model.net.vocab_size 257"
    " --data.tokenizer bytes --data.batch_size 2 --data.val_tokens 500 --cadence.tokens_per_step 128"
)


def block(language: str) -> str:
    found = re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.S)
    assert len(found) == 1
    return found[0]


def named_file(suffix: str) -> str:
    found = re.search(rf"`(t6_lightning/\S+{suffix})`", PAGE)
    assert found
    return found[1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the page's two files."""
    folder = tmp_path_factory.mktemp("checkout")
    for package in ("t6_lightning", "kernels", "datamodules"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / named_file(r"\.py")).write_text(block("python"))
    (folder / named_file(r"\.yaml")).write_text(block("yaml"))
    return folder


def run(words: list[str], folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder), "T6_HOME": str(folder / "runs")}
    environment.pop("MLFLOW_TRACKING_URI", None)
    words = [sys.executable if word == "python" else word for word in words]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout


def test_every_command_of_the_page_runs(checkout: Path) -> None:
    for line in block("bash").splitlines():
        words = shlex.split(line)
        if "fit" in words:
            words = [*words[: words.index("--trainer.max_steps") + 1], "2", *SHRUNK]
        output = run(words, checkout)
        if "params" in words:
            assert "tied" in output


def test_the_contract_covers_the_new_variant_by_itself(checkout: Path) -> None:
    contract = ROOT / "tests" / "test_attention_contract.py"
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "tied or Tied"]
    output = run(["python", "-m", "pytest", str(contract), *options], checkout)
    passed = re.search(r"(\d+) passed", output)
    assert passed
    # Each property of the contract on the family and on the preset.
    assert int(passed[1]) >= 20
