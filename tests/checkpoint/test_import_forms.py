"""Checkpoints of the paper's public code in other forms: several files, recomputed buffers, and no tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import straight_line
import torch
import yaml
from commands import refused
from safetensors.torch import save_file
from straight_line import Sizes, random_state

from t6_lightning.__main__ import main
from t6_lightning.checkpoint.load import load, load_trained
from t6_lightning.checkpoint.reference import as_trained, convert
from t6_lightning.checkpoint.reference_files import TIED, read_state
from t6_lightning.common.errors import BadInput
from t6_lightning.model.config import T6Config
from t6_lightning.model.t6 import T6

SIZES = Sizes("tpa", n_heads=3, head_dim=8, vocab_size=257)
ATTENTION = {"n_heads": 3, "head_dim": 8, "rank_q": 6, "rank_k": 2, "rank_v": 2}
NET = {
    **{"vocab_size": 257, "d_model": SIZES.d_model, "n_layers": SIZES.n_layers, "context": 32},
    "attention": {"class_path": "TPAConfig", "init_args": ATTENTION},
}
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def state() -> Tensors:
    return {name: value.clone() for name, value in random_state(SIZES).items()}


@pytest.fixture
def described(tmp_path: Path) -> Path:
    file = tmp_path / "net.yaml"
    file.write_text(yaml.safe_dump({"model": {"net": NET}}))
    return file


def logits(path: Path) -> torch.Tensor:
    """What the imported model says of a few tokens."""
    state = read_state(path)
    config = as_trained(state, T6Config.from_dict(NET))
    model = T6(config).eval()
    model.load_state_dict(convert(state, config))
    return model(torch.arange(20)[None])


def expected(state: Tensors) -> torch.Tensor:
    return straight_line.logits(torch.arange(20)[None], state, SIZES)


def split(state: Tensors, folder: Path, form: str, count: int = 3) -> Path:
    """Write `state` as transformers does in `count` files; the index's path."""
    folder.mkdir()
    stem = {"safetensors": "model", "bin": "pytorch_model"}[form]
    names, where = list(state), {}
    for i in range(count):
        file = f"{stem}-{i + 1:05}-of-{count:05}.{form}"
        part = {name: state[name] for name in names[i::count]}
        save_file(part, folder / file) if form == "safetensors" else torch.save(part, folder / file)
        where |= dict.fromkeys(part, file)
    index = folder / f"{stem}.{form}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return index


# --- several files ---


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("named", ["folder", "index"])
def test_several_files_are_one_model(form: str, named: str, state: Tensors, tmp_path: Path) -> None:
    state.pop(TIED)
    index = split(state, tmp_path / "many", form)
    torch.save({"state": {}}, tmp_path / "many" / "optimizer.pt")  # as the released trainer leaves it there
    path = index.parent if named == "folder" else index
    torch.testing.assert_close(logits(path), expected(state), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "ckpt.pt"])
def test_a_folder_with_one_file_is_that_file(name: str, state: Tensors, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    file = tmp_path / "one" / name
    save_file(state, file) if name.endswith("safetensors") else torch.save({"model": state}, file)
    (tmp_path / "one" / "config.json").write_text("{}")
    torch.testing.assert_close(logits(file.parent), expected(state), rtol=0, atol=1e-4)


def damaged(index: Path, change: Any) -> Path:
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))
    return index


def test_a_folder_or_index_that_cannot_be_read_is_named(state: Tensors, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="it holds no file of weights"):
        read_state(tmp_path / "empty")
    for name in ("a.pt", "b.pt"):
        (tmp_path / "empty" / name).touch()
    with pytest.raises(BadInput, match=r"name one of a.pt, b.pt in it"):
        read_state(tmp_path / "empty")

    index = split(state, tmp_path / "gone", "safetensors")
    (tmp_path / "gone" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(BadInput, match=r"names model-00002-of-00003.safetensors, and there is no such file"):
        read_state(index)

    index = split(state, tmp_path / "lacks", "safetensors")
    last = "model-00003-of-00003.safetensors"
    with pytest.raises(BadInput, match=r"lacks transformer.wte.weight, which .* says it holds"):
        read_state(damaged(index, lambda where: where.update({"transformer.wte.weight": last})))

    for text in ("", "[1]", "{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', "[" * 100_000):
        index.write_text(text)
        with pytest.raises(BadInput, match=r"index.json (cannot be read as JSON|is no index of weights)"):
            read_state(index)


@pytest.mark.parametrize("name", ["../outside.bin", "/etc/passwd", "..", "", None, 7, "a.index.json"])
def test_an_index_reads_files_beside_it_alone(name: Any, state: Tensors, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "outside.bin")
    index = split(state, tmp_path / "many", "bin")
    with pytest.raises(BadInput, match=r"must be the name of a file beside the index|there is no such file"):
        read_state(damaged(index, lambda where: where.update({"transformer.wte.weight": name})))


# --- buffers ---


def frequencies(width: int = 8, base: float = 10000.0) -> torch.Tensor:
    return 1.0 / base ** (torch.arange(0, width, 2).float() / width)


def with_buffers(state: Tensors, **buffers: torch.Tensor) -> Tensors:
    return state | {
        f"transformer.h.{i}.attn.c_qkv.rotary.{name}": value.clone()
        for i in range(SIZES.n_layers)
        for name, value in buffers.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_buffers_are_left_out(dtype: torch.dtype, state: Tensors, tmp_path: Path) -> None:
    tables = {"cos_cached": torch.ones(1, 9, 1, 4), "sin_cached": torch.zeros(1, 9, 1, 4)}
    saved = with_buffers(state, inv_freq=frequencies().to(dtype), **tables)
    saved["transformer.h.0.attn.bias"] = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    torch.save({"model": saved}, tmp_path / "x.pt")
    torch.testing.assert_close(logits(tmp_path / "x.pt"), expected(state), rtol=0, atol=1e-4)


@pytest.mark.parametrize("other", [frequencies(base=500_000.0), frequencies(16), torch.tensor(1.0)])
def test_frequencies_of_another_rope_are_refused(other: torch.Tensor, state: Tensors, tmp_path: Path) -> None:
    """Left out, they would be replaced by this configuration's, and the logits would be others."""
    torch.save(with_buffers(state, inv_freq=other), tmp_path / "x.pt")
    with pytest.raises(BadInput, match=r"inv_freq in the file is not what rope_base=10000 gives for 8"):
        logits(tmp_path / "x.pt")


def test_a_bias_of_a_layer_is_no_buffer(state: Tensors, tmp_path: Path) -> None:
    torch.save(state | {"transformer.h.0.attn.c_proj.bias": torch.zeros(40)}, tmp_path / "x.pt")
    with pytest.raises(BadInput, match=r"holds transformer.h.0.attn.c_proj.bias, for which"):
        logits(tmp_path / "x.pt")


# --- without a tokenizer ---


def test_without_a_tokenizer_no_hub_is_asked(
    state: Tensors, described: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hub(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a tokenizer was asked for")

    monkeypatch.setattr("t6_lightning.cli.import_.load_tokenizer", hub)
    monkeypatch.setattr("datamodules.tokenizer.load_definition", hub)
    torch.save(state, tmp_path / "x.pt")
    output = tmp_path / "x.ckpt"
    where = ["--config", str(described), "--output", str(output)]
    assert main(["import", str(tmp_path / "x.pt"), *where]) == 0
    assert "`generate` and `evaluate` need one" in capsys.readouterr().out
    model = load_trained(output, "cpu").model
    torch.testing.assert_close(model(torch.arange(20)[None]), expected(state), rtol=0, atol=1e-4)

    # Where text is read or written, one sentence says what is missing.
    text = tmp_path / "text.txt"
    text.write_text("some text")
    for command in (["generate", "--prompt", "a"], ["evaluate", "--files", str(text)]):
        said = refused(capsys, *command, "--ckpt_path", output)
        assert f"checkpoint {output} has no tokenizer" in said
        assert "--tokenizer NAME_OR_FOLDER" in said
    with pytest.raises(BadInput, match="has no tokenizer"):
        load(output, "cpu")
