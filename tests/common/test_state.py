"""State files: written whole, read with a check."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
from fuzzing import flip_or_cut

from t6_lightning.common import state
from t6_lightning.common.errors import BadInput
from t6_lightning.common.state import (
    DamagedState,
    read_bounded,
    read_state,
    read_text,
    write_state,
    write_text,
)

VALUES = {"status": "running", "step": 12, "loss": 0.1 + 0.2, "none": None, "domains": {"a/b": [1, 2.5]}}
TEXT = "model:\n  lr: 0.003\n  name: 'ü'\n"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = tmp_path / "new" / "run.json"
    write_state(file, VALUES)
    assert read_state(file, {"status": str, "step": int}, {"lr": float}) == VALUES
    assert list(json.loads(file.read_text())) == [*VALUES, "sha256"]
    write_state(file, json.loads(file.read_text()))
    assert read_state(file) == VALUES
    for text in (TEXT, (tmp_path / "new" / "config.yaml")):
        write_text(tmp_path / "new" / "config.yaml", text if isinstance(text, str) else text.read_text())
        assert read_text(tmp_path / "new" / "config.yaml") == TEXT
    assert sorted(file.name for file in file.parent.iterdir()) == ["config.yaml", "run.json"]


def test_files_of_earlier_versions_have_no_checksum(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(VALUES))
    assert read_state(tmp_path / "run.json") == VALUES
    (tmp_path / "config.yaml").write_text(TEXT)
    assert read_text(tmp_path / "config.yaml") == TEXT
    (tmp_path / "config.yaml").write_text(opened := f"# lightning.pytorch==2.6.6\n{TEXT}")
    assert read_text(tmp_path / "config.yaml") == opened


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "damaged (no JSON"),
        (b"\0" * 100, "damaged (no JSON"),
        (b'{"status": "\xff"}', "damaged (no UTF-8 at byte 12)"),
        (b"[1]", "damaged (it holds a list, and no mapping)"),
        (b'{"step": 1}', "damaged (it lacks status)"),
        (b'{"status": 3}', "damaged (status is '3', of type int)"),
        (b'{"status": "x", "step": "2"}', "damaged (step is '2', of type str)"),
        (b"[" * 100_000, "damaged (no JSON"),
        (b"9" * 100_000, "damaged (no JSON"),
    ],
)
def test_damage_is_one_sentence_that_names_the_file_and_what_to_do(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    file = tmp_path / "run.json"
    file.write_bytes(content)
    with pytest.raises(DamagedState) as caught:
        read_state(file, {"status": str}, {"step": int}, remedy="remove it")
    said = str(caught.value)
    assert said.startswith(f"{file} is {reason}")
    assert said.endswith(": remove it")
    assert "\n" not in said


def test_neither_pipes_nor_folders_nor_huge_files_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    for file in (tmp_path / "pipe", tmp_path):
        with pytest.raises(DamagedState, match="is not a file"):
            read_bounded(file)
    monkeypatch.setattr(state, "LARGEST", 10)
    (tmp_path / "large").write_bytes(b"a" * 11)
    with pytest.raises(DamagedState, match="11 bytes; allowed: at most 10"):
        read_bounded(tmp_path / "large")


def test_no_damage_changes_what_is_read(tmp_path: Path) -> None:
    rng = random.Random(0)
    write_state(tmp_path / "run.json", VALUES)
    write_text(tmp_path / "config.yaml", TEXT)
    for name, read in (("run.json", read_state), ("config.yaml", read_text)):
        content, refused = (tmp_path / name).read_bytes(), 0
        for _ in range(500):
            (tmp_path / name).write_bytes(flip_or_cut(content, rng))
            try:
                values = read(tmp_path / name)
            except BadInput:
                refused += 1
            else:
                # A flip in what opens the checksum's line leaves a line that YAML must refuse.
                assert values == VALUES or (isinstance(values, str) and values.endswith(TEXT))
        assert refused > 400
