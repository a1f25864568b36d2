"""Checkpoints of the paper's public code: imported, they give the same logits, or one sentence says why not."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import straight_line
import torch
import yaml
from commands import run
from data_helpers import real_data
from safetensors.torch import save_file
from straight_line import Sizes, random_state

from t6_lightning.__main__ import main
from t6_lightning.checkpoint import files as checkpoint_files
from t6_lightning.checkpoint.load import load_trained
from t6_lightning.checkpoint.reference import as_trained, convert
from t6_lightning.checkpoint.reference_files import EMBEDDING, TIED, read_state
from t6_lightning.common.errors import BadInput
from t6_lightning.model.config import T6Config
from t6_lightning.model.t6 import T6
from t6_lightning.presets import load_net

# Odd head counts, R_Q = 6, head widths of which h * d_h is not d_model.
CASES = {
    "tpa-h5": Sizes("tpa"),
    "tpa-h7-r6-3": Sizes("tpa", n_heads=7, head_dim=8, rank=3),
    "tpa-h7-output-norm": Sizes("tpa", n_heads=7, output_norm=True),
    "kvonly-h5": Sizes("tpa-kvonly"),
    "kvonly-h7-output-norm": Sizes("tpa-kvonly", n_heads=7, rank=1, output_norm=True),
    "mha-h5": Sizes("mha"),
    "mha-h7-output-norm": Sizes("mha", n_heads=7, output_norm=True),
    "gqa-h15-g3": Sizes("gqa", n_heads=15, head_dim=8, kv_heads=3),
    "mqa-h7": Sizes("gqa", n_heads=7, kv_heads=1),
    "mqa-h7-output-norm": Sizes("gqa", n_heads=7, kv_heads=1, output_norm=True),
    "mla-h5": Sizes("mla"),
    "mla-h7": Sizes("mla", n_heads=7, rope_dim=4),
}

# Largest difference of logits of order one; the sums run in different orders.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


@pytest.fixture(params=CASES, ids=list(CASES))
def sizes(request: pytest.FixtureRequest) -> Sizes:
    return CASES[request.param]


def attention_of(s: Sizes) -> dict[str, Any]:
    """The attention of a configuration file for a model of these sizes."""
    heads = {"n_heads": s.n_heads, "head_dim": s.head_dim}
    if s.mechanism == "mla":
        latents = {"rope_dim": s.rope_dim, "kv_rank": s.kv_latent, "q_rank": s.q_latent}
        return {"class_path": "MLAConfig", "init_args": heads | latents}
    if s.mechanism in ("mha", "gqa"):
        groups = None if s.mechanism == "mha" else s.kv_heads
        return {"class_path": "MHAConfig", "init_args": heads | {"n_kv_heads": groups}}
    ranks = {"rank_q": s.rank_q, "rank_k": s.rank, "rank_v": s.rank}
    kvonly = {"factorize_q": s.mechanism == "tpa"}
    return {"class_path": "TPAConfig", "init_args": heads | ranks | kvonly}


def net_of(s: Sizes) -> dict[str, Any]:
    """As a preset has it: another vocabulary, and RoPE as this project sets it."""
    sizes = {"vocab_size": 64, "d_model": s.d_model, "n_layers": s.n_layers, "context": 32}
    return sizes | {"attention": attention_of(s)}


def imported(s: Sizes, state: dict[str, torch.Tensor]) -> T6:
    config = as_trained(state, T6Config.from_dict(net_of(s)))
    weights = convert(state, config)
    model = T6(config).to(weights["embedding.weight"].dtype).eval()
    model.load_state_dict(weights)
    return model


def tokens_for(s: Sizes, length: int = 29) -> torch.Tensor:
    return torch.randint(s.vocab_size, (3, length), generator=torch.Generator().manual_seed(1))


def write_config(s: Sizes, file: Path) -> Path:
    file.write_text(yaml.safe_dump({"model": {"net": net_of(s)}}))
    return file


# --- the same logits ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_logits_are_those_of_the_straight_line_code(sizes: Sizes, dtype: torch.dtype) -> None:
    state, tokens = random_state(sizes, dtype=dtype), tokens_for(sizes)
    expected = straight_line.logits(tokens, state, sizes)
    actual = imported(sizes, state)(tokens)
    assert 1 < expected.std() < 20, "every part counts, none drowns the rest"
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[dtype] * expected.std().item())


def test_every_weight_and_the_order_of_its_rows_count(sizes: Sizes) -> None:
    """What the comparison above is worth: each matrix with two rows swapped gives other logits on both sides."""
    state, tokens = random_state(sizes, dtype=torch.float64), tokens_for(sizes, 9)
    before = straight_line.logits(tokens, state, sizes)
    for name in straight_line.shapes(sizes):
        if name == TIED:
            continue
        value = state[name]
        swapped = value.clone()
        swapped[[0, -1]] = value[[-1, 0]]
        changed = state | {name: swapped}
        if name == EMBEDDING:
            changed[TIED] = swapped
        expected, actual = straight_line.logits(tokens, changed, sizes), imported(sizes, changed)(tokens)
        assert (expected - before).abs().max() > 1e-6, name
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11, msg=name)


def test_tables_as_the_public_code_keeps_them_matter() -> None:
    """bfloat16 tables change logits far beyond the tolerance: that the converter sets them is no ornament."""
    s = CASES["tpa-h5"]
    state, tokens = random_state(s, dtype=torch.float64), tokens_for(s)
    exact = T6(T6Config.from_dict(net_of(s) | {"vocab_size": s.vocab_size})).double()
    exact.load_state_dict(convert(state, exact.config))
    assert (exact(tokens) - straight_line.logits(tokens, state, s)).abs().max() > 1e-3


PAPER = [
    f"paper/small-{name}" for name in ("tpa", "tpa-kvonly", "mha", "mqa", "gqa", "mla", "mla-as-released")
]


@pytest.mark.parametrize("preset", PAPER)
def test_the_papers_presets_are_what_the_public_code_saved(preset: str) -> None:
    """Names and shapes at full size, on the meta device."""
    net = load_net(preset)
    c: Any = net.attention
    mechanism = {"mqa": "gqa"}.get(c.mechanism, c.mechanism)
    ranks = {"rank_q": c.rank_q, "rank": c.rank_k} if "tpa" in mechanism else {}
    groups = {"kv_heads": c.groups} if mechanism == "gqa" else {}
    latents = (
        {"q_latent": c.q_rank, "kv_latent": c.kv_rank, "rope_dim": c.rope_dim} if mechanism == "mla" else {}
    )
    sizes = Sizes(
        *(mechanism, 50304, net.d_model, net.n_layers, c.n_heads, c.head_dim), **ranks, **groups, **latents
    )
    state = {name: torch.empty(shape, device="meta") for name, shape in straight_line.shapes(sizes).items()}
    state.pop(TIED)
    config = as_trained(state, net)
    with torch.device("meta"):
        expected = T6(config).state_dict()
    converted = convert(state, config)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in expected.items()}


# --- through files and the command line ---


def wrap(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}


FORMS = {
    "plain.pt": lambda state, file: torch.save(state, file),
    "plain.bin": lambda state, file: torch.save(state, file),
    "old.pt": lambda state, file: torch.save(state, file, _use_new_zipfile_serialization=False),
    "trainer.pt": lambda state, file: torch.save({"model": state, "optimizer": {}, "iter_num": 7}, file),
    "compiled.pt": lambda state, file: torch.save({"model": wrap(state, "_orig_mod.")}, file),
    "ddp.pt": lambda state, file: torch.save({"state_dict": wrap(state, "module._orig_mod.")}, file),
    "plain.safetensors": lambda state, file: save_file({k: v.clone() for k, v in state.items()}, file),
    "tied.safetensors": lambda state, file: save_file({k: v for k, v in state.items() if k != TIED}, file),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_file_becomes_a_checkpoint(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    s = Sizes("tpa", n_heads=7, output_norm=True, vocab_size=300)
    state = random_state(s)
    FORMS[form](state, tmp_path / form)
    config, output = write_config(s, tmp_path / "net.yaml"), tmp_path / "new" / "x.ckpt"
    arguments = ["--config", str(config), "--output", str(output), "--tokenizer", "bytes"]
    assert main(["import", str(tmp_path / form), *arguments]) == 0
    said = capsys.readouterr().out
    for setting in ("vocab_size=300", "rope.tables=reference", "output_norm=True"):
        assert setting in said
    assert checkpoint_files.is_whole(output)
    assert sorted(file.name for file in output.parent.iterdir()) == ["x.ckpt", "x.ckpt.sha256"]
    tokens = tokens_for(s)
    actual, expected = load_trained(output, "cpu").model(tokens), straight_line.logits(tokens, state, s)
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=TOLERANCE[torch.float32] * expected.std().item()
    )


def test_half_precision_files_are_imported_exactly(tmp_path: Path) -> None:
    s = CASES["kvonly-h5"]
    state = random_state(s, dtype=torch.bfloat16)
    torch.save(state, tmp_path / "half.pt")
    read = read_state(tmp_path / "half.pt")
    assert all(torch.equal(read[name], value) for name, value in state.items())
    wide = {name: value.float() for name, value in state.items()}
    tokens = tokens_for(s)
    model = imported(s, wide)
    torch.testing.assert_close(model(tokens), straight_line.logits(tokens, wide, s), rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imported TPA with bytes for tokens."""
    folder = tmp_path_factory.mktemp("imported")
    s = Sizes("tpa", n_heads=3, vocab_size=257, output_norm=True)
    torch.save(random_state(s), folder / "reference.pt")
    config = write_config(s, folder / "net.yaml")
    where = ["--config", str(config), "--output", str(folder / "x.ckpt"), "--tokenizer", "bytes"]
    assert main(["import", str(folder / "reference.pt"), *where]) == 0
    return folder / "x.ckpt"


def test_the_other_commands_read_it(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    said = ["--ckpt_path", str(checkpoint), "--prompt", "ab", "--max_new_tokens", "5"]
    assert main(["generate", *said]) == 0
    assert capsys.readouterr().out.startswith("ab")
    text = tmp_path / "text.txt"
    text.write_text("some text to measure\n" * 5)
    assert main(["evaluate", "--ckpt_path", str(checkpoint), "--files", str(text), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"]["text.txt"]["bytes"] == 105


def test_training_goes_on_from_it_with_the_flags_it_was_told(
    home: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Import prints the flags under which `fit --init_from` takes the checkpoint."""
    folder = checkpoint.parent
    capsys.readouterr()
    where = ["--config", str(folder / "net.yaml"), "--output", str(tmp_path / "again.ckpt")]
    assert main(["import", str(folder / "reference.pt"), *where, "--tokenizer", "bytes"]) == 0
    told = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("to train on: "))
    data = ["--data.batch_size", "2", "--cadence.tokens_per_step", "64"]
    data += ["--data.val_tokens", "500", "--model.optimizer.lr", "1e-9", "--trainer.max_steps", "2"]
    done = run(*told.removeprefix("to train on: ").split(), "--run", "imported", *data)
    assert done.returncode == 0, done.stderr
    trained = load_trained(next((home / "runs" / "imported" / "checkpoints").glob("*.ckpt")), "cpu").model
    start = load_trained(checkpoint, "cpu").model
    assert trained.config == start.config
    for name, value in start.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], value, rtol=0, atol=1e-6)


def test_the_papers_tokenizer_from_a_folder(tmp_path: Path) -> None:
    folder = real_data("tokenizer/gpt2")
    s = Sizes("tpa", d_model=8, head_dim=4, n_heads=3, n_layers=1, vocab_size=50304)
    torch.save(random_state(s), tmp_path / "pytorch_model.bin")
    config, output = write_config(s, tmp_path / "net.yaml"), tmp_path / "x.ckpt"
    where = ["--config", str(config), "--output", str(output), "--tokenizer", str(folder)]
    assert main(["import", str(tmp_path / "pytorch_model.bin"), *where]) == 0
    trained = load_trained(output, "cpu")
    assert trained.tokenizer.encode("Hello world").tolist() == [15496, 995]
    assert trained.tokenizer.eot == 50256
    assert main(["generate", "--ckpt_path", str(output), "--prompt", "Hello", "--max_new_tokens", "3"]) == 0


# --- what is refused ---


class Bomb:
    """Unpickling it would make a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


@pytest.fixture
def refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Import a file that cannot be: the one sentence, with nothing left behind."""
    s = CASES["tpa-h5"]

    def sentence(file: Path, sizes: Sizes = s, *more: str) -> str:
        config, output = write_config(sizes, tmp_path / "net.yaml"), tmp_path / "out" / "x.ckpt"
        capsys.readouterr()
        arguments = ["--config", str(config), "--output", str(output), "--tokenizer", "bytes", *more]
        assert main(["import", str(file), *arguments]) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1, said
        assert not output.parent.exists()
        return said[0]

    return sentence


def saved(tmp_path: Path, content: Any) -> Path:
    torch.save(content, tmp_path / "reference.pt")
    return tmp_path / "reference.pt"


def test_a_wrong_shape_names_the_matrix(refuse: Any, tmp_path: Path) -> None:
    name = "transformer.h.1.attn.c_qkv.W_B_k.weight"
    state = random_state(CASES["tpa-h5"])
    said = refuse(saved(tmp_path, state | {name: state[name][:-1]}))
    assert f"{name} has shape (31, 40) in the file, and the configuration makes it (32, 40)" in said
    assert "(80, 40)" in refuse(saved(tmp_path, random_state(CASES["mha-h5"])), CASES["mqa-h7"])


def test_missing_and_unexpected_names(refuse: Any, tmp_path: Path) -> None:
    name = "transformer.h.0.mlp.c_fc2.weight"
    state = random_state(CASES["tpa-h5"])
    assert f"lacks {name}" in refuse(saved(tmp_path, {k: v for k, v in state.items() if k != name}))
    bias = "transformer.h.1.mlp.c_fc2.bias"
    assert f"holds {bias}, for which" in refuse(saved(tmp_path, state | {bias: torch.zeros(3)}))
    deeper = random_state(Sizes("tpa", n_layers=3))
    assert "has 3 layers, and the configuration n_layers=2" in refuse(saved(tmp_path, deeper))


def test_another_mechanism(refuse: Any, tmp_path: Path) -> None:
    file = saved(tmp_path, random_state(CASES["tpa-h5"]))
    assert "holds TPA, and the configuration describes TPA-KVonly" in refuse(file, CASES["kvonly-h5"])
    assert "holds TPA, and the configuration describes MLA" in refuse(file, CASES["mla-h5"])
    file = saved(tmp_path, random_state(CASES["mla-h5"]))
    assert "holds MLA, and the configuration describes MHA, GQA or MQA" in refuse(file, CASES["gqa-h15-g3"])


def test_a_model_that_the_public_code_has_not(refuse: Any, tmp_path: Path) -> None:
    state = random_state(CASES["tpa-h5"])
    mfa = T6Config.from_dict(net_of(CASES["tpa-h5"]) | {"attention": {"class_path": "MFAConfig"}})
    with pytest.raises(BadInput, match=r"MFAConfig.*the public code has TPAConfig, MHAConfig, MLAConfig"):
        as_trained(state, mfa)
    shared = net_of(CASES["tpa-h5"])
    shared["attention"]["init_args"]["shared_b"] = True
    with pytest.raises(BadInput, match=r"attention.shared_b=True is not possible: the public code has False"):
        as_trained(state, T6Config.from_dict(shared))


def test_an_output_norm_where_there_is_none(refuse: Any, tmp_path: Path) -> None:
    state = random_state(CASES["mla-h5"])
    subln = {f"transformer.h.{i}.attn.subln.weight": torch.ones(16) for i in range(2)}
    said = refuse(saved(tmp_path, state | subln), CASES["mla-h5"])
    assert "attn.subln.weight is in the file, and MLAConfig has no output norm" in said


def test_a_tied_pair_that_differs(refuse: Any, tmp_path: Path) -> None:
    state = random_state(CASES["tpa-h5"])
    said = refuse(saved(tmp_path, state | {TIED: state[TIED] + 1}))
    assert f"{EMBEDDING} and {TIED} differ" in said


def test_files_that_are_no_state_dict(refuse: Any, tmp_path: Path) -> None:
    assert "there is no such file" in refuse(tmp_path / "absent.pt")
    assert "it holds no file of weights" in refuse(tmp_path)
    for content in ([1, 2], {"a": torch.zeros(2)}, {"model": {"b": 1}}, torch.zeros(3), {3: 4}):
        assert "holds no state dict" in refuse(saved(tmp_path, content))
    said = refuse(saved(tmp_path, random_state(CASES["tpa-h5"]) | {EMBEDDING: "no tensor"}))
    assert f"{EMBEDDING} is no matrix of floating numbers" in said
    for junk in (b"", b"short", b"not a checkpoint" * 9, b"\x10\0\0\0\0\0\0\0{not json"):
        (tmp_path / "junk.bin").write_bytes(junk)
        assert "cannot be read" in refuse(tmp_path / "junk.bin")
    file = saved(tmp_path, random_state(CASES["tpa-h5"]))
    file.write_bytes(file.read_bytes()[:-100])
    assert "cannot be read" in refuse(file)


def test_code_in_a_file_is_never_run(refuse: Any, tmp_path: Path) -> None:
    made = tmp_path / "made"
    state = random_state(CASES["tpa-h5"])
    assert "mkdir), and code in files is never run" in refuse(saved(tmp_path, state | {"x": Bomb(made)}))
    (tmp_path / "bomb.bin").write_bytes(pickle.dumps(Bomb(made)))
    refuse(tmp_path / "bomb.bin")
    assert not made.exists()


def test_an_output_that_exists_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    s = CASES["tpa-h5"]
    output = tmp_path / "x.ckpt"
    output.write_text("precious")
    file, config = saved(tmp_path, random_state(s)), write_config(s, tmp_path / "net.yaml")
    assert main(["import", str(file), "--config", str(config), "--output", str(output)]) == 2
    assert "it exists already" in capsys.readouterr().err
    assert output.read_text() == "precious"


def test_tokenizers_that_cannot_be(refuse: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s = CASES["tpa-h5"]
    file = saved(tmp_path, random_state(s))
    assert "it has 257 symbols, and the model rows for 97" in refuse(file)
    assert "the tokenizer it was trained with" in refuse(file, s, "--tokenizer", "bpe")
    # No hub at this address, as on a machine without network.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    said = refuse(file, s, "--tokenizer", "gpt2")
    assert "'gpt2'" in said
    assert "give --tokenizer FOLDER" in said


def test_a_disk_that_is_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    s = Sizes("tpa", vocab_size=257)
    file, config = saved(tmp_path, random_state(s)), write_config(s, tmp_path / "net.yaml")

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_files, "_write", full)
    output = tmp_path / "out" / "x.ckpt"
    where = ["--config", str(config), "--output", str(output), "--tokenizer", "bytes"]
    assert main(["import", str(file), *where]) == 1
    assert "could not be written" in capsys.readouterr().err
    assert list(output.parent.iterdir()) == []
