"""Every command of the README runs, in its order, in one working directory, with a hub of a few small files.

As written, but for size: training gets a tiny model and few steps, a stream few tokens, and where a command times or
imports one of the paper's models, a file that extends its preset makes it small.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from data_helpers import many_texts
from loopback_hub import LoopbackHub
from straight_line import Sizes, random_state
from stream_helpers import fineweb_edu

from datamodules.tokenizer_loading import train_bpe
from t6_lightning.__main__ import main
from t6_lightning.presets import preset_names

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
T6 = ["python", "-m", "t6_lightning"]
SHRUNK = [
    *("--model.net.d_model", "32", "--model.net.n_layers", "1", "--model.net.context", "64"),
    *("--data.batch_size", "2", "--cadence.tokens_per_step", "128", "--data.val_tokens", "500"),
]
SMALL = {"d_model": 64, "n_layers": 1, "vocab_size": 512, "context": 64}
FEWER = {"--tokens": "2000", "--context": "128", "--batch": "2"}
"""Of streams and benchmarks."""


def readme_commands() -> list[list[str]]:
    """The lines of the README's bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.S)
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line.strip()]


def shrunk(command: list[str]) -> list[str]:
    """The same command, in a size that a test has time for."""
    if command[:4] == [*T6, "fit"] and not {"--print_config", "--dry_run"} & set(command):
        return shrunk_training(command)
    if command[:4] in ([*T6, "bench"], [*T6, "import"]):
        command = [small_preset(word) if word.startswith("paper/") else word for word in command]
        if command[4] == "train":
            command = [*command, "--context", "64", "--batch", "2", "--steps", "1", "--warmup", "0"]
    if command[3] in ("bench", "prepare"):
        for flag in FEWER.keys() & set(command):
            command[command.index(flag) + 1] = FEWER[flag]
    return command


def shrunk_training(command: list[str]) -> list[str]:
    steps = [] if "--trainer.max_steps" in command else ["--trainer.max_steps", "2"]
    if "--trainer.max_steps" in command:
        command = [*command[: command.index("--trainer.max_steps") + 1], "3"]
    command = [word.replace("step-00000230", "step-00000003") for word in command]
    return [*command, *SHRUNK, *steps]


def small_preset(name: str) -> str:
    """A file in the working directory that extends the preset and makes the model small."""
    file = Path("small") / f"{Path(name).name}.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump({"extends": name, "model": {"net": SMALL}}))
    return str(file)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the text, the sweeps and the checkpoint that the commands name."""
    for name in ("MLFLOW_TRACKING_URI", "T6_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    documents = [f"Document {i} counts: " + " ".join(map(str, range(i, i + 60))) for i in range(400)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    (tmp_path / "texts" / "documents.jsonl").write_text(lines)
    (tmp_path / "texts" / "one.txt").write_text("A document by itself.")
    (tmp_path / "sweeps").symlink_to(ROOT / "sweeps")
    sizes = Sizes("tpa", d_model=64, n_layers=1, vocab_size=512, n_heads=34, head_dim=64)
    torch.save(random_state(sizes), tmp_path / "reference.pt")
    return tmp_path


@pytest.mark.timeout(2400)
def test_every_command_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(place / "hf"))
    commands = readme_commands()
    assert len(commands) >= 20
    with LoopbackHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.add("HuggingFaceFW/fineweb-edu", fineweb_edu())
        hub.add("gpt2", {"tokenizer.json": train_bpe(many_texts(60), 400)[0].encode()})
        for command in commands:
            words = [sys.executable if word == "python" else word for word in shrunk(command)]
            done = subprocess.run(words, capture_output=True, text=True, timeout=300)
            # No server runs here, and `status` says so.
            expected = 1 if command[2:] == ["mlflow_server", "status"] else 0
            assert done.returncode == expected, (command, done.stdout, done.stderr)


def test_no_command_is_left_out() -> None:
    """Indented lines are not run: they are the first steps, and `make` is asked for each of its targets."""
    indented = re.findall(r"^    (\S.*)$", README, flags=re.M)
    targets = [line.split()[1] for line in indented if line.startswith("make ")]
    assert len(targets) == len(indented) - 1
    assert indented[0].startswith("git clone ")
    for target in {*targets, "lint", "prove", "clean"}:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_flags_that_are_worth_knowing_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    help_text = capsys.readouterr().out
    table = re.findall(r"^\| (`--.*?) \|", README, flags=re.M)
    flags = [flag for row in table for flag in re.findall(r"--[\w.]+", row)]
    assert len(flags) > 10
    assert [flag for flag in flags if not re.search(rf"{re.escape(flag)}\b", help_text)] == []


# Pages on adding something name modules of their own, and have tests that run them.
PARSED = [page for page in sorted((ROOT / "docs").glob("*.md")) if not page.stem.startswith("adding-")]


@pytest.mark.parametrize("page", PARSED, ids=lambda page: page.stem)
def test_trainings_in_the_docs_parse(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --print_config, and with the page's YAML as data.yaml; what they train on is not there."""
    text = page.read_text().replace("\\\n", " ")
    monkeypatch.chdir(tmp_path)
    for content in re.findall(r"```yaml\n(data:.*?)```", text, flags=re.S):
        (tmp_path / "data.yaml").write_text(content)
    presets = set(preset_names())
    for options in re.findall(r"^(?:    )?[^`\n]*-m t6_lightning fit(.*)$", text, flags=re.M):
        words = shlex.split(options)
        if "--config" in words and words[words.index("--config") + 1] not in presets:
            continue  # the preset that the page adds
        with pytest.raises(SystemExit) as left:
            main(["fit", *words, "--print_config"])
        assert left.value.code == 0, options
        capsys.readouterr()
