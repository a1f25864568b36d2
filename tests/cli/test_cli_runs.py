"""What a run leaves behind, and the commands that read it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import fit, run
from tokenizers import Tokenizer as HuggingFace
from tokenizers import decoders, models, normalizers, pre_tokenizers

from datamodules.tokenizer import Tokenizer
from t6_lightning.__main__ import main
from t6_lightning.checkpoint import files as checkpoint_files
from t6_lightning.cli.generate import pieces
from t6_lightning.runs.folder import RunFolder


def test_a_run_leaves_everything_it_promises(home: Path, trained: Path) -> None:
    from t6_lightning.runs.tracking_store import open_client

    folder = RunFolder("trained")
    assert {"config.yaml", "summary.json", "loss.png", "sample.txt", "environment.json", "data.json"} <= {
        file.name for file in folder.path.iterdir()
    }
    assert (folder.path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    client = open_client()
    run_id = folder.record["mlflow_run_id"]
    tracked = client.get_run(run_id)
    assert tracked.info.status == "FINISHED"
    expected = {
        *("train/loss", "val/loss", "val/perplexity", "val/bits_per_byte", "val/code/bits_per_byte"),
        *("val/prose/bits_per_byte", "perf/tokens_per_second", "perf/peak_memory_bytes", "optim/lr"),
        *("optim/grad_norm", "data/tokens", "kv_cache/bytes_per_token", "kv_cache/predicted_bytes_per_token"),
        *(
            "kv_cache/bytes_at_full_context",
            "kv_cache/ratio_to_mha",
            "decode/tokens_per_second",
            "n_parameters",
        ),
    }
    assert expected <= set(tracked.data.metrics)
    assert 0 < tracked.data.metrics["perf/data_share"] < 1
    assert 0 < tracked.data.metrics["data/epochs/text"] < 1
    assert tracked.data.metrics["kv_cache/bytes_per_token"] == 2 * (2 + 2) * (3 + 16) * 4
    assert tracked.data.params["model.net.attention.init_args.rank_k"] == "2"
    assert tracked.data.params["model.optimizer.lr"] == "0.003"
    tags = tracked.data.tags
    assert (tags["mechanism"], tags["preset"], tags["corpus"], tags["seed"]) == (
        "tpa",
        "quickstart",
        "PythonDocs",
        "0",
    )
    assert len(tags["data_fingerprint"]) == 64
    if "mlflow.source.git.commit" in tags:
        assert tags["git_dirty"] in ("true", "false")
    artifacts = {file.path for file in client.list_artifacts(run_id)}
    assert artifacts == {
        *("config.yaml", "loss.png", "sample.txt", "summary.json", "environment.json", "data.json"),
    }
    summary = json.loads(folder.summary_file.read_text())
    data = json.loads((folder.path / "data.json").read_text())
    assert summary["val/bits_per_byte"] < summary["unigram_bits_per_byte"] * 1.2
    assert summary["data/tokens"] == 30 * 256
    assert data["domains"].keys() == {"code", "prose"}


def test_what_a_kill_leaves_is_removed_with_old_checkpoints(tmp_path: Path) -> None:
    kept = [f"step-0000000{i}.ckpt{suffix}" for i in (2, 3) for suffix in ("", ".sha256")]
    litter = [
        "step-00000000.ckpt.sha256",
        "step-00000001.ckpt",
        ".step-00000002.ckpt.99",
        ".step-00000009.ckpt.7.sha256",
    ]
    for name in (*kept, *litter, "notes.txt"):
        (tmp_path / name).write_text("x")
    checkpoint_files.prune(tmp_path, keep=2)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*kept, "notes.txt"])


def test_old_checkpoints_are_pruned(home: Path, trained: Path) -> None:
    names = sorted(file.name for file in trained.parent.iterdir())
    assert names == [
        *("step-00000025.ckpt", "step-00000025.ckpt.sha256"),
        *("step-00000030.ckpt", "step-00000030.ckpt.sha256"),
    ]


def test_generate_goes_on_from_the_prompt_and_follows_its_seed(
    home: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        arguments = ["--prompt", "def é", "--max_new_tokens", "40", "--seed", seed]
        assert main(["generate", "--ckpt_path", str(trained), *arguments]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("def é")
    assert texts[0] == texts[1] != texts[2]
    # A byte of the command line that is no UTF-8 reads as "?".
    assert main(["generate", "--ckpt_path", str(trained), "--prompt", "\udcffabc", "--temperature", "0"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("?abc")
    assert len(text) > len("?abc\n")


def test_generate_goes_on_from_a_prompt_that_its_tokenizer_changes() -> None:
    loaded = HuggingFace(models.WordPiece({"[UNK]": 0, "hello": 1, "world": 2}, unk_token="[UNK]"))
    loaded.normalizer = normalizers.Lowercase()
    loaded.pre_tokenizer = pre_tokenizers.Whitespace()
    loaded.decoder = decoders.WordPiece()
    tokenizer = Tokenizer(loaded.to_str())
    ids = tokenizer.encode("  Hello").tolist()
    assert list(pieces(tokenizer, ids, [2, 1, tokenizer.eot, 2])) == ["hello", " world", " hello", ""]


def test_generate_shows_characters_when_they_are_whole_and_at_the_end_those_that_are_not() -> None:
    tokenizer = Tokenizer("bytes")
    shown = list(pieces(tokenizer, [*b"a"], [*"€b".encode(), 0xFF, *b"c", 0xE2, 0x82]))
    assert shown == ["a", "€", "b", "\ufffdc", "\ufffd"]
    assert list(pieces(tokenizer, [], [0xE2, tokenizer.eot])) == ["", "\ufffd"]


def test_generate_goes_on_where_bytes_turn_an_earlier_character_invalid() -> None:
    """Byte fallback reads a run of bytes as a whole: one that is no UTF-8 takes the others with it."""
    vocabulary = {"<unk>": 0, "<0xC3>": 1, "<0xA9>": 2, "<0xFF>": 3, "a": 4, "b": 5}
    loaded = HuggingFace(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    loaded.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    shown = list(pieces(Tokenizer(loaded.to_str()), [4], [1, 2, 3, 5, 4]))
    assert shown == ["a", "é", "\ufffd\ufffdb", "a", ""]


def test_evaluate_agrees_with_the_validation_of_the_same_text(
    home: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two files, one with a character of three bytes: every byte is counted, "all" is their sum."""
    (tmp_path / "a.txt").write_text("import os\n" * 30, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "€uro " * 20}) + "\n")
    assert main(["evaluate", "--ckpt_path", str(trained), "--files", str(tmp_path), "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert files["a.txt"]["bytes"] == 300
    assert files["b.jsonl"]["bytes"] == 20 * 7
    assert files["all"]["tokens"] == 300 + 1 + 140 + 1
    nats = files["a.txt"]["loss"] * 301 + files["b.jsonl"]["loss"] * 141
    assert files["all"]["loss"] == pytest.approx(nats / 442)
    assert files["all"]["bits_per_byte"] == pytest.approx(nats / torch.tensor(2.0).log().item() / 440)


def test_validate_and_predict_find_the_configuration_of_the_run(home: Path, trained: Path) -> None:
    import numpy as np

    summary = json.loads(RunFolder("trained").summary_file.read_text())
    done = run("validate", "--ckpt_path", trained)
    assert done.returncode == 0, done.stderr
    assert f"{summary['val/bits_per_byte']:.4f}" in done.stdout
    done = run("predict", "--ckpt_path", trained)
    assert done.returncode == 0, done.stderr
    written = np.load(RunFolder("trained").path / "predictions.npz")
    counted = written["targets"] != -100
    assert written["nll"][counted].mean() == pytest.approx(summary["val/loss"], rel=1e-5)


def test_a_profilers_table_of_training_is_in_the_run_folder(home: Path) -> None:
    done = fit("profiled", "--trainer.profiler", "pytorch", "--trainer.max_steps", "3")
    assert done.returncode == 0, done.stderr
    table = (RunFolder("profiled").path / "fit-profile.txt").read_text()
    assert "run_training_batch" in table
    assert "validation" not in table
