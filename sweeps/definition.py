"""What a sweep is: cells of command-line overrides, the same seeds for each, one budget."""

import json
import re
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from t6_lightning.common.databases import sqlite_url
from t6_lightning.common.errors import BadInput
from t6_lightning.common.home import t6_home

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # goes into run names, so into folder names
# Given by the sweep to every trial: an override of one of these would make trials incomparable or lose them.
RESERVED = ("config", "run", "seed_everything", "trainer.max_steps", "tracking.parent", "tracking.tags")


@dataclass(frozen=True)
class Cell:
    """One setting to compare.

    name: short, unique in the sweep; letters, digits, and . _ -
    overrides: `fit` options without their dashes, such as {"model.net.attention.rank_k": 1}.
    """

    name: str
    overrides: Mapping[str, Any]


@dataclass(frozen=True)
class Sweep:
    """A question: which cell is best when all get the same tokens and seeds?

    hypothesis: what is expected, and why.
    stopping_rule: when the sweep ends and what decides.
    max_steps: optimizer steps of each trial: with the config's tokens per step, the budget.
    seeds: each cell is trained once with each; comparisons are paired over them.
    cells: the settings compared.
    config: preset or YAML file that every trial starts from.
    overrides: `fit` options that all trials share.
    target_parameters: parameters that the cells are meant to have; None when they are not matched.
    name: the file's stem; `load_sweep` sets it.
    """

    hypothesis: str
    stopping_rule: str
    max_steps: int
    seeds: Sequence[int]
    cells: Sequence[Cell]
    config: str = "quickstart"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    target_parameters: int | None = None
    name: str = ""

    def __post_init__(self) -> None:
        _require(bool(self.cells), "cells", [], "at least one Cell")
        _require(bool(self.seeds), "seeds", [], "at least one integer")
        for seed in self.seeds:
            _require(type(seed) is int and 0 <= seed < 2**32, "seeds", seed, "integers from 0 to 2**32 - 1")
        _require(
            type(self.max_steps) is int and self.max_steps > 0,
            "max_steps",
            self.max_steps,
            "an integer above 0",
        )
        names = [cell.name for cell in self.cells]
        for name in names:
            _require(
                NAME_PATTERN.fullmatch(name) is not None, "cell name", name, "letters, digits, and . _ -"
            )
            _require(names.count(name) == 1, "cell name", name, "a name that no other cell has")
        _require(len(set(self.seeds)) == len(self.seeds), "seeds", list(self.seeds), "each seed once")
        for key in (*self.overrides, *(key for cell in self.cells for key in cell.overrides)):
            _require(key not in RESERVED, "override", key, "an option that the sweep does not set by itself")
        try:
            self.identity()
        except (TypeError, ValueError):
            raise BadInput(
                "overrides hold a value that is not plain; allowed: what JSON can write."
            ) from None

    @property
    def trials(self) -> list[tuple[Cell, int]]:
        """Every cell × seed; seeds outside, so that a sweep cut short compares all cells on fewer seeds."""
        return [(cell, seed) for seed in self.seeds for cell in self.cells]

    @property
    def folder(self) -> Path:
        """T6_HOME/sweeps/NAME: the logs of the trials."""
        return t6_home() / "sweeps" / self.name

    @property
    def report_file(self) -> Path:
        return self.folder.with_name(f"{self.name}.md")

    @property
    def curves_file(self) -> Path:
        return self.folder.with_name(f"{self.name}.png")

    @property
    def default_storage(self) -> str:
        """SQLAlchemy URL of the study when --storage is not given."""
        return sqlite_url(self.folder.with_name(f"{self.name}.db"))

    def run_name(self, cell: Cell, seed: int) -> str:
        return f"{self.name}-{cell.name}-seed{seed}"

    def fit_arguments(self, cell: Cell, seed: int) -> list[str]:
        """The arguments of `python -m t6_lightning` for one trial; tracking is added when it runs."""
        options = {"trainer.max_steps": self.max_steps, **self.overrides, **cell.overrides}
        return [
            "fit",
            f"--config={self.config}",
            f"--run={self.run_name(cell, seed)}",
            f"--seed_everything={seed}",
            *(
                f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
                for key, value in options.items()
            ),
        ]

    def identity(self) -> dict[str, Any]:
        """What makes results comparable; seeds may be added later, none of this may change."""
        stated = {
            "config": self.config,
            "max_steps": self.max_steps,
            "overrides": dict(self.overrides),
            "cells": {cell.name: dict(cell.overrides) for cell in self.cells},
        }
        return json.loads(json.dumps(stated))  # as the study gives it back: tuples become lists


def load_sweep(file: str) -> Sweep:
    """Run a sweep file and return the one Sweep it builds, named for the file.

    A file that does not exist is looked for, by its name, among the sweeps shipped with this package.
    Raises BadInput when there is no such file, when it fails, or when it builds no Sweep or several.
    """
    path = Path(file)
    if not path.exists():
        path = Path(__file__).parent / path.with_suffix(".py").name
    if not path.is_file():
        raise BadInput(f"FILE {file!r} does not exist; give a Python file that builds a Sweep.")
    _require(
        NAME_PATTERN.fullmatch(path.stem) is not None,
        "FILE",
        path.name,
        "a name of letters, digits, and . _ -",
    )
    try:
        found = [value for value in runpy.run_path(str(path)).values() if isinstance(value, Sweep)]
    except BadInput as error:
        raise BadInput(f"{file}: {error}") from None
    except SyntaxError as error:
        raise BadInput(f"{file}, line {error.lineno}: {error.msg}.") from None
    except Exception as error:  # the file is the user's program: it can fail in any way
        raise BadInput(f"{file} cannot be used: {type(error).__name__}: {error}") from None
    if len(found) != 1:
        raise BadInput(f"{file} builds {len(found) or 'no'} Sweep objects; it must build exactly one.")
    return replace(found[0], name=path.stem)


def _require(condition: bool, field_name: str, value: object, allowed: str) -> None:
    if not condition:
        raise BadInput(f"{field_name} {value!r} is not possible; allowed: {allowed}.")
