"""The params command: costs, matching, and the spread of a model at initialization."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from t6_lightning.__main__ import main
from t6_lightning.cli.params import short
from t6_lightning.model import init_report as initial
from t6_lightning.model.attention.tpa import TPAConfig
from t6_lightning.model.config import T6Config
from t6_lightning.presets import load_net, model_presets


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict]:
    assert main(["params", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_has_every_cost(capsys: pytest.CaptureFixture[str]) -> None:
    net = load_net("paper/medium-tpa")
    (row,) = printed(capsys, "paper/medium-tpa", "--context", "4096")
    assert row == {
        "preset": "paper/medium-tpa",
        "mechanism": "tpa",
        "n_heads": 47,
        "n_parameters": 353_992_704,
        "cache_elements_per_token_per_layer": 444,
        "cache_bytes_per_token": 24 * 444 * 2,
        "cache_ratio_to_mha": 444 / 2048,
        "flops_per_token": net.training_flops(),
        "dense_forward_flops_per_token": net.forward_flops(1024),
        "decode_flops_per_token": net.decode_flops(4096),
        "decode_flops_per_token_appendix_a": net.appendix_a_flops(4096),
        "decode_context": 4096,
    }
    assert printed(capsys, "paper/medium-tpa")[0]["decode_context"] == 1024


@pytest.mark.parametrize(
    ("preset", "per_key"),
    [
        ("paper/medium-tpa", 6 * 2 * 64 + 47 * 6 * 2 + 47 * 2 * 64),
        ("paper/medium-tpa-noncontextual-a", 6 * 2 * 64 + 47 * 6 * 2 + 47 * 2 * 64),
        ("paper/medium-tpa-kvonly", 29 * 2 * 64 + 29 * 2 + 29 * 2 * 64),
        ("paper/medium-mha", 2 * 16 * 64),
        ("paper/medium-gqa", 2 * 30 * 64),
        ("paper/medium-mla", 23 * (512 + 32) + 23 * 512),
    ],
)
def test_decoding_is_counted_as_appendix_a_too(
    preset: str, per_key: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """M (R_Q R_K D + h R_Q R_K + h R_V E) multiply-adds a layer of TPA, 2 M h D of MHA, for M cached tokens."""
    near, far = (
        printed(capsys, preset, "--context", str(keys))[0]["decode_flops_per_token_appendix_a"]
        for keys in (1000, 3000)
    )
    assert far - near == 24 * 2 * per_key * 2000
    # The rest is what this code's count has too, but for Q, which the appendix never forms.
    net = load_net(preset)
    query = 2 * 6 * net.attention.n_heads * 64 if getattr(net.attention, "factorize_q", False) else 0
    assert near - 24 * 2 * per_key * 1000 == net.decode_flops(0) - 24 * query


def test_the_table_has_both_counts(capsys: pytest.CaptureFixture[str]) -> None:
    (order3,) = printed(capsys, "paper/small-tpa-order3")
    assert order3["decode_flops_per_token_appendix_a"] is None
    assert main(["params", "paper/small-tpa", "paper/small-tpa-order3"]) == 0
    said = capsys.readouterr().out
    assert "appendix A" in said
    rows = [line.split() for line in said.splitlines() if "paper/small-tpa" in line]
    count = load_net("paper/small-tpa").appendix_a_flops(1024)
    assert count is not None
    assert [row[-1] for row in rows] == [short(count), "-"]


def test_without_names_all_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert [row["preset"] for row in printed(capsys)] == model_presets()


def test_match_prints_presets_as_they_are_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    gqa, mla = printed(
        capsys,
        *("paper/small-gqa", "paper/small-mla", "--match", "cache", "--to", "paper/small-tpa"),
        *("--allow", "kv_heads", "head_dim", "kv_rank"),
    )
    assert gqa["match"]["changed"] == {"model.net.attention.head_dim": [64, 98]}
    assert mla["match"]["changed"] == {"model.net.attention.kv_rank": [256, 360]}
    for row in (gqa, mla):
        assert row["cache_elements_per_token_per_layer"] == 392
        assert (row["match"]["what"], row["match"]["to"], row["match"]["gap"]) == (
            "cache",
            "paper/small-tpa",
            0,
        )
    assert main(["params", "paper/small-gqa", "--match", "flops", "--to", "paper/small-mha"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "paper/small-gqa: model.net.attention.n_heads 22 → " in said
    assert "model FLOPs per training token" in said


def test_changes_are_options_of_fit(capsys: pytest.CaptureFixture[str]) -> None:
    from t6_lightning.cli.configuration import T6CLI, with_config_files

    (row,) = printed(
        capsys,
        *("quickstart", "--match", "parameters", "--to", "ablations/order3", "--allow", "heads", "ffn"),
    )
    assert len(row["match"]["changed"]) == 2
    options = [f"--{name}={after}" for name, (_, after) in row["match"]["changed"].items()]
    cli = T6CLI("fit", with_config_files("fit", ["--config=quickstart", *options]))
    assert cli.model.config.n_parameters() == row["n_parameters"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["quickstart", "--match", "cache"], "--to is missing"),
        (["quickstart", "--to", "quickstart"], "--match is missing"),
        (["quickstart", "--allow", "heads"], "--match is missing: --allow says"),
        (["quickstart", "--match", "size", "--to", "quickstart"], "invalid choice: 'size'"),
        (["quickstart", "--context", "0"], "--context=0 is not possible"),
        (["quikstart"], "did you mean quickstart"),
        (
            ["paper/small-gqa", "--match", "cache", "--to", "paper/small-tpa"],
            "paper/small-gqa: allow='heads' is not possible: it does not change the cache of gqa",
        ),
    ],
)
def test_bad_options(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["params", *arguments]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


# --- initialization ---


@pytest.mark.parametrize(
    ("init", "rank", "variance"),
    [
        ("xavier_reference", 6, 0.0016),
        ("xavier_reference", 2, 0.0149),
        ("xavier_paper", 6, 0.352),
        ("xavier_paper", 2, 1.57),
        ("xavier_paper_per_rank", 6, 0.59),
        ("xavier_paper_per_rank", 2, 1.76),
    ],
)
def test_predicted_variance_of_the_small_size(init: str, rank: int, variance: float) -> None:
    """Var[Q] measured on the public code's and the paper's schemes, to the digits known."""
    net = load_net("paper/small-tpa")
    attention = dataclasses.replace(net.attention, init=init, rank_q=rank)  # pyright: ignore[reportArgumentType]
    std = initial.predicted(dataclasses.replace(net, attention=attention))["q"]
    assert std is not None
    assert std**2 == pytest.approx(variance, rel=0.04)


def test_predicted_variance_of_mha() -> None:
    found = initial.predicted(load_net("paper/small-mha"))
    assert [found[name] for name in "qkv"] == pytest.approx([3**-0.5] * 3)
    assert found["logits"] == pytest.approx(1 / 3)
    assert found["embedding"] == found["end"] == pytest.approx((3 * 768) ** -0.5)


def check(name: str, config: T6Config, tolerance: float) -> None:
    predicted = initial.predicted(initial.stream_net(config))
    measured = initial.measured(config)
    assert list(measured) == list(initial.NAMES)
    for quantity, value in measured.items():
        expected = predicted[quantity]
        if expected is None:
            decayed = config.attention.rope.decay is not None
            assert decayed or config.output_init == "scaled", (name, quantity)
        else:
            assert value == pytest.approx(expected, rel=tolerance), (name, quantity)


def few_draws(preset: str) -> float:
    """Relative tolerance: learned factor vectors are few random numbers, so that draws scatter."""
    return 0.06 if "noncontextual" in preset else 0.03


SMALL = [name for name in model_presets() if name.startswith(("quickstart", "ablations/", "paper/small"))]


@pytest.mark.parametrize("preset", [*SMALL, "paper/xl-tpa", "matched/small-mha-at-small-tpa-cache"])
def test_predictions_are_what_is_measured(preset: str) -> None:
    # Two layers are as good as all: the stream of the presets that start at zero does not change.
    check(preset, dataclasses.replace(load_net(preset), n_layers=2), few_draws(preset))


@pytest.mark.prove
@pytest.mark.parametrize("preset", model_presets())
def test_predictions_of_every_preset_are_what_is_measured(preset: str) -> None:
    check(preset, load_net(preset), few_draws(preset))


@pytest.mark.parametrize(
    "changes",
    [
        {"rank_q": 1, "rank_k": 3, "rank_v": 5},
        {"rank_q": 8, "rank_k": 1, "rank_v": 2},
        {"order": 3, "feature_dims": (8, 4)},
        {"order": 4, "feature_dims": (8, 2, 2)},
        {"factorize_q": False, "rank_k": 4},
        {"nonlinearity": "sigmoid"},
        {"nonlinearity": "softmax_heads", "temperature": 0.5},
        {"nonlinearity": "softmax_ranks"},
        {"nonlinearity": "relu2"},
        {"nonlinearity": "topk_heads", "top_k": 3},
        {"nonlinearity": "relu2", "nonlinear_on": "k", "order": 3, "feature_dims": (4, 8)},
        {"noncontextual_a": "q", "noncontextual_b": "k"},
    ],
    ids=str,
)
def test_variance_preserving_gives_q_k_and_v_the_variance_of_mha(changes: dict) -> None:
    """1/3 to 3 % in the standard deviation (6 % with learned factor vectors), as predicted and as measured."""
    net = load_net("quickstart")
    net = dataclasses.replace(net, attention=TPAConfig(8, 32, init="variance_preserving", **changes))
    predicted, measured = initial.predicted(net), initial.measured(net)
    for name in "qkv":
        assert predicted[name] == pytest.approx(3**-0.5, rel=0.01)
        tolerance = 0.06 if "noncontextual_a" in changes else 0.03
        assert measured[name] == pytest.approx(3**-0.5, rel=tolerance)


@pytest.mark.parametrize(
    "preset",
    [
        *(
            "quickstart",
            "ablations/init-variance-preserving",
            "ablations/order3",
            "ablations/noncontextual-b",
        ),
        *(
            "ablations/gate-head",
            "ablations/output-norm",
            "ablations/kv-shift",
            "paper/small-mha",
            "paper/small-mla",
        ),
    ],
)
def test_the_stream_of_scaled_output_matrices_is_predicted(preset: str) -> None:
    net = load_net(preset)
    check(preset, dataclasses.replace(net, output_init="scaled", n_layers=min(net.n_layers, 4)), 0.06)


def test_what_has_no_closed_form_is_left_open() -> None:
    decayed = initial.predicted(load_net("ablations/rope-decay"))
    assert [name for name, value in decayed.items() if value is None] == ["q", "k", "logits"]
    net = dataclasses.replace(load_net("ablations/sigmoid"), output_init="scaled")
    assert [name for name, value in initial.predicted(net).items() if value is None] == ["middle", "end"]


def test_measuring_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    initial.measured(dataclasses.replace(load_net("quickstart"), n_layers=1))
    assert torch.equal(torch.rand(3), expected)


def test_init_prints_both_and_says_what_was_shortened(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = printed(capsys, "quickstart", "--init")
    assert row["init"]["predicted"].keys() == row["init"]["measured"].keys() == set(initial.NAMES)
    assert (row["init"]["stream_layers"], row["init"]["layers"]) == (4, 4)
    assert row["init"]["measured"]["q"] == pytest.approx(row["init"]["predicted"]["q"], rel=0.03)
    assert main(["params", "paper/xl-tpa", "quickstart", "--init"]) == 0
    said = capsys.readouterr().out
    assert "paper/xl-tpa: stream of 3 layers instead of 48" in said
    assert "quickstart: stream" not in said
