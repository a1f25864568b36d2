"""bench generate: whole models side by side, on a CPU in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from t6_lightning.__main__ import main
from t6_lightning.cli import bench_generate
from t6_lightning.cli.bench_generate import filled_cache, random_model
from t6_lightning.presets import load_net

SMALL = ["--context", "32", "--batch", "2", "--new_tokens", "3", "--dtype", "float32", "--device", "cpu"]


def test_figures_of_two_presets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, profile = tmp_path / "generate.json", tmp_path / "profile.txt"
    files = ["--json", str(file), "--profile", str(profile)]
    assert main(["bench", "generate", "quickstart", "ablations/shared-b", *SMALL, *files]) == 0
    assert "aten::mm" in profile.read_text().split("ablations/shared-b")[0]
    assert "one further token, 2 rows of 32 tokens" in capsys.readouterr().out
    rows = json.loads(file.read_text())
    assert [row["preset"] for row in rows] == ["quickstart", "ablations/shared-b"]
    for row in rows:
        low, high = row["seconds_per_token_quartiles"]
        assert 0 < low <= row["seconds_per_token"] <= high
        assert row["tokens_per_second"] == 2 / row["seconds_per_token"]
        config = load_net(row["preset"])
        assert row["cache_logical_bytes"] == 2 * 32 * config.cache_bytes_per_token(4)
        assert row["weight_bytes"] == 4 * config.n_parameters()
        # The timed tokens read 30, 31 and 32 cached ones.
        least = row["weight_bytes"] + 2 * 31 * config.cache_bytes_per_token(4)
        assert row["floor_seconds"] == pytest.approx(least / row["copy_bytes_per_second"])
        assert row["share_of_floor"] == row["floor_seconds"] / row["seconds_per_token"]
        assert not row["graph"]
        assert not row["compiled"]


def test_what_is_timed_holds_no_zeros_but_padding() -> None:
    config = load_net("paper/medium-tpa")
    config = type(config)(d_model=64, n_layers=2, vocab_size=61, attention=config.attention)
    model = random_model(config, torch.bfloat16, torch.device("cpu"))
    assert all(parameter.any() for parameter in model.parameters())
    cache = filled_cache(model, 2, 5, 9)
    assert cache.fixed
    assert cache.lengths.tolist() == [5, 5]
    assert all((entry != 0).float().mean() > 0.99 for entry in cache.tensors.values())
    heads = cache.tensors["a_k"]
    assert heads.as_strided((heads[..., 0].numel(), 48), (48, 1))[:, 47:].eq(0).all()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["generate", "quickstart", "--context", "11", "--new_tokens", "3"], "need at least 12"),
        (["generate", "quickstart", "--batch", "0"], "--batch=0 is not possible: it must be at least 1"),
        (["generate", "no-such-preset"], "no-such-preset"),
        (["generate", "quickstart", "--json", "."], "--json='.' is not possible: it is a folder"),
        (["generate", "quickstart", "--context", "1" + 30 * "0"], "its cache cannot be allocated here"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_a_preset_that_does_not_exist_stops_before_the_first_is_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_generate, "copy_bandwidth", lambda _: pytest.fail("something was timed"))
    assert main(["bench", "generate", "quickstart", "no-such-preset", "--device", "cpu"]) == 2
    assert "no-such-preset" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "value"),
    [("max_new_tokens", "0"), ("temperature", "nan"), ("temperature", "-1"), ("top_k", "0")],
)
def test_a_setting_out_of_range_is_said_before_a_checkpoint_is_read(
    setting: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--ckpt_path", "no/such/file", "--prompt", "x", f"--{setting}", value]) == 2
    assert capsys.readouterr().err.startswith(f"error: {setting}=")
