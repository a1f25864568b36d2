"""T6_HOME."""

from __future__ import annotations

from pathlib import Path

import pytest

from t6_lightning.common.errors import BadInput
from t6_lightning.common.home import t6_home


@pytest.mark.parametrize("given", [None, ""])
def test_without_the_variable_it_is_a_folder_here(
    given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if given is None:
        monkeypatch.delenv("T6_HOME", raising=False)
    else:
        monkeypatch.setenv("T6_HOME", given)
    assert t6_home() == tmp_path / "t6_runs"
    assert not t6_home().exists()


def test_it_is_absolute_and_knows_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("T6_HOME", "~/runs")
    assert t6_home() == tmp_path / "runs"


def test_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("T6_HOME", str(tmp_path / "file"))
    with pytest.raises(BadInput, match="is a file; allowed: a folder"):
        t6_home()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("/dev/null", "'/dev/null' is a file"),
        ("/dev/null/inside", "cannot be used: Not a directory"),
        ("~no-such-user/h", "that user has no home folder"),
        ("loop", "cannot be used: Too many levels of symbolic links"),
        ("nowhere", "is a link to a folder that is missing"),
        ("a" * 300, "cannot be used: File name too long"),
        ("\udcff", "is not valid UTF-8"),
    ],
)
def test_what_can_be_no_folder_is_refused(
    given: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("missing")
    monkeypatch.setenv("T6_HOME", given)
    with pytest.raises(BadInput, match=f"^T6_HOME: .*{says}"):
        t6_home()
