"""Small files that the product keeps for itself: written whole, with a checksum inside, and read with a check."""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t6_lightning.common.errors import BadInput, first_line
from t6_lightning.common.files import write_atomically

LARGEST = 64 * 2**20
"""Bytes that are read of a state file."""
SUM = "sha256"
"""Name of the checksum in a JSON file."""
SUM_LAST = re.compile(r'"[0-9a-f]{64}"\s*}\s*$')
SUM_LINE = "# sha256 of the lines below: "
"""Opens the first line of a text file."""
OPENING_BEFORE = "# lightning.pytorch=="
"""Opens that of a configuration of an earlier version."""


class DamagedState(BadInput):
    """A state file that cannot be trusted, or is missing where it must be.

    Args:
        file: its path.
        reason: what is wrong with it, to stand after "is".
        remedy: what the user can do, as a clause of its own.
    """

    def __init__(self, file: Path, reason: str, remedy: str = "") -> None:
        super().__init__(f"{file} is {reason}" + (f": {remedy}" if remedy else ""))
        self.file, self.reason = file, reason


def read_bounded(file: Path, remedy: str = "", largest: int | None = None) -> str:
    """The text of a small file, of at most `largest` bytes (default `LARGEST`).

    Raises:
        DamagedState: it is no regular file, too large, or no UTF-8.
        OSError: the system does not let it be read; FileNotFoundError where there is none.
    """
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):  # a pipe would never end
        raise DamagedState(file, "not a file", remedy)
    largest = LARGEST if largest is None else largest
    if status.st_size > largest:
        reason = f"damaged ({status.st_size:,} bytes; allowed: at most {largest:,})"
        raise DamagedState(file, reason, remedy)
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedState(file, f"damaged (no UTF-8 at byte {error.start})", remedy) from error


def write_state(file: Path, values: Mapping[str, Any]) -> None:
    """Write plain values as JSON, with their checksum under `SUM`, as `files.replacing` does."""
    values = {name: value for name, value in values.items() if name != SUM}
    text = json.dumps({**values, SUM: _json_sum(json.loads(json.dumps(values)))}, indent=2)
    write_atomically(file, text + "\n")


def read_state(
    file: Path,
    required: Mapping[str, type | tuple[type, ...]] | None = None,
    optional: Mapping[str, type | tuple[type, ...]] | None = None,
    remedy: str = "",
) -> dict[str, Any]:
    """The values that `write_state` wrote. A file without a checksum, of an earlier version, is read too.

    Args:
        file: its path.
        required: name -> types of values that must be there.
        optional: name -> types of values that may be missing.
        remedy: what the user can do about a damaged file.

    Raises:
        DamagedState: it is damaged, or holds other values.
        OSError: see `read_bounded`.
    """

    def damaged(reason: str) -> DamagedState:
        return DamagedState(file, f"damaged ({reason})", remedy)

    text = read_bounded(file, remedy)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(f"no JSON: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise damaged(f"it holds a {type(values).__name__}, and no mapping")
    # A checksum whose name is damaged is one all the same: it comes last, and earlier versions wrote none.
    has_sum = SUM in values or SUM_LAST.search(text)
    if values.pop(SUM, None) != (_json_sum(values) if has_sum else None):
        raise damaged("its checksum differs from the one written with it")
    for name, types in {**(optional or {}), **(required or {})}.items():
        if name not in values:
            if required is not None and name in required:
                raise damaged(f"it lacks {name}")
        elif not isinstance(values[name], types):
            raise damaged(f"{name} is {str(values[name])[:80]!r}, of type {type(values[name]).__name__}")
    return values


def _json_sum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def write_text(file: Path, text: str) -> None:
    """Write lines in which `#` begins a comment (YAML) below one with their checksum, in place of an older one."""
    lines = _split(text)[1]
    write_atomically(file, f"{SUM_LINE}{hashlib.sha256(lines.encode()).hexdigest()}\n{lines}")


def read_text(file: Path, remedy: str = "", largest: int | None = None) -> str:
    """The lines that `write_text` wrote, or all of a file of an earlier version, which has no checksum.

    Raises:
        DamagedState: it is damaged or empty.
        OSError: see `read_bounded`.
    """
    written, lines = _split(read_bounded(file, remedy, largest))
    if written not in (None, hashlib.sha256(lines.encode()).hexdigest()):
        reason = "damaged, or was changed by hand (its checksum differs from the one written with it)"
        raise DamagedState(file, reason, remedy)
    if not lines.strip():
        raise DamagedState(file, "empty", remedy)
    return lines


def _split(text: str) -> tuple[str | None, str]:
    """(checksum or None, lines). It comes first, where a cut leaves it.

    Another comment there is a damaged one, unless it is `OPENING_BEFORE`.
    """
    first, _, rest = text.partition("\n")
    has_sum = first.startswith("#") and not first.startswith(OPENING_BEFORE)
    return (first.removeprefix(SUM_LINE), rest) if has_sum else (None, text)
