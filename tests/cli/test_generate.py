"""`generate`: prompts from files and pipes, bounds, warnings, the run's dtype, and readers who leave."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import command, refused

from datamodules.tokenizer import Tokenizer
from t6_lightning.__main__ import main
from t6_lightning.checkpoint import files
from t6_lightning.checkpoint.load import load_trained
from t6_lightning.common.console import PIPE_CLOSED
from t6_lightning.model.attention.tpa import TPAConfig
from t6_lightning.model.config import T6Config
from t6_lightning.model.t6 import T6

CONTEXT = 32
CONFIG = T6Config(
    attention=TPAConfig(n_heads=2, head_dim=16), d_model=32, n_layers=1, vocab_size=300, context=CONTEXT
)


def write_checkpoint(file: Path, **more: Any) -> Path:
    """A random model of 300 rows, of which 257 are bytes and the separator."""
    torch.manual_seed(0)
    files.save(
        {
            "state_dict": {f"net.{name}": value for name, value in T6(CONFIG).state_dict().items()},
            "hyper_parameters": {"net": CONFIG.architecture(), "confine_to_documents": False},
            "tokenizer": Tokenizer("bytes").to_json(),
            **more,
        },
        file,
    )
    return file


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny.ckpt")


def generated(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, *arguments: str | Path
) -> tuple[str, str]:
    """What `generate` prints: the text, and what stands on standard error."""
    assert main(["generate", "--ckpt_path", str(checkpoint), *map(str, arguments)]) == 0
    written = capsys.readouterr()
    return written.out, written.err


def test_a_prompt_comes_from_the_command_line_a_file_or_standard_input(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt.txt").write_text("é\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("é\n".encode())))
    options = ["--max_new_tokens", "9"]
    texts = [
        generated(capsys, checkpoint, *given, *options)
        for given in (["--prompt", "é\n"], ["--prompt_file", tmp_path / "prompt.txt"], ["--prompt_file", "-"])
    ]
    assert texts[0] == texts[1] == texts[2]
    assert texts[0][0].startswith("é\n")
    assert texts[0][1] == ""


def test_prompts_that_cannot_be_read(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "long.txt").write_bytes(b"x" * (4 << 20) + b"x")
    for given, sentence in (
        ([], "one of the arguments --prompt --prompt_file is required"),
        (["--prompt", "x", "--prompt_file", "y"], "not allowed with argument --prompt"),
        (["--prompt_file", tmp_path / "none"], "cannot be read: "),
        (["--prompt_file", tmp_path], "cannot be read: "),
        (["--prompt_file", "\0"], "cannot be read: "),
        (["--prompt_file", tmp_path / "latin.txt"], "is not UTF-8: byte 3"),
        (["--prompt_file", tmp_path / "long.txt"], "it is longer than 4,194,304 bytes"),
        (["--prompt", "x" * 100_000], "the prompt has 100,001 tokens: at most 128 are read"),
        (["--prompt", "x", "--max_new_tokens", str(2**70)], "it must be from 1 to 1,099,511,627,776"),
        (["--prompt", "x", "--max_new_tokens", str(2**40)], "needs a larger cache than memory holds"),
    ):
        assert sentence in refused(capsys, "generate", "--ckpt_path", checkpoint, *given)


def test_text_past_the_training_context_is_warned_of(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    n_prompt = CONTEXT - 10 - 1  # and the separator before it
    text, said = generated(capsys, checkpoint, "--prompt", "x" * n_prompt, "--max_new_tokens", "10")
    assert said == ""
    text, said = generated(capsys, checkpoint, "--prompt", "x" * n_prompt, "--max_new_tokens", "11")
    assert (
        "warning: a prompt of 22 tokens and 11 new ones go past the 32 tokens of the training context" in said
    )
    assert text.startswith("x" * n_prompt)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("32-true", torch.float32)])
def test_the_cache_has_the_dtype_of_the_run(
    precision: str, dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    checkpoint = write_checkpoint(tmp_path / "run.ckpt", precision=precision)
    assert load_trained(checkpoint).dtype == dtype
    made = []
    new_cache = T6.new_cache
    monkeypatch.setattr(T6, "new_cache", lambda *given: made.append(new_cache(*given)) or made[-1])
    generated(capsys, checkpoint, "--prompt", "x", "--max_new_tokens", "5")
    assert [tensor.dtype for cache in made for tensor in cache.tensors.values()] == [dtype] * len(
        made[0].tensors
    )


def test_a_run_saves_its_precision(trained: Path) -> None:
    assert files.load(trained)["precision"] == "32-true"


@pytest.mark.parametrize("arguments", [["generate"], ["params"], ["--help"]], ids=str)
def test_a_reader_who_leaves_ends_the_command_quietly(arguments: list[str], checkpoint: Path) -> None:
    if arguments == ["generate"]:
        arguments = ["generate", "--ckpt_path", str(checkpoint), "--prompt", "x", "--max_new_tokens", "3000"]
    with subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read().decode()
        code = process.wait(60)
    assert "Traceback" not in said
    assert "BrokenPipe" not in said
    assert code == PIPE_CLOSED
