"""bench train: the figures hang together, and what is wrong is said before anything runs."""

from __future__ import annotations

import json

import pytest

from t6_lightning.__main__ import main
from t6_lightning.presets import load_net

SHORT = ["--batch", "2", "--context", "16", "--steps", "3", "--warmup", "0", "--device", "cpu"]


def test_figures_of_a_model(tmp_path, capsys):
    result, profile = tmp_path / "train.json", tmp_path / "profile.txt"
    arguments = ["bench", "train", "quickstart", *SHORT, "--json", str(result), "--profile", str(profile)]
    assert main(arguments) == 0
    assert "quickstart" in capsys.readouterr().out
    [row] = json.loads(result.read_text())["models"]
    net = load_net("quickstart")
    slow, fast = row["tokens_per_second_quartiles"]
    assert slow <= row["tokens_per_second"] <= fast
    assert row["tokens_per_second"] == pytest.approx(2 * 16 / row["step_s"])
    assert row["flops_per_second"] == pytest.approx(row["tokens_per_second"] * net.training_flops(16))
    assert row["n_parameters"] == net.n_parameters()
    assert (row["steps"], row["batch"], row["context"], row["compiled"]) == (3, 2, 16, False)
    assert profile.read_text().startswith("quickstart\n")
    assert "aten::mm" in profile.read_text()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["bench"], "bench: choose one of train, generate"),
        (["bench", "sleep"], "bench sleep: choose one of train, generate"),
        (["bench", "train"], "PRESET"),
        (
            ["bench", "train", "quickstart", "--batch", "0"],
            "--batch=0 is not possible: it must be at least 1",
        ),
        (["bench", "train", "quickstart", "--profile", "no/such/file"], "there is no such folder"),
        (["bench", "train", "quickstart", "nothing-of-the-sort", *SHORT], "nothing-of-the-sort"),
        (["bench", "train", "quickstart", *SHORT, "--attention_backend", "triton"], "NVIDIA GPU"),
        (["bench", "train", "quickstart", "--profile", "."], "--profile='.' is not possible: it is a folder"),
        (["bench", "train", "quickstart", "--json", ""], "--json='' is not possible: it names no file"),
        (
            ["bench", "train", "quickstart", *SHORT, "--batch", "1" + 13 * "0"],
            "--batch 10000000000000 --context 16: a step of quickstart does not fit into memory",
        ),
        (["bench", "train", "quickstart", *SHORT, "--context", "1" + 30 * "0"], "does not fit into memory"),
    ],
)
def test_bad_input_is_one_sentence(arguments, why, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert why in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", [["train", *SHORT], ["generate", "--device", "cpu"]], ids=lambda c: c[0])
def test_two_results_do_not_go_into_one_file(command, tmp_path, capsys):
    file, link = tmp_path / "p.txt", tmp_path / "link"
    link.symlink_to(file)
    said = ["bench", *command, "quickstart", "--profile", str(file), "--json", str(link)]
    assert main(said) == 2
    assert capsys.readouterr().err == (
        f"error: --json='{link}' is not possible: --profile is written there; name another file\n"
    )
    assert not file.exists()
