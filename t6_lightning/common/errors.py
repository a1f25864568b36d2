"""What a user did wrong, said in one sentence, and data that cannot be reached."""

from __future__ import annotations

import errno
import re


class BadInput(ValueError):
    """A setting, file, checkpoint or data set that cannot be used.

    The message is one sentence that names the field, the value and what is allowed. The command lines
    print it alone, without a traceback, and exit with code 2.
    """

    def __init__(self, message: str) -> None:
        # A loader's worker process passes its errors on with the traceback in the message: only the last line
        # is meant for the user.
        if "\nOriginal Traceback" in message:
            message = message.strip().splitlines()[-1].partition(": ")[2]
        super().__init__(message)


class SourceUnavailable(BadInput):
    """The hub gave no data for the stated time. Nothing is lost: the same command goes on from a checkpoint."""


class WorkerDied(RuntimeError):
    """A loader's worker process was killed or ended by itself. The message is one sentence for the user."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; older ones are untouched."""


def require(condition: bool, field: str, value: object, allowed: str) -> None:
    """Raise `BadInput` naming the field, its value and what is allowed, unless the condition holds."""
    if not condition:
        raise BadInput(f"{field}={shown(value)} is not possible: {allowed}")


LONGEST_SHOWN = 200
"""Characters of a value in a sentence."""


def shown(value: object) -> str:
    """A value as it stands in a sentence: on one line, and cut where it is long."""
    try:
        text = repr(value)
    except Exception as error:  # an integer beyond Python's limit of digits, or a __repr__ of the user's
        return f"<{type(value).__name__}: {first_line(error)}>"
    text = " ".join(text.split())
    if len(text) <= LONGEST_SHOWN:
        return text
    return f"{text[: LONGEST_SHOWN - 40]}…{text[-20:]} ({len(text):,} characters)"


NO_PLACE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
)
"""What is wrong with the disk rather than with the program."""


def disk_sentence(error: OSError) -> str | None:
    """What keeps a file from being read or written, naming it; None for errors of another kind than `NO_PLACE`."""
    if error.errno not in NO_PLACE:
        return None
    reason = (error.strerror or "").lower()
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{error.filename or 'a file'} could not be written ({reason})"
    return f"{error.filename or 'a file'} cannot be used ({reason})"


def first_line(error: BaseException) -> str:
    """What a foreign exception says, short enough to stand in a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def reason_in(report: str) -> str:
    """What jsonargparse says of a value that fits none of its types, on one line: the reason of the first type."""
    text = " ".join(report.split())
    of_union = re.search(
        r"Does not validate against any of the Union subtypes.*? - (.*) - Expected a <class 'NoneType'>", text
    )
    return reason_in(of_union[1]) if of_union else text
