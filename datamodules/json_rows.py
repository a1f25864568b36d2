"""Rows of local JSON files: exactly the values that are written there, each with its place for messages."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datamodules.text_reading import text_lines, text_pieces, too_long
from t6_lightning.common.errors import BadInput, first_line

BLANK = re.compile(r"\s*")


def json_rows(path: Path, most: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place such as "line 3", row) of each row of a file, plain or compressed.

    Rows are lines, or where the first line is no whole object, objects that go over several lines, or the elements of
    one array (a string in it stands for {"text": string}). Raises BadInput naming the first bad line, also for a row
    of more than `most` bytes.
    """
    if not _is_lines(path, most):
        yield from _Values(path, most).rows()
        return
    for number, line in enumerate(text_lines(path, most), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{path}: line {number} is not JSON ({_reason(error)}).") from error
            yield f"line {number}", _as_object(path, f"line {number}", row)


def _is_lines(path: Path, most: int) -> bool:
    """Whether the first line that is not blank is a whole object."""
    opening = next((piece.lstrip()[0] for piece in text_pieces(path) if piece.strip()), None)
    if opening != "{":
        return opening is None
    line = next(line for line in text_lines(path, most) if line.strip())
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def reach(values: list[Any], name: str) -> list[Any]:
    """The values of a dotted name, given those of its first part; None where there is none.

    Objects on the way may also come as JSON text. Raises ValueError for text that is none.
    """
    for key in name.split(".")[1:]:
        objects = [json.loads(value) if isinstance(value, str) else value for value in values]
        values = [each.get(key) if isinstance(each, dict) else None for each in objects]
    return values


class _Values:
    """Reads the values of a text that is one array, or objects one after the other, holding only the present one."""

    def __init__(self, path: Path, most: int):
        self.path, self.most = path, most
        self._pieces = text_pieces(path)
        self._text, self._at = "", 0
        self._mark, self._line, self._column = 0, 1, 0
        """A place in `_text`, its line, and the characters of that line before it."""
        self._whole = False
        """Whether `_text` holds all that is left."""

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        if self._next_character() == "[":
            self._at += 1
            for number, value in enumerate(self._elements(), start=1):
                row = {"text": value} if isinstance(value, str) else value
                yield f"row {number}", _as_object(self.path, f"row {number}", row)
        while self._next_character():
            place = f"line {self._place(self._at)[0]}"
            yield place, _as_object(self.path, place, self._value())

    def _elements(self) -> Iterator[Any]:
        if self._next_character() == "]":
            self._at += 1
            return
        while True:
            yield self._value()
            character = self._next_character()
            if character not in (",", "]"):
                raise self._bad("Expecting ',' delimiter", self._at)
            self._at += 1
            if character == "]":
                return

    def _next_character(self) -> str:
        """The next one that is not blank, at which `_at` then is; none at the end."""
        while True:
            blank = BLANK.match(self._text, self._at)
            assert blank is not None
            self._at = blank.end()
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def _value(self) -> Any:
        self._next_character()
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._text, self._at)
                length = end - self._at
                # A number may go on in what is not read yet.
                if end < len(self._text) or not self._more():
                    self._at += length
                    return value
            except json.JSONDecodeError as error:
                if len(self._text) - self._at > self.most:
                    raise too_long(f"{self.path}: line {self._place(self._at)[0]}", self.most) from error
                before = error.pos - self._at
                if not self._more():
                    raise self._bad(error.msg, self._at + before) from error
            except (ValueError, RecursionError) as error:
                place = self._place(self._at)[0]
                raise BadInput(f"{self.path}: line {place} is not JSON ({_reason(error)}).") from error

    def _more(self) -> bool:
        """Read on, twice as far as before; False at the end."""
        self._place(self._at)
        parts = [self._text[self._at :]]
        wanted = max(len(parts[0]), 1)
        self._mark = self._at = 0
        while wanted > 0 and not self._whole:
            piece = next(self._pieces, None)
            if piece is None:
                self._whole = True
            else:
                parts.append(piece)
                wanted -= len(piece)
        self._text = "".join(parts)
        return len(parts) > 1

    def _place(self, at: int) -> tuple[int, int]:
        """(line, characters before it in that line) of a place in `_text` not before the last one asked for"""
        newlines = self._text.count("\n", self._mark, at)
        if newlines:
            self._line, self._column = self._line + newlines, at - self._text.rfind("\n", 0, at) - 1
        else:
            self._column += at - self._mark
        self._mark = at
        return self._line, self._column

    def _bad(self, reason: str, at: int) -> BadInput:
        line, column = self._place(at)
        return BadInput(f"{self.path}: line {line} is not JSON ({reason}, column {column + 1}).")


def _as_object(path: Path, place: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise BadInput(f"{path}: {place} is a JSON {type(row).__name__}, not an object.")
    return row


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"
    return "nested too deep" if isinstance(error, RecursionError) else first_line(error)
