"""Rows of local JSON files: exactly the values that are written there, each with its place for messages."""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from datamodules.file_faults import text_lines
from t6_lightning.common.errors import BadInput, first_line


def json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place such as "line 3", row) of each row of a file, plain or compressed.

    Rows are lines. A file whose first line is no whole object is held in memory: it is one array (a string in it
    stands for {"text": string}), or objects that go over several lines. Raises BadInput naming the first bad line.
    """
    lines = text_lines(path)
    some = False
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if some:
                raise BadInput(f"{path}: line {number} is not JSON ({_reason(error)}).") from error
            row = None
        if not (some or isinstance(row, dict)):
            yield from _rows_in(path, "".join(chain(["\n" * (number - 1), line], lines)))
            return
        some = True
        yield f"line {number}", _as_object(path, f"line {number}", row)


def reach(values: list[Any], name: str) -> list[Any]:
    """The values of a dotted name, given those of its first part; None where there is none.

    Objects on the way may also come as JSON text. Raises ValueError for text that is none.
    """
    for key in name.split(".")[1:]:
        objects = [json.loads(value) if isinstance(value, str) else value for value in values]
        values = [each.get(key) if isinstance(each, dict) else None for each in objects]
    return values


def _rows_in(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a text that is one array, or objects one after the other."""
    decoder, at, line = json.JSONDecoder(), 0, 1
    found: list[Any] = []
    places: list[str] = []
    try:
        while at < len(text):
            begin = at
            if text[at].isspace():
                at += 1
            else:
                places.append(f"line {line}")
                value, at = decoder.raw_decode(text, at)
                found.append(value)
            line += text.count("\n", begin, at)
    except json.JSONDecodeError as error:
        raise BadInput(f"{path}: line {error.lineno} is not JSON ({_reason(error)}).") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: {places[-1]} is not JSON ({_reason(error)}).") from error
    if len(found) == 1 and isinstance(found[0], list):
        found = [{"text": each} if isinstance(each, str) else each for each in found[0]]
        places = [f"row {number}" for number in range(1, len(found) + 1)]
    for place, row in zip(places, found, strict=True):
        yield place, _as_object(path, place, row)


def _as_object(path: Path, place: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise BadInput(f"{path}: {place} is a JSON {type(row).__name__}, not an object.")
    return row


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"
    return "nested too deep" if isinstance(error, RecursionError) else first_line(error)
