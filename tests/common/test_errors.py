"""What a user did wrong, in one sentence."""

from __future__ import annotations

import pytest

from t6_lightning.common.errors import BadInput, SourceUnavailable, first_line, reason_in, require, shown


def test_an_error_of_a_worker_process_loses_its_traceback() -> None:
    passed_on = (
        "Caught BadInput in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1, in f\nt6_lightning.common.errors.BadInput: files: there is none.\n'
    )
    assert str(BadInput(passed_on)) == "files: there is none."
    assert str(BadInput("as it is")) == "as it is"


def test_every_error_of_the_user_is_a_value_error() -> None:
    assert issubclass(BadInput, ValueError)
    assert issubclass(SourceUnavailable, BadInput)


def test_require() -> None:
    require(True, "order", 2, "it must be at most 8")
    with pytest.raises(BadInput, match=r"^order='9' is not possible: it must be at most 8$"):
        require(False, "order", "9", "it must be at most 8")


@pytest.mark.parametrize(
    ("error", "line"),
    [(OSError("one.\ntwo"), "one"), (KeyError(), "KeyError"), (ValueError("  \n"), "ValueError")],
)
def test_first_line(error: Exception, line: str) -> None:
    assert first_line(error) == line


def test_reason_in_a_report_of_jsonargparse() -> None:
    report = (
        "Does not validate against any of the Union subtypes\n  Subtypes: [A, B]\n  Errors:\n"
        "    - it must be\n      at least 1\n    - Expected a <class 'NoneType'>"
    )
    assert reason_in(report) == "it must be at least 1"
    assert reason_in("a\n  b") == "a b"


def test_a_long_value_is_cut_in_its_sentence() -> None:
    with pytest.raises(BadInput) as refusal:
        require(False, "--run", "a" * 10_000, "shorter")
    assert len(str(refusal.value)) < 300
    assert "(10,002 characters) is not possible: shorter" in str(refusal.value)
    assert "digits" in shown(16**9000)
