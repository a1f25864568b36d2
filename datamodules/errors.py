"""What the package raises when data or settings are wrong, or the data cannot be reached."""

import re


class BadData(ValueError):
    """One sentence that names the field, file or line, the value, and what is allowed."""

    def __init__(self, message: str):
        # A loader's worker process hands its errors on with the traceback in the message: only the last line
        # is meant for the user.
        if "\nOriginal Traceback" in message:
            message = message.strip().splitlines()[-1].partition(": ")[2]
        super().__init__(message)


class SourceUnavailable(BadData):
    """The hub gave no data for the stated time. Nothing is lost: the same command goes on from a checkpoint."""


def reason_in(report: str) -> str:
    """What jsonargparse says of a value that fits none of its types, on one line: the reason of the first type."""
    text = " ".join(report.split())
    of_union = re.search(
        r"Does not validate against any of the Union subtypes.*? - (.*) - Expected a <class 'NoneType'>", text
    )
    return reason_in(of_union[1]) if of_union else text


def first_line(error: Exception) -> str:
    """What a foreign exception says, short enough to stand in a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
