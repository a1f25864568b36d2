"""What the operating system or a missing package says is named as what it is, never as damage of the user's file."""

from __future__ import annotations

import builtins
import errno
import gzip
import io
import os
import sys
from pathlib import Path

import pytest
from commands import refused
from data_helpers import many_texts, write_jsonl

from datamodules import C4, BadInput, TextFiles, system_faults, token_cache
from datamodules.decompression import Damaged, decompressed
from datamodules.system_faults import system_fault
from datamodules.text_files import find_files, read_documents

COMMON = {"tokenizer": "bytes", "context": 32, "batch_size": 2}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("T6_HOME", str(tmp_path / "home"))


def failing(monkeypatch, owner, name, error, path_ends):
    """Make a function that opens files fail on some of them."""
    real = getattr(owner, name)

    def replaced(path, *rest, **options):
        if str(path).endswith(path_ends):
            raise error
        return real(path, *rest, **options)

    monkeypatch.setattr(owner, name, replaced)


SYSTEM = {
    "permission": (PermissionError(errno.EACCES, "Permission denied"), "cannot be read: Permission denied."),
    "descriptors": (OSError(errno.EMFILE, "Too many open files"), r"as many files open as it may \([\d,]+\); raise"),
    "disk": (OSError(errno.EIO, "Input/output error"), "cannot be read: Input/output error."),
    "memory": (MemoryError(), "cannot be read: memory ran out."),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "txt"])
@pytest.mark.parametrize("kind", SYSTEM)
def test_a_file_that_the_system_does_not_give_is_not_called_damaged(kind, suffix, tmp_path, monkeypatch):
    error, says = SYSTEM[kind]
    path = write_jsonl(tmp_path / f"a.{suffix}", many_texts(5))
    if suffix == "parquet":
        import pyarrow.parquet as pq

        monkeypatch.setattr(pq, "read_schema", lambda path: _raise(error))
    else:
        failing(monkeypatch, io, "open", error, path.name)  # pathlib's
        failing(monkeypatch, builtins, "open", error, path.name)
    with pytest.raises(BadInput, match=says) as raised:
        list(read_documents(str(path)))
    assert "damaged" not in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def _raise(error):
    raise error


def test_a_mirror_that_the_system_does_not_give_is_not_called_damaged(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "mirror" / "a.jsonl.gz", many_texts(50))
    failing(monkeypatch, builtins, "open", OSError(errno.EMFILE, "Too many open files"), "a.jsonl.gz")
    with pytest.raises(BadInput, match=r"a.jsonl.gz cannot be opened: this process has as many files open"):
        C4(**COMMON, path=str(tmp_path / "mirror")).prepare_data()


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl.zst", ["x"])
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(BadInput, match="the package zstandard is missing; install it with pip") as raised:
        list(read_documents(str(path)))
    assert "damaged" not in str(raised.value)


def test_a_folder_that_cannot_be_read_is_not_left_out_silently(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "texts" / "a.jsonl", ["x"])
    write_jsonl(tmp_path / "texts" / "closed" / "b.jsonl", ["y"])
    failing(monkeypatch, os, "scandir", PermissionError(errno.EACCES, "Permission denied"), "closed")
    with pytest.raises(BadInput, match="closed cannot be read: Permission denied"):
        find_files(str(tmp_path / "texts"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EMFILE])
def test_a_disk_that_takes_no_tokens_is_named_and_nothing_half_written_stays(
    number, tmp_path, monkeypatch, capsys
):
    write_jsonl(tmp_path / "a.jsonl", many_texts(200))

    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(number, os.strerror(number))  # as a full disk: no file is named

    monkeypatch.setattr(token_cache, "_spooled", lambda file: Full())
    said = refused(capsys, "fit", "--data", "TextFiles", "--data.files", tmp_path / "a.jsonl", "--data.tokenizer",
                   "bytes", "--model.net.vocab_size", "257", "--trainer.max_steps", "2")  # fmt: skip
    assert f"{tmp_path}/home/tokens/" in said
    assert "cannot be written" in said
    if number != errno.EMFILE:
        assert os.strerror(number) in said
    left = [path for path in (tmp_path / "home" / "tokens").iterdir() if path.suffix != ".lock"]
    assert left == []


def test_a_cache_entry_that_the_system_does_not_give_is_not_made_again(tmp_path, monkeypatch, caplog):
    write_jsonl(tmp_path / "a.jsonl", many_texts(50))
    data = TextFiles(str(tmp_path / "a.jsonl"), val_fraction=0.2, **COMMON)
    data.prepare_data()
    monkeypatch.setattr(
        token_cache, "mapped", lambda file: _raise(OSError(errno.EMFILE, "Too many open files"))
    )
    with pytest.raises(BadInput, match="cannot be opened: this process has as many files open as it may"):
        TextFiles(str(tmp_path / "a.jsonl"), val_fraction=0.2, **COMMON).prepare_data()
    assert "damaged" not in caplog.text


def test_what_a_decoder_says_of_bytes_is_told_from_what_the_system_says():
    stored = gzip.compress(b"text " * 5000)
    with pytest.raises(Damaged) as raised:
        list(decompressed([b"\x00" + stored], "a.gz"))
    assert not raised.value.cut
    with pytest.raises(Damaged) as raised:
        list(decompressed([stored[:-9]], "a.gz"))
    assert raised.value.cut
    for error in (ValueError("x"), OSError("pyarrow's own, without a number"), EOFError()):
        assert system_fault(error, "a") is None
    assert "limit (ulimit -n)" in system_faults._descriptors()
    assert Path(str(system_fault(FileNotFoundError(2, "No such file"), "a")).split()[0]) == Path("a")
