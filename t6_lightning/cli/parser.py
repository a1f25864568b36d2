"""The argument parser that these commands share."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from kernels.bench import files
from t6_lightning.common import arguments
from t6_lightning.common.errors import BadInput, require


class Parser(arguments.Parser):
    """The parser of one command."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"python -m t6_lightning {command}", description=description)

    def add_json(self) -> None:
        """`--json` prints JSON instead of a table, `--json FILE` writes it."""
        self.add_argument(
            "--json", nargs="?", const="-", metavar="FILE", help="print JSON, or write it to FILE"
        )

    def add_profile(self) -> None:
        """`--profile FILE`: where the time goes."""
        self.add_argument("--profile", metavar="FILE", help="append where each model's time goes to FILE")


def check_files(options: argparse.Namespace, *names: str) -> None:
    """Raises BadInput where a file cannot be written, or two results go into one: better before the work than after."""
    taken: dict[Path, str] = {}
    for name in names:
        file: str | None = getattr(options, name)
        if file is None or (name == "json" and file == "-"):
            continue
        why_not = files.why_not_writable(file)
        require(why_not is None, f"--{name}", file, why_not or "")
        path = files.target(file)
        if path.exists() and not path.is_file():  # a pipe, a terminal or /dev/null takes both
            continue
        other = taken.setdefault(path, name)
        require(other == name, f"--{name}", file, f"--{other} is written there; name another file")


def show_json(value: Any, target: str) -> None:
    """Write JSON to a file, or to standard output when `target` is "-"."""
    text = json.dumps(value, indent=2)
    if target == "-":
        sys.stdout.write(text + "\n")
        return
    try:
        files.write(target, text + "\n")
    except ValueError as error:
        raise BadInput(f"--json {error}") from error
