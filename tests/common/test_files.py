"""Files that are whole or not there."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from t6_lightning.common import files
from t6_lightning.common.files import replacing, write_atomically


def test_writes_and_replaces(tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "state.json"
    for text in ("one", "zwei ü\n"):
        write_atomically(file, text)
        assert file.read_text(encoding="utf-8") == text
    assert list(file.parent.iterdir()) == [file]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    write_atomically(file, "old")

    def stopped() -> None:
        with replacing(file) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    def writes_nothing() -> None:
        with replacing(file):
            pass

    with pytest.raises(KeyboardInterrupt):
        stopped()
    with pytest.raises(FileNotFoundError):
        writes_nothing()
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_mode_is_that_of_a_fresh_file(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "state.json", "")
    finally:
        os.umask(before)
    assert (tmp_path / "state.json").stat().st_mode & 0o777 == 0o666 & ~umask


def test_the_file_is_on_the_disk_before_it_gets_its_name_and_then_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        done.append("folder" if Path(f"/proc/self/fd/{descriptor}").resolve().is_dir() else "file")

    def noted_replace(self: Path, target: Path) -> Path:
        done.append("rename")
        return replace(self, target)

    monkeypatch.setattr(files.os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    write_atomically(tmp_path / "state.json", "text")
    assert done == ["file", "rename", "folder"]


def test_readers_and_other_writers_see_whole_files_only(tmp_path: Path) -> None:
    file, stop = tmp_path / "state.json", threading.Event()
    write_atomically(file, "a" * 100_000)

    def write(letter: str) -> None:
        while not stop.is_set():
            write_atomically(file, letter * 100_000)

    writers = [threading.Thread(target=write, args=(letter,)) for letter in "abc"]
    for writer in writers:
        writer.start()
    try:
        for _ in range(200):
            text = file.read_text()
            assert len(text) == 100_000
            assert len(set(text)) == 1
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert list(tmp_path.iterdir()) == [file]


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    write_atomically(file, "old")
    program = (
        "import os, sys; from pathlib import Path; from t6_lightning.common.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as temporary: temporary.write_text('half'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(file)]).returncode == 9
    assert file.read_text() == "old"
