"""Foreign and hostile checkpoints: one sentence from every command that reads one, and no code of theirs is run."""

from __future__ import annotations

import copy
import errno
import os
import shutil
import time
from pathlib import Path
from typing import Any

import hostile
import pytest
import small_runs
import torch
from commands import refused
from fuzzing import Tally, call
from small_runs import Small

from t6_lightning.checkpoint import files as checkpoint_files


@pytest.fixture(autouse=True)
def at_home(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T6_HOME", str(small.home))
    monkeypatch.chdir(tmp_path)


def commands(checkpoint: Path, text: Path, output: Path) -> dict[str, list[str | Path]]:
    """Every command that reads a checkpoint."""
    settings = small_runs.arguments(text)
    return {
        "evaluate": ["evaluate", "--ckpt_path", checkpoint, "--files", text, "--json"],
        "fit --ckpt_path": ["fit", *settings, "--ckpt_path", checkpoint, "--run", "hostile"],
        "consolidate": ["consolidate", "--ckpt_path", checkpoint, "--output", output],
        "fit --init_from": ["fit", *settings, "--init_from", checkpoint, "--run", "hostile"],
        "generate": ["generate", "--ckpt_path", checkpoint, "--prompt", "Line", "--max_new_tokens", "5"],
        "validate": ["validate", *settings, "--ckpt_path", checkpoint],
        "predict": ["predict", *settings, "--ckpt_path", checkpoint],
    }


READ_TEXT = ("evaluate", "generate")
"""Commands that read or write text with the checkpoint's tokenizer; the others have one, or need none."""


def meet(small: Small, folder: Path, every: int) -> Tally:
    """Give every foreign checkpoint to every `every`-th command, beginning with another one each time."""
    home, text, good = small
    marker = folder / "code-was-run"
    tally = Tally("foreign checkpoints in commands", marker)
    cases: dict[str, Any] = {}
    for name, change in hostile.foreign(marker).items():
        state = copy.deepcopy(small_runs.state(good))
        changed = change(state)
        cases[name] = state if changed is None else changed
    cases |= hostile.odd_files(good, folder / "odd", marker)
    before, seconds = sorted(home.rglob("*")), dict.fromkeys(commands(good, text, good), 0.0)
    for number, (name, case) in enumerate(cases.items()):
        file = case if isinstance(case, Path) else hostile.write(case, folder / "foreign.ckpt")
        output = folder / "out.ckpt"
        chosen = commands(file, text, output)
        if any(word in name for word in hostile.NEEDS_TOKENIZER) and "None" not in name:
            chosen = {command: chosen[command] for command in READ_TEXT}
        for command in [*chosen][number % min(every, len(chosen)) :: every]:
            begin = time.monotonic()
            tally.add(f"{name}: {command}", call(*chosen[command]), lambda outcome: False)
            seconds[command] += time.monotonic() - begin
            output.unlink(missing_ok=True)
    print({command: round(took, 1) for command, took in seconds.items()})
    assert sorted(home.rglob("*")) == before, "nothing is left of what was refused"
    return tally


def test_foreign_checkpoints_are_refused(small: Small, tmp_path: Path) -> None:
    meet(small, tmp_path, every=7).close()


@pytest.mark.prove
def test_every_command_refuses_every_foreign_checkpoint(small: Small, tmp_path: Path) -> None:
    meet(small, tmp_path, every=1).close()


def test_what_flipped_bits_without_a_checksum_do_is_seen(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, text, good = small
    content, bare = bytearray(good.read_bytes()), tmp_path / "bare.ckpt"
    bare.write_bytes(content)
    assert call("evaluate", "--ckpt_path", bare, "--files", text, "--json").code == 0
    content[len(content) // 2] ^= 64
    bare.write_bytes(content)
    for command in commands(bare, text, tmp_path / "out.ckpt").values():
        assert f"{bare} is damaged: the checksum of its entry" in refused(capsys, *command)


def test_a_checksum_with_flipped_bits_lets_the_checkpoint_before_be_taken(
    small: Small, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, _, good = small
    for file in good.parent.iterdir():
        shutil.copy(file, tmp_path)
    newest, before = tmp_path / good.name, checkpoint_files.of_step(tmp_path, 4)
    checksum = tmp_path / f"{good.name}.sha256"
    whole = checksum.read_bytes()
    for damaged in (bytes([whole[0] ^ 128]) + whole[1:], whole[:10], b"", b"\0" * 85, whole[64:]):
        checksum.write_bytes(damaged)
        assert checkpoint_files.newest_verified(tmp_path) == before
        assert f"checkpoint {newest} is damaged" in caplog.text
        caplog.clear()
    checksum.write_bytes(whole)
    assert checkpoint_files.newest_verified(tmp_path) == newest


def test_strangers_among_the_checkpoints_are_passed_over_and_stay(small: Small, tmp_path: Path) -> None:
    _, _, good = small
    for file in good.parent.iterdir():
        shutil.copy(file, tmp_path)
    strangers = [
        "step-00000015 (1).ckpt",
        "step-copy.ckpt",
        "step-x.ckpt",
        "notes.txt",
        "step-00000006.ckpt.bak",
    ]
    for name in strangers:
        shutil.copy(good, tmp_path / name)
    (tmp_path / "step-folder.ckpt").mkdir()
    for left_over in (
        ".step-00000008.ckpt.12-34",
        "step-00000008.ckpt.sha256",
        ".step-00000008.ckpt.partial",
    ):
        (tmp_path / left_over).write_text("")
    assert [checkpoint_files.step_of(file) for file in checkpoint_files.in_order(tmp_path)] == [4, 6]
    checkpoint_files.prune(tmp_path, keep=1)
    kept = [good.name, f"{good.name}.sha256", "step-folder.ckpt", *strangers]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(kept)


def test_steps_of_more_digits_are_later(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        checkpoint_files.of_step(tmp_path, step).touch()
    assert [checkpoint_files.step_of(file) for file in checkpoint_files.in_order(tmp_path)] == [
        99_999_999,
        100_000_000,
    ]


def test_consolidate_says_what_it_cannot_write(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, good = small

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    outcome = call("consolidate", "--ckpt_path", good, "--output", tmp_path / "one.ckpt")
    assert outcome.code == 1
    assert not outcome.crash
    said = (
        f"error: checkpoint {tmp_path / 'one.ckpt'} could not be written ([Errno 28] No space left on device"
    )
    assert outcome.err.startswith(said)
    assert list(tmp_path.iterdir()) == []
