"""A value that cannot be is refused with the option, the value and what is allowed, whatever layer finds it."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
from commands import TINY, refused

from t6_lightning.cli.refusals import blamed, did_you_mean, with_option, words
from t6_lightning.common.errors import BadInput


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        # jsonargparse
        (
            ["--model.net.n_layers", "[1, 2]"],
            "model.net.n_layers=[1, 2] is not possible: it must be a whole number",
        ),
        (
            ["--model.net.attention.rank_k", "x"],
            "model.net.attention.rank_k='x' is not possible: it must be a whole number",
        ),
        (
            ["--data", "TextFiles", "--data.files", "[1, {}]"],
            "data.files=1 is not possible: it must be a list of texts",
        ),
        (
            ["--model.optimizer.betas", "[1]"],
            "model.optimizer.betas=[1] is not possible: it must be a list of 2",
        ),
        (["--tracking.tags", "5"], "tracking.tags=5 is not possible: it must be a mapping of text to text"),
        (
            ["--trainer.max_steps", "1e400"],
            "trainer.max_steps='inf' is not possible: it must be a whole number",
        ),
        (["--trainer.callbacks", "EarlyStopping"], "trainer.callbacks.monitor is missing"),
        (["--model", "3"], "model=3 is not possible: it must be a mapping of settings"),
        (
            ["--model.net.attention.rope.dims", "x"],
            "model.net.attention.rope.dims='x' is not possible: it must be",
        ),
        # classes by name
        (["--model.net.attention", "TPAconfig"], "MLAConfig, TPAConfig (did you mean TPAConfig?)"),
        (
            ["--model.schedule", "Cosin"],
            "model.schedule='Cosin' is not possible: choose one of Cosine, Warmup",
        ),
        (["--trainer.callbacks", "EarlyStoping"], "(did you mean EarlyStopping"),
        (
            ["--model.net.attention", "null"],
            "model.net.attention=None is not possible: choose one of MFAConfig",
        ),
        # argparse
        (["--dry_run=3"], "--dry_run: ignored explicit argument '3'"),
        (["words"], "unrecognized arguments: words"),
        # Lightning, building the Trainer
        (["--trainer.devices=1.5"], "trainer.devices='1.5' is not possible: `devices` selected with"),
        (["--trainer.devices=[0]"], "trainer.devices=[0] is not possible"),
        (["--trainer.accelerator=tpu"], "trainer.accelerator='tpu' is not possible: Requirement 'torch_xla"),
        (
            ["--trainer.precision=transformer-engine"],
            "trainer.precision='transformer-engine' is not possible: Requirement",
        ),
        (["--trainer.max_time", "x"], "trainer.max_time='x' is not possible"),
        # a setting that another one does not fit
        (
            ["--cadence.tokens_per_step", "256", "--data.batch_size", "16"],
            "cadence.tokens_per_step=256 is not possible: it must be a multiple of batch size 16",
        ),
        (["--data.text_field", "\udcff"], "'\\udcff' is not possible: it is not valid UTF-8"),
        (["--run", "a" * 256], "--run='aaa"),
    ],
)
def test_the_sentence_names_option_value_and_what_is_allowed(
    arguments: list[str], sentence: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refused(capsys, "fit", *TINY, "--dry_run", *arguments)


def test_an_option_that_does_not_fit_the_preset_is_named_and_not_only_the_presets_own(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "fit", "--data.num_workers", "0", "--data.batch_size", "3", "--dry_run")
    assert said.startswith(
        "error: data.batch_size='3': cadence.tokens_per_step=2048 is not possible: it must be"
    )


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            "model: {net: {d_model: x}}",
            "model.net.d_model='x' is not possible: it must be a whole number (in ",
        ),
        ("model: {net: {d_modle: 3}}", "is not accepted (did you mean model.net.d_model"),
        ("modle: 3", "'modle' is not accepted (did you mean model?)"),
        ("model: 3", "model=3 is not possible: it must be a mapping of settings such as net (in "),
        ("trainer: null", "trainer=None is not possible: it must be a mapping of settings"),
        (
            "model: {net: {d_model: null}}",
            "model.net.d_model=None is not possible: it must be a whole number",
        ),
        ("data: {class_path: Nope}", "data={'class_path': 'Nope'} is not possible: choose one of C4, Fine"),
        ("trainer: {devices: 1.5}", "trainer.devices=1.5 is not possible"),
    ],
)
def test_the_same_holds_for_files_which_are_named(
    content: str, sentence: str, tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    said = refused(capsys, "fit", "--config", "quickstart", "--config", tmp_path / "mine.yaml", "--dry_run")
    assert sentence in said
    assert "(in " not in sentence or str(tmp_path / "mine.yaml") in said


BOMB = "[&a [x, x, x, x, x, x, x, x, x]" + "".join(
    f", &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in pairwise("abcdefgh")
)


def test_a_value_that_is_hostile_yaml_is_refused_at_once(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    for value in ("[" * 5000, f"{BOMB}]", "{a: &a [*a]}", "9" * 5000):
        for option in ("model.net.d_model", "tracking.tags", "run"):
            said = refused(capsys, "fit", f"--{option}={value}", "--dry_run")
            assert f"--{option}=" in said
            assert "is not possible: " in said
            assert len(said) < 400
    assert time.monotonic() - began < 20


def test_a_file_as_a_value_is_read_within_the_same_bounds(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bomb.yaml").write_text(f"a: {BOMB}]")
    for option in ("data", "model.net.attention", "trainer.callbacks", "trainer", "model"):
        began = time.monotonic()
        said = refused(capsys, "fit", *TINY, f"--{option}={tmp_path / 'bomb.yaml'}", "--dry_run")
        assert "is not possible" in said
        assert time.monotonic() - began < 20


def test_types_in_words() -> None:
    assert words(int | None) == "a whole number, or null"
    assert (
        words(dict[str, list[str] | str] | None) == "a mapping of text to a list of texts, or text, or null"
    )
    assert words(tuple[float, float]) == "a list of 2 numbers"
    assert words(Literal["a", "b"]) == "one of a, b"
    assert words(Any) == "any value"


def test_near_names_are_suggested() -> None:
    assert did_you_mean("tpaconfig", ["TPAConfig", "MLAConfig"]) == " (did you mean TPAConfig?)"
    assert did_you_mean("xyz", ["TPAConfig"]) == ""


def test_of_two_options_that_fail_together_both_are_named() -> None:
    def attempt(arguments: list[str]) -> None:
        if "--a" in arguments and "--b.init_args.c=2" in arguments:
            raise ValueError("too large")

    said = blamed(
        ValueError("too large"), ["--config=x.yaml", "--a", "1", "--b.init_args.c=2", "--d"], attempt
    )
    assert isinstance(said, BadInput)
    assert str(said) == "a='1' with b.c='2' is not possible: ValueError: too large"


def test_a_sentence_about_a_value_begins_with_its_option() -> None:
    given = ["fit", "--data.init_args.files=/no/such", "--model.net.d_model", "32", "--init_from", "x.ckpt"]
    assert with_option("files: '/no/such' is missing", given) == "data.files: '/no/such' is missing"
    assert with_option("x.ckpt is damaged", given) == "init_from: x.ckpt is damaged"
    assert with_option("model.net.d_model=32 is odd, says x.ckpt", given).startswith("model.net.d_model")
    assert with_option("32 is odd", given) == "32 is odd"
