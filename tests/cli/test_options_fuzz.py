"""Random values for every option, and random configuration files: a sentence or a result, never a traceback."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
from collections.abc import Iterator
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fuzzing import Tally, call, call_anew, sample

from datamodules.tokenizer import Tokenizer
from t6_lightning.checkpoint import files
from t6_lightning.model.attention.tpa import TPAConfig
from t6_lightning.model.config import T6Config
from t6_lightning.model.t6 import T6
from t6_lightning.presets import FOLDER, preset_names

CONFIG = T6Config(
    attention=TPAConfig(n_heads=2, head_dim=16), d_model=32, n_layers=1, vocab_size=257, context=32
)
GIBIBYTES = 12
"""What this process may allocate beyond what it has: an option that asks for more must say so."""

BOMB = "[&a [x, x, x, x, x, x, x, x, x]" + "".join(
    f", &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in pairwise("abcdefgh")
)

VALUES = [
    f"{BOMB}]",
    f"{{a: {BOMB}]}}",
    *("", " ", "0", "-1", "1", "3", "1.5", "-1.5", "nan", ".nan", "inf", "-inf", "1e400", "1e-400", "1e9"),
    *(
        "9" * 40,
        "9" * 5000,
        str(2**31),
        str(2**63),
        str(-(2**63)),
        "0x1F",
        "1_0",
        "1:30",
        "\N{ARABIC-INDIC DIGIT ONE}",
    ),
    *(
        "true",
        "false",
        "null",
        "None",
        "~",
        "[]",
        "{}",
        "[1, 2]",
        "[[]]",
        "{a: 1}",
        "{a: [1, {b: c}]}",
        "- 1",
        "[a",
    ),
    *(
        "'",
        '"',
        "a: b: c",
        "*x",
        "&a [*a]",
        "{a: &a [*a]}",
        "!!set {a}",
        "[" * 3000,
        "{a: " * 200,
        "\n",
        "\t",
        "\0",
    ),
    *("é", "日本語", "\N{RIGHT-TO-LEFT OVERRIDE}", "\N{GRINNING FACE}", "\udcff", "a" * 300, "a" * 100_000),
    *(
        "/",
        "/dev/null",
        "/dev/zero",
        "/dev/full",
        ".",
        "..",
        "../../esc",
        "missing/x",
        "~nobody",
        "~",
        "text.txt",
    ),
    *(
        "$(touch MARKER)",
        "`touch MARKER`",
        "; touch MARKER",
        "%s%n",
        "{0.__class__}",
        "--",
        "-",
        "=",
        "a=b",
        "@x",
    ),
    "!!python/object/apply:os.system ['touch MARKER']",
    "{class_path: os.system, init_args: {command: touch MARKER}}",
    *(
        "os.system",
        "builtins.eval",
        "TPAConfig",
        "tpaconfig",
        "Cosine",
        "TextFiles",
        "EarlyStopping",
        "datamodules.C4",
    ),
    *(
        "{class_path: EarlyStopping}",
        "{class_path: ModelCheckpoint, init_args: {monitor: 3}}",
        "{init_args: {}}",
    ),
    *(
        "quickstart",
        "paper/small-tpa",
        "last",
        "auto",
        "gpu",
        "tpu",
        "mps",
        "ddp",
        "fsdp2",
        "bf16-mixed",
        "16-true",
    ),
    *(
        "64",
        "bytes",
        "bpe",
        "tiny.ckpt",
        "tiny.yaml",
        "transformer-engine",
        "simple",
        "norm",
        "matrices",
        "heads",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with a text, a model and its checkpoint; a limit on what may be allocated."""
    path = tmp_path_factory.mktemp("fuzz")
    (path / "text.txt").write_text("".join(f"Line {i} of a text.\n" for i in range(400)))
    torch.manual_seed(0)
    state = {
        "state_dict": {f"net.{name}": value for name, value in T6(CONFIG).state_dict().items()},
        "hyper_parameters": {"net": CONFIG.architecture(), "confine_to_documents": False},
        "tokenizer": Tokenizer("bytes").to_json(),
        "optimizer_states": [],
        "global_step": 1,
        "pytorch-lightning_version": version("lightning"),
    }
    files.save(state, path / "tiny.ckpt")
    data = {
        "files": str(path / "text.txt"),
        "txt_documents": "line",
        "tokenizer": "bytes",
        "val_fraction": 0.3,
    }
    tiny = {
        "extends": "quickstart",
        "model": {"net": CONFIG.to_dict()},
        "data": {"class_path": "TextFiles", "init_args": data | {"batch_size": 2}},
        "cadence": {"tokens_per_step": 128},
        "trainer": {"max_steps": 2},
    }
    (path / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setenv("T6_HOME", str(path / "home"))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("COLUMNS", "120")
        patch.setattr("t6_lightning.cli.dry_run.measure_matrix_rate", lambda *given: 1e9)
        limits = resource.getrlimit(resource.RLIMIT_AS)
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + (GIBIBYTES << 30), limits[1]))
        yield path
        resource.setrlimit(resource.RLIMIT_AS, limits)


def commands() -> dict[str, tuple[list[str], list[str]]]:
    """Command -> arguments with which it works in little time, and its options."""
    from t6_lightning.cli.configuration import T6CLI, with_config_files

    parser = T6CLI("fit", with_config_files("fit", ["--config", "tiny.yaml"])).parser
    settings = [
        action.dest for action in parser._actions if action.option_strings and "help" not in action.dest
    ]
    settings += [
        f"data.{name}" for name in ("files", "val_files", "exclude", "tokenizer", "num_workers", "nothing")
    ]
    settings += [
        f"data.{name}" for name in ("batch_size", "val_fraction", "text_field", "val_tokens", "class_path")
    ]
    settings += [
        f"model.net.attention.{name}" for name in ("rank_q", "head_dim", "rope.dims", "init", "nothing")
    ]
    settings += [
        f"model.schedule.{name}" for name in ("warmup_steps", "min_factor", "class_path", "init_args")
    ]
    of_checkpoint = ["--ckpt_path", "tiny.ckpt"]
    evaluated = ["--config", "tiny.yaml", *of_checkpoint]
    return {
        "fit": (["--config", "tiny.yaml", "--dry_run"], settings),
        "validate": (evaluated, settings),
        "test": (evaluated, settings),
        "predict": (evaluated, settings),
        "generate": (
            [*of_checkpoint, "--prompt", "x", "--max_new_tokens", "2"],
            ["ckpt_path", "run", "prompt", "prompt_file", "max_new_tokens", "temperature", "top_k", "seed"],
        ),
        "evaluate": (
            [*of_checkpoint, "--files", "text.txt", "--txt_documents", "line"],
            ["ckpt_path", "run", "files", "text_field", "txt_documents", "context", "batch_size", "json"],
        ),
        "cache": (["tiny.yaml"], ["context", "batch", "dtype", "json"]),
        "params": (["tiny.yaml"], ["match", "to", "allow", "context", "init", "json"]),
        "consolidate": ([*of_checkpoint, "--output", "whole.ckpt"], ["ckpt_path", "run", "output"]),
        "import": (
            ["tiny.ckpt", "--config", "tiny.yaml", "--output", "imported.ckpt", "--tokenizer", "bytes"],
            ["config", "output", "tokenizer"],
        ),
        "bench generate": (
            ["tiny.yaml", "--context", "40", "--batch", "1", "--new_tokens", "2"],
            ["context", "batch", "new_tokens", "dtype", "device", "profile", "json"],
        ),
        "bench train": (
            ["tiny.yaml", "--steps", "1", "--warmup", "0", "--batch", "1"],
            ["steps", "warmup", "batch", "context", "device", "recompute", "attention_backend", "json"],
        ),
    }


LONG_WORK = {
    "steps": 10**4000,
    "warmup": 10**4000,
    "new_tokens": 10**4000,
    "max_new_tokens": 2**40,
    "context": 2**40,
    "batch": 2**40,
}
"""Option -> from which value on it is refused, before which it makes a command as long as it says."""


def value_of(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.8:
        return rng.choice(VALUES)
    if kind < 0.9:
        return str(rng.choice((rng.randint(-10, 10**6), rng.uniform(-2, 2), 10 ** rng.randint(2, 30))))
    return "".join(chr(rng.choice((rng.randrange(32, 127), rng.randrange(160, 0xD7FF)))) for _ in range(12))


def flags(n: int, rng: random.Random) -> list[list[str]]:
    """Command lines with one to three options set to random values; most are of `fit`."""
    known = commands()
    others = [name for name in known if name != "fit"]
    lines = []
    for _ in range(n):
        name = "fit" if rng.random() < 0.6 else rng.choice(others)
        working, options = known[name]
        line = [*name.split(), *working]
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            option, value = rng.choice(options), value_of(rng)
            if (
                option in LONG_WORK
                and value.isdecimal()
                and len(value) < 4000
                and 64 < int(value) < LONG_WORK[option]
            ):
                continue  # right, and asks for hours
            line += [f"--{option}={value}"] if rng.random() < 0.7 else [f"--{option}", value]
        lines.append(line)
    return lines


INSERTED = ("\t", "[", "{", "&a ", "*a", "!!set ", "\0", ": ", "- ", "é", "\n---\n", "'", "<<: ")


def structure(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.random() if depth < 4 else 1.0
    if kind < 0.35:
        keys = (
            "model",
            "net",
            "trainer",
            "data",
            "class_path",
            "init_args",
            "extends",
            "cadence",
            "x",
            3,
            None,
            True,
        )
        return {rng.choice(keys): structure(rng, depth + 1) for _ in range(rng.randint(0, 4))}
    if kind < 0.55:
        return [structure(rng, depth + 1) for _ in range(rng.randint(0, 4))]
    return rng.choice(
        (None, True, -1, 0, 2**70, 1.5, float("nan"), "", "x", "TPAConfig", "quickstart", value_of(rng))
    )


def mutated(settings: Any, rng: random.Random) -> Any:
    """Settings with something replaced, removed or renamed."""
    if not isinstance(settings, dict) or not settings or rng.random() < 0.15:
        return structure(rng, 2)
    name = rng.choice(list(settings))
    changed = dict(settings)
    kind = rng.random()
    if kind < 0.1:
        del changed[name]
    elif kind < 0.2:
        changed[f"{name}x"] = changed.pop(name)
    else:
        changed[name] = mutated(changed[name], rng)
    return changed


def config_files(n: int, rng: random.Random, folder: Path) -> list[list[str]]:
    """Command lines with configuration files: random structures, mutated presets, and damaged texts of them."""
    lines = []
    for i in range(n):
        preset = (FOLDER / f"{rng.choice(preset_names())}.yaml").read_text()
        kind = rng.random()
        if kind < 0.25:
            text = yaml.safe_dump(structure(rng))
        elif kind < 0.75:
            text = yaml.safe_dump(mutated(yaml.safe_load(preset), rng))
        else:
            at = rng.randrange(len(preset))
            inserted = rng.choice(INSERTED)
            text = preset[:at] + inserted + preset[at + rng.choice((0, 0, 1, 9)) :]
        file = folder / f"{i}.yaml"
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
        lines.append(["fit", "--config", "tiny.yaml", "--config", file.name, "--dry_run"])
    return lines


def run_all(name: str, lines: list[list[str]], folder: Path, anew: int, rng: random.Random) -> None:
    """Run them here, and some as new processes. Nothing may stay behind in this process or outside the folder."""
    marker = folder / "MARKER"
    tally = Tally(name, marker)
    handlers = [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    environment, path, beside = dict(os.environ), list(sys.path), set(folder.parent.iterdir())
    for line in lines:
        line = [word.replace("MARKER", str(marker)) for word in line]
        tally.add(shown_line(line), call(*line), lambda outcome: True)
    for line in sample([line for line in lines if not any("\0" in word for word in line)], anew, rng):
        tally.add(f"anew: {shown_line(line)}", call_anew(*line), lambda outcome: True)
    tally.close()
    assert [
        signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    ] == handlers
    assert sys.path == path
    changed = {
        key for key in environment.keys() | os.environ.keys() if environment.get(key) != os.environ.get(key)
    }
    assert not {
        key for key in changed if not key.startswith(("PL_", "MLFLOW_", "PYTORCH_", "TOKENIZERS_", "KMP_"))
    }
    assert set(folder.parent.iterdir()) == beside
    assert call("fit", "--config", "tiny.yaml", "--dry_run").code == 0


def shown_line(line: list[str]) -> str:
    return " ".join(word if len(word) < 60 else f"{word[:60]}…" for word in line)


def test_some_values(folder: Path) -> None:
    rng = random.Random(1)
    run_all("flag values", flags(40, rng), folder, 0, rng)


def test_some_files(folder: Path) -> None:
    rng = random.Random(2)
    run_all("YAML files", config_files(20, rng, folder), folder, 0, rng)


@pytest.mark.prove
@pytest.mark.timeout(7200)
def test_a_thousand_values(folder: Path) -> None:
    rng = random.Random(3)
    run_all("flag values", flags(1000, rng), folder, 20, rng)


@pytest.mark.prove
@pytest.mark.timeout(7200)
def test_two_hundred_files(folder: Path) -> None:
    rng = random.Random(4)
    run_all("YAML files", config_files(200, rng, folder), folder, 10, rng)
