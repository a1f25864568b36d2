"""The page on adding a variant does what it says: on a copy of the package, and from a folder of the user's own."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from t6_lightning.checkpoint import files

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "adding-a-variant.md").read_text()
# A tiny model in place of the quickstart's; everything else of the commands stays.
SHRUNK = shlex.split(
    "--model.net.d_model 32 --model.net.n_layers 1 --model.net.context 64 --model.net.vocab_size 257"
    " --data.tokenizer bytes --data.batch_size 2 --data.val_tokens 500 --cadence.tokens_per_step 128"
)
CONTRACT = ROOT / "tests" / "model" / "test_attention_contract.py"
PYTEST = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.S)


TIED, SHARP = blocks("python")
TIED_PRESET, SHARP_FILE = blocks("yaml")
IN_PACKAGE, IN_FOLDER, CONTRACT_COMMAND = (block.splitlines() for block in blocks("bash"))


def named_file(suffix: str) -> str:
    found = re.search(rf"`(t6_lightning/\S+{suffix})`", PAGE)
    assert found
    return found[1]


def copy_of_package(folder: Path) -> Path:
    for package in ("t6_lightning", "kernels", "datamodules"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the page's first two files, and the second variant as a file of the package."""
    folder = copy_of_package(tmp_path_factory.mktemp("checkout"))
    (folder / named_file(r"tied\.py")).write_text(TIED)
    (folder / named_file(r"tied\.yaml")).write_text(TIED_PRESET)
    (folder / named_file(r"sharp\.py")).write_text(SHARP)
    return folder


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the page's own module."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "sharp.py").write_text(SHARP)
    (folder / "sharp.yaml").write_text(SHARP_FILE)
    (folder / "notes.txt").write_text("A few notes to read.\n" * 20)
    return folder


def run(words: list[str], folder: Path, package: Path, code: int = 0, **variables: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(package), "T6_HOME": str(folder / "runs"), **variables}
    environment.pop("MLFLOW_TRACKING_URI", None)
    words = [sys.executable if word == "python" else word for word in words]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == code, (words, done.stdout, done.stderr)
    return done.stdout if code == 0 else done.stderr


def shrunk(line: str) -> list[str]:
    words = shlex.split(line)
    if "fit" in words:
        words = [*words[: words.index("--trainer.max_steps") + 1], "2", *SHRUNK]
    return words


def n_passed(output: str) -> int:
    passed = re.search(r"(\d+) passed", output)
    assert passed
    return int(passed[1])


def test_every_command_of_a_new_family_runs(checkout: Path) -> None:
    for line in IN_PACKAGE:
        output = run(shrunk(line), checkout, checkout)
        if " params " in line:
            assert "tied" in output


def test_the_contract_covers_new_files_of_the_package_by_itself(checkout: Path) -> None:
    chosen = ["-k", "tied or Tied or Sharp"]
    output = run(["python", "-m", "pytest", str(CONTRACT), *PYTEST, *chosen], checkout, checkout)
    # Each property of the contract on both families and on the preset.
    assert n_passed(output) >= 30


def test_every_command_of_a_module_of_ones_own_runs(own_folder: Path) -> None:
    for line in IN_FOLDER:
        output = run(shrunk(line), own_folder, ROOT)
        if " params " in line:
            assert "sharp" in output
    checkpoints = sorted((own_folder / "runs" / "runs").glob("*/checkpoints/*.ckpt"))
    assert [file.parts[-3] for file in checkpoints] == ["sharp", "sharp-by-flag"]
    for file in checkpoints:
        state = files.load(file)
        attention = state["hyper_parameters"]["net"]["attention"]
        assert attention["class_path"] == "sharp.SharpConfig"
        assert (attention["init_args"]["n_heads"], attention["init_args"]["head_dim"]) == (8, 32)
        assert state["state_dict"]["net.blocks.0.attention.sharpness"].shape == (8,)
    # The run goes on from its checkpoint.
    longer = [*shrunk(IN_FOLDER[2]), "--trainer.max_steps", "3", "--ckpt_path", "last"]
    assert "step-00000002" in run(longer, own_folder, ROOT)


def test_a_checkpoint_whose_module_is_elsewhere_says_what_to_do(own_folder: Path, tmp_path: Path) -> None:
    run(shrunk(IN_FOLDER[3]), own_folder, ROOT)
    generate = [*shrunk(IN_FOLDER[4].replace("sharp", "sharp-by-flag")), "--max_new_tokens", "3"]
    elsewhere = {"T6_HOME": str(own_folder / "runs")}
    said = run(generate, tmp_path, ROOT, code=2, **elsewhere)
    assert said.startswith("error: ")
    assert said.endswith(
        ".ckpt: attention.class_path='sharp.SharpConfig' is not possible: no module 'sharp'; run the command from "
        "the module's folder, or add that folder to PYTHONPATH\n"
    )
    path = os.pathsep.join((str(ROOT), str(own_folder)))
    assert run(generate, tmp_path, ROOT, PYTHONPATH=path, **elsewhere).startswith("def main")


@pytest.mark.prove
def test_the_contract_takes_a_module_of_ones_own(own_folder: Path) -> None:
    (line,) = CONTRACT_COMMAND
    variable, *words = shlex.split(line)
    name, _, value = variable.partition("=")
    words = [str(CONTRACT) if word.endswith(CONTRACT.name) else word for word in words]
    output = run([*words, *PYTEST, "-k", "not presets"], own_folder, ROOT, **{name: value})
    # Each property on the family and on the file, and nothing else.
    assert 25 <= n_passed(output) <= 45


def test_the_contract_says_what_a_bypassed_method_needs(own_folder: Path) -> None:
    """The sentence of the page."""
    expand = "    def expand(self, entries, keys):\n        return super().expand(entries, keys)\n"
    (own_folder / "blunt.py").write_text(SHARP + "\n" + expand)
    words = ["python", "-m", "pytest", str(CONTRACT), *PYTEST, "-vv", "-k", "bypassed"]
    environment = {"T6_VARIANTS": "blunt", "COLUMNS": "400"}
    done = subprocess.run(
        [sys.executable, *words[1:]],
        cwd=own_folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 1
    (sentence,) = re.findall(r"```\n(SharpAttention.*?)\n```", PAGE, flags=re.S)
    assert sentence.replace("\n", " ") in done.stdout
