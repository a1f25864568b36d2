"""Presets: the paper's models with its totals, variants matched to budgets, and files that extend others."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from commands import in_new_process

from t6_lightning import presets
from t6_lightning.cli.configuration import T6CLI, with_config_files
from t6_lightning.common.errors import BadInput
from t6_lightning.model.attention.mla import MLAConfig
from t6_lightning.model.attention.tpa import TPAConfig
from t6_lightning.model.t6 import T6
from t6_lightning.presets import load_net, model_presets, settings

SIZES = ("small", "medium", "large", "xl")

# Millions of parameters: layers, d_model and heads of tables 9 and 10 in table 1's formulas.
TOTALS = {
    "mha": (123.57, 353.45, 772.13, 1554.89),
    "mqa": (123.57, 353.45, 772.13, 1554.89),
    "gqa": (123.57, 353.45, 772.13, 1554.89),
    "mla": (121.51, 417.98, 909.32, 1810.07),
    "mla-as-released": (123.09, 353.86, 773.63, 1558.37),
    "tpa-kvonly": (124.38, 353.16, 773.05, 1559.50),
    "tpa": (124.34, 353.99, 773.70, 1555.81),
}
PAPER = {
    f"paper/{size}-{name}": total
    for name, totals in TOTALS.items()
    for size, total in zip(SIZES, totals, strict=True)
}
PAPER |= {"paper/xl-tpa-kvonly-rank4": 1593.60, "paper/xl-tpa-kvonly-rank6": 1627.70}


@pytest.mark.parametrize("preset", PAPER)
def test_paper_presets_have_the_paper_totals(preset: str) -> None:
    config = load_net(preset)
    assert config.n_parameters() / 1e6 == pytest.approx(PAPER[preset], abs=0.006)
    with torch.device("meta"):
        assert sum(p.numel() for p in T6(config).parameters()) == config.n_parameters()


def test_all_promised_names_are_there() -> None:
    promised = {"quickstart", *PAPER, "paper/small-tpa-order3"}
    promised |= {f"paper/{s}-tpa-noncontextual-{f}" for s, f in product(("small", "medium"), "ab")}
    promised |= {
        f"matched/{s}-{m}-at-{s}-tpa-cache" for s in SIZES for m in ("mha", "mqa", "gqa", "mla", "tpa-kvonly")
    }
    promised |= {
        f"matched/{s}-{m}-at-{s}-gqa-cache" for s in SIZES for m in ("mha", "mla", "tpa", "tpa-kvonly")
    }
    assert promised <= set(model_presets())


def test_variants_have_the_heads_of_what_they_vary() -> None:
    varied = {"paper/xl-tpa-kvonly": ("rank4", "rank6"), "paper/small-tpa": ("order3",)}
    varied |= {f"paper/{s}-tpa": ("noncontextual-a", "noncontextual-b") for s in ("small", "medium")}
    for base, variants in varied.items():
        for variant in variants:
            ours, theirs = load_net(f"{base}-{variant}").attention, load_net(base).attention
            assert (ours.n_heads, ours.head_dim) == (theirs.n_heads, theirs.head_dim)


def test_order3_splits_the_head_dimension_evenly() -> None:
    attention = load_net("paper/small-tpa-order3").attention
    assert isinstance(attention, TPAConfig)
    assert (attention.order, attention.feature_dims) == (3, (8, 8))


def test_sizes_of_mla() -> None:
    for size in SIZES:
        table, released = (load_net(f"paper/{size}-{name}").attention for name in ("mla", "mla-as-released"))
        assert isinstance(table, MLAConfig)
        assert isinstance(released, MLAConfig)
        assert (table.kv_rank, table.q_rank) == ((256, 512) if size == "small" else (512, 1024))
        assert (released.kv_rank, released.q_rank, released.cache_elements()) == (256, 512, 288)


def test_cache_ratio_of_the_paper_medium() -> None:
    assert load_net("paper/medium-tpa").cache_ratio_to_mha() == 444 / 2048


@pytest.mark.parametrize("size", SIZES)
def test_mfa_has_the_parameters_of_mha(size: str) -> None:
    mfa, mha = load_net(f"paper/{size}-mfa"), load_net(f"paper/{size}-mha")
    per_head = mfa.n_layers * mfa.attention.head_dim * (mfa.attention.head_dim + mfa.d_model)
    assert abs(mfa.n_parameters() - mha.n_parameters()) <= per_head / 2


@pytest.mark.parametrize(
    ("size", "peak", "last"),
    [("small", 6e-4, 3e-5), ("medium", 3e-4, 6e-5), ("large", 2e-4, 1e-5), ("xl", 1e-4, 1e-5)],
)
def test_paper_presets_train_as_table_9_says(size: str, peak: float, last: float) -> None:
    for name in model_presets():
        if not name.startswith((f"paper/{size}", f"matched/{size}")):
            continue
        found = settings(presets.FOLDER / f"{name}.yaml")
        optimizer, schedule = found["model"]["optimizer"], found["model"]["schedule"]["init_args"]
        assert (optimizer["lr"], optimizer["betas"], optimizer["weight_decay"]) == (peak, [0.9, 0.95], 0.1)
        assert optimizer["lr"] * schedule["min_factor"] == pytest.approx(last)
        assert found["cadence"]["tokens_per_step"] == 480 * 1024
        assert (schedule["warmup_steps"], found["trainer"]["max_steps"]) == (2000, 100_000)


# --- matched presets: what each file claims in its comment is derived again ---

CLAIM = re.compile(
    r"# (?P<label>\S+) at the cache of (?P<at>\S+), (?P<numbers>\d+) numbers per token and layer: "
    r"cache (?P<cache>[+-][\d.]+) %,\n# parameters (?P<parameters>[+-][\d.]+) % of (?P<mha>\S+)'s "
    r"(?P<millions>[\d.]+) M\. Changed from (?P<base>\S+):\n"
)
MATCHED = [name for name in model_presets() if name.startswith("matched/")]


@pytest.mark.parametrize("preset", MATCHED)
def test_matched_presets_are_what_they_claim(preset: str) -> None:
    text = (presets.FOLDER / f"{preset}.yaml").read_text()
    claim = CLAIM.match(text)
    assert claim is not None
    config, at, mha = load_net(preset), load_net(claim["at"]), load_net(claim["mha"])
    assert preset.endswith(f"-at-{claim['at'].removeprefix('paper/')}-cache")
    cache = config.cache_bytes_per_token(2) / at.cache_bytes_per_token(2) - 1
    parameters = config.n_parameters() / mha.n_parameters() - 1
    assert abs(cache) <= 1e-3
    assert abs(parameters) <= 1e-3
    assert (
        f"{100 * cache:.2f} {100 * parameters:.2f}"
        == f"{float(claim['cache']):.2f} {float(claim['parameters']):.2f}"
    )
    assert at.attention.cache_elements() == int(claim["numbers"])
    assert mha.n_parameters() / 1e6 == pytest.approx(float(claim["millions"]), abs=0.006)
    assert config.attention.mechanism == claim["label"].lower()

    # Every changed field says what it was.
    own = yaml.safe_load(text)
    assert own["extends"] == claim["base"]
    base, net = load_net(claim["base"]), own["model"]["net"]
    changed = {"ffn_hidden": net["ffn_hidden"]} if "ffn_hidden" in net else {}
    changed |= net.get("attention", {}).get("init_args", {})
    before = {
        field: base.ffn_width if field == "ffn_hidden" else getattr(base.attention, field)
        for field in changed
    }
    stated = {field: int(value) for field, value in re.findall(r"(\w+): \d+ +# (\d+) there", text)}
    assert stated == before
    assert config.attention.head_dim % 2 == 0


# --- presets that extend others ---


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def test_a_file_extends_a_preset_or_a_file_beside_it(tmp_path: Path) -> None:
    write(
        tmp_path,
        mine="extends: quickstart\nmodel: {optimizer: {lr: 1e-4}, net: {d_model: 48}}\n",
        next="extends: mine.yaml\nmodel: {net: {attention: {init_args: {n_heads: 3}}}}\ntrainer: {max_steps: 7}\n",
    )
    found = settings(tmp_path / "next.yaml")
    quickstart = settings(presets.FOLDER / "quickstart.yaml")
    assert "extends" not in found
    assert found["trainer"] == {"max_steps": 7, "gradient_clip_val": 1.0}
    assert found["model"]["optimizer"] == quickstart["model"]["optimizer"] | {"lr": 1e-4}
    net = load_net(str(tmp_path / "next.yaml"))
    assert (net.d_model, net.attention.n_heads, net.attention.head_dim) == (48, 3, 32)


QUICKSTART = settings(presets.FOLDER / "quickstart.yaml")


@pytest.mark.parametrize(
    "spelled", ["{class_path: MHAConfig, init_args: {n_heads: 6}}", "{class_path: MHAConfig}", "MHAConfig"]
)
def test_another_class_keeps_the_arguments_that_it_has_too(tmp_path: Path, spelled: str) -> None:
    write(tmp_path, other=f"extends: quickstart\nmodel: {{net: {{attention: {spelled}}}}}\n")
    attention = settings(tmp_path / "other.yaml")["model"]["net"]["attention"]
    n_heads = 6 if "6" in spelled else 8
    assert attention == {"class_path": "MHAConfig", "init_args": {"n_heads": n_heads, "head_dim": 32}}


def test_an_argument_whose_value_the_other_class_does_not_take_goes(tmp_path: Path) -> None:
    write(
        tmp_path,
        base="extends: quickstart\nmodel: {net: {attention: {init_args: {output_norm: true, rope: {dims: 8}}}}}\n",
        other="extends: base.yaml\nmodel: {net: {attention: strict.StrictConfig}}\n",
    )
    (tmp_path / "strict.py").write_text(STRICT)
    code = """
from pathlib import Path
from t6_lightning.presets import settings
print(settings(Path("other.yaml"))["model"]["net"]["attention"])
"""
    kept = {"n_heads": 8, "head_dim": 32, "rope": {"dims": 8}}
    expected = {"class_path": "strict.StrictConfig", "init_args": kept}
    assert in_new_process(code, tmp_path) == str(expected)


STRICT = """
from dataclasses import dataclass
from typing import Literal
from t6_lightning.model.attention.mfa import MFAConfig

@dataclass(frozen=True)
class StrictConfig(MFAConfig):
    output_norm: Literal["before", "after"] = "before"
"""


@pytest.mark.parametrize("spelled", ["TPAConfig", "t6_lightning.model.attention.tpa.TPAConfig"])
def test_the_same_class_by_another_name_keeps_all(tmp_path: Path, spelled: str) -> None:
    write(tmp_path, same=f"extends: quickstart\nmodel: {{net: {{attention: {{class_path: {spelled}}}}}}}\n")
    same = settings(tmp_path / "same.yaml")["model"]["net"]["attention"]
    assert same["init_args"] == QUICKSTART["model"]["net"]["attention"]["init_args"]


@pytest.mark.parametrize(
    ("yaml_text", "flags"),
    [
        ("model: {net: {attention: MLAConfig}}", ["--model.net.attention", "MLAConfig"]),
        (
            "model: {net: {attention: {class_path: MHAConfig, init_args: {n_kv_heads: 2}}}}",
            ["--model.net.attention", "MHAConfig", "--model.net.attention.n_kv_heads", "2"],
        ),
        (
            "model: {schedule: {class_path: WarmupStableDecay, init_args: {decay_steps: 7}}}",
            ["--model.schedule", "WarmupStableDecay", "--model.schedule.decay_steps", "7"],
        ),
        (
            "data: {class_path: TextFiles, init_args: {files: [a.txt]}}",
            ["--data", "TextFiles", "--data.files", "[a.txt]"],
        ),
        ("data: {class_path: datamodules.FineWebEdu}", ["--data", "datamodules.FineWebEdu"]),
    ],
)
def test_a_class_under_extends_is_what_it_is_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, yaml_text: str, flags: list[str]
) -> None:
    write(tmp_path, mine=f"extends: quickstart\n{yaml_text}\n")
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path)

    def parsed(arguments: list[str]) -> dict[str, object]:
        return T6CLI("fit", with_config_files("fit", arguments)).settings

    assert parsed(["--config", "mine.yaml"]) == parsed(["--config", "quickstart", *flags])


def test_presets_state_all_that_a_class_of_their_own_shares_with_the_base(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that a preset describes the same model whatever its base says of another class."""
    kept = {name: load_net(name) for name in model_presets()}
    monkeypatch.setattr(presets, "kept_arguments", only_of_the_same_class)
    assert {name: load_net(name) for name in model_presets()} == kept


def only_of_the_same_class(before: dict[str, object], class_path: str, place: str) -> dict[str, object]:
    return before if before.get("class_path") == class_path else {}


def test_the_command_line_sees_what_load_net_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(
        tmp_path,
        mine="extends: paper/small-gqa\nmodel: {net: {d_model: 48, rope_base: 5e5}, optimizer: {lr: 1e-4}}\n",
        data="data: {class_path: PythonDocs, init_args: {tokenizer: bytes}}\n",
    )
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    arguments = ["--config", "mine.yaml", "--config=data.yaml", "--model.net.n_layers", "2"]
    cli = T6CLI("fit", with_config_files("fit", arguments))
    net = cli.model.config
    assert (net.d_model, net.n_layers, net.rope_base, net.attention.mechanism) == (48, 2, 5e5, "gqa")
    assert load_net("mine.yaml").attention == net.attention
    assert load_net("mine.yaml").rope_base == net.rope_base
    assert cli.model.optimizer_config.lr == 1e-4
    assert cli.datamodule.tokenizer_spec == "bytes"
    assert [Path(str(file)).name for file in cli.config.config] == ["mine.yaml", "data.yaml"]
    written = cli.settings
    assert "extends" not in written, "a run's own config stands alone"
    assert written["model"]["net"]["attention"]["init_args"]["n_kv_heads"] == 2
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (
            {"a": "extends: b.yaml\n", "b": "extends: c.yaml\n", "c": "extends: ./a.yaml\n"},
            "a.yaml extends b.yaml extends c.yaml extends a.yaml again, which is a circle",
        ),
        ({"a": "extends: a.yaml\n"}, "a.yaml extends a.yaml again"),
        (
            {"a": "extends: paper/smal-mha\n"},
            "extends='paper/smal-mha' is not possible in .* did you mean paper/small-mha",
        ),
        (
            {"a": "extends: [quickstart]\n"},
            r"extends=\['quickstart'\] is not possible in .*: it takes the name of one",
        ),
        ({"a": "extends: b.yaml\n", "b": "- 1\n"}, "b.yaml holds no settings"),
        ({"a": "extends: b.yaml\n", "b": "model: [\n"}, "b.yaml is not valid YAML"),
        (
            {"a": "model: {}\nseed_everything: 1\nmodel: {}\n"},
            "a.yaml is not valid YAML: 'model' stands twice",
        ),
        ({"a": "seed_everything: 1\n"}, "describes no model: it lacks model.net"),
    ],
)
def test_files_that_cannot_be_extended(files: dict[str, str], sentence: str, tmp_path: Path) -> None:
    write(tmp_path, **files)
    with pytest.raises(BadInput, match=sentence) as caught:
        load_net(str(tmp_path / "a.yaml"))
    assert "\n" not in str(caught.value)


def test_quickstart_and_its_ablations_are_alike_but_for_one_thing() -> None:
    base = settings(presets.FOLDER / "quickstart.yaml")
    for name in (n for n in model_presets() if n.startswith("ablations/")):
        assert load_net(name) != load_net("quickstart")
        found = settings(presets.FOLDER / f"{name}.yaml")
        found["model"].pop("net")
        assert found == base | {"model": {k: v for k, v in base["model"].items() if k != "net"}}


def test_every_option_of_tpa_has_an_ablation() -> None:
    configs = [load_net(n).attention for n in model_presets() if n.startswith("ablations/")]
    tpas = [config for config in configs if isinstance(config, TPAConfig)]
    for field, values in {
        "nonlinearity": {"sigmoid", "softmax_heads", "softmax_ranks", "relu2", "topk_heads"},
        "init": {"xavier_paper", "xavier_paper_per_rank", "normal", "orthogonal", "variance_preserving"},
        "order": {3, 4},
        "rope_at": {"product"},
        "output_gate": {"head", "element"},
        "noncontextual_a": {"q", "k", "v", "qkv"},
        "noncontextual_b": {"q", "k", "v", "qkv"},
        "shared_b": {True},
        "shared_c": {True},
        "factorize_q": {False},
        "output_norm": {True},
        "kv_shift": {True},
    }.items():
        assert values <= {getattr(config, field) for config in tpas}, field
    assert any(config.rope.dims for config in tpas)
    assert {config.rope.decay_form for config in tpas if config.rope.decay} == {"relative", "reference"}
