"""Finds the operations that have benchmark rows: every `kernels/<operation>/bench.py` is one, and nothing lists them.

A `bench.py` holds

    WHAT         what it compares, for --help
    OPTIONS      {size option: help}
    FOLDERS      {option that takes a folder: help}; may be left out
    CPU_SIZES    {size: default} on a CPU; the name of another size as a default means that size's value
    GPU_SIZES    the same on a GPU
    PAPER_SIZES  list of sizes that --paper runs; may be left out
    rows(sizes, dtype, **folders)   a list of `kernels.bench.plan.Row`; ValueError, in one sentence, for sizes that
                                    do not go together

Each `bench_<name>.py` beside it that has HELP is a longer run on a GPU, started by `--<name>`. It holds

    HELP         of that option
    FOLDERS      names of those of the operation's options that it takes too; may be left out
    run(device, *, save, **folders)   a dictionary for JSON; calls `save` with what there is of it after each row
    table(result)                     the same for reading

WHAT, OPTIONS, HELP and FOLDERS are literals: they are read from the source, as setuptools reads `attr:`, because
importing an operation imports torch and --help must not wait for that.
"""

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kernels


@dataclass(frozen=True)
class LongRun:
    """What the command line needs to know of a `bench_<name>.py`."""

    help: str
    folders: tuple[str, ...]


@dataclass(frozen=True)
class Operation:
    """What the command line needs to know of a `bench.py` and of the runs beside it."""

    what: str
    options: dict[str, str]
    folders: dict[str, str]
    has_paper_sizes: bool
    long_runs: dict[str, LongRun]


def find() -> dict[str, Operation]:
    """Name -> operation, by name."""
    files = {file.parent.name: file for place in kernels.__path__ for file in Path(place).glob("*/bench.py")}
    return {name: _operation(files[name]) for name in sorted(files)}


def _operation(file: Path) -> Operation:
    bench = _Source(file)
    prefix = f"{file.stem}_"
    runs = {run.stem.removeprefix(prefix): _Source(run) for run in sorted(file.parent.glob(f"{prefix}*.py"))}
    return Operation(
        what=bench.literal("WHAT"),
        options=bench.literal("OPTIONS"),
        folders=bench.literal("FOLDERS", {}),
        has_paper_sizes="PAPER_SIZES" in bench.values,
        long_runs={
            name: LongRun(run.literal("HELP"), tuple(run.literal("FOLDERS", ())))
            for name, run in runs.items()
            if "HELP" in run.values
        },
    )


class _Source:
    """The top-level assignments of a file that is not imported."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.values: dict[str, ast.expr] = {}
        for node in ast.parse(file.read_text(encoding="utf-8"), str(file)).body:
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    self.values[name] = value
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                    self.values[name] = value

    def literal(self, name: str, default: Any = None) -> Any:
        """Raises TypeError where `name` is missing without a default, or no literal."""
        if name not in self.values and default is not None:
            return default
        try:
            return ast.literal_eval(self.values[name])
        except (KeyError, ValueError):
            raise TypeError(f"{self.file}: {name} must be there, as a literal") from None
