"""Configuration files that are hostile, damaged or endless are refused at once, in one sentence that names the file."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

import pytest

from t6_lightning.common.errors import BadInput
from t6_lightning.presets import LONGEST_CHAIN, settings

LETTERS = "abcdefgh"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in pairwise(LETTERS)
)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        pytest.param(BOMB, "more than 20,000 values, aliases spelled out", id="aliases of aliases"),
        pytest.param("a: &a [*a]\n", "an alias stands inside what it is an alias of in line 1", id="itself"),
        pytest.param("a: &a {b: {c: *a}}\n", "an alias stands inside", id="itself in a mapping"),
        pytest.param("a: " + "[" * 5000, "more than 64 levels of nesting", id="brackets"),
        pytest.param(
            "\n".join(" " * i + "a:" for i in range(900)), "more than 64 levels of nesting", id="mappings"
        ),
        pytest.param("a: [" + "1," * 30000 + "]", "more than 20,000 values", id="values"),
        pytest.param("# " + "x" * 600_000, "more than 500,000 bytes", id="bytes"),
        pytest.param("!!set {a, b}", "the tag 'set' is not allowed", id="set"),
        pytest.param("a: !!binary aGk=", "the tag 'binary' is not allowed", id="binary"),
        pytest.param(
            "a: !!python/object/apply:os.getcwd []", "python/object/apply:os.getcwd' is not", id="code"
        ),
        pytest.param("a: " + "9" * 5000, "more than 100 digits of a number", id="digits"),
        pytest.param("a: 0x" + "f" * 5000, "more than 100 digits of a number", id="hexadecimal digits"),
        pytest.param("a: 0b_", "invalid literal for int()", id="no digits"),
        pytest.param("a: {b: 1, b: 2}", "'b' stands twice in one mapping in line 1", id="equal keys"),
        pytest.param("? [a]\n: 1", "a key is a list or a mapping", id="a list as a key"),
        pytest.param(b"a: caf\xe9\n", "byte 6 is not UTF-8", id="Latin-1"),
        pytest.param("a:\n\t- 1", "found character '\\t' that cannot start any token", id="tab"),
        pytest.param(b"a: \0", "unacceptable character", id="NUL"),
        pytest.param("a: 1\n---\nb: 2", "expected a single document", id="two documents"),
        pytest.param("", "holds no settings", id="empty"),
    ],
)
def test_a_file_beyond_the_bounds_is_refused_itself_and_as_a_base(
    content: str | bytes, sentence: str, tmp_path: Path
) -> None:
    base, file = tmp_path / "base.yaml", tmp_path / "mine.yaml"
    base.write_bytes(content.encode() if isinstance(content, str) else content)
    file.write_text("extends: base.yaml\n")
    began = time.monotonic()
    for named in (base, file):
        with pytest.raises(BadInput) as refusal:
            settings(named)
        assert str(refusal.value).startswith(f"{base} ")
        assert sentence in str(refusal.value)
        assert "\n" not in str(refusal.value)
    assert time.monotonic() - began < 10


def test_numbers_dates_aliases_and_merges_mean_what_they_did(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "﻿a: &a {x: 1e-4, y: 1_000}\nb: {<<: *a, y: .inf}\nc: [*a, 2026-01-01, null, yes]\n", encoding="utf-8"
    )
    assert settings(tmp_path / "mine.yaml") == {
        "a": {"x": 1e-4, "y": 1000},
        "b": {"x": 1e-4, "y": float("inf")},
        "c": [{"x": 1e-4, "y": 1000}, "2026-01-01", None, True],
    }


def test_a_chain_of_files_has_an_end(tmp_path: Path) -> None:
    for i in range(LONGEST_CHAIN + 3):
        (tmp_path / f"{i}.yaml").write_text(f"extends: {i + 1}.yaml\n")
    with pytest.raises(BadInput, match=f"more than {LONGEST_CHAIN} files extend each other"):
        settings(tmp_path / "0.yaml")
