"""Command line of the operation benchmark. Imports torch only once the arguments are known to be good."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from kernels.bench import files, operations
from kernels.bench.operations import Operation

DESCRIPTION = "Times one operation of the kernels beside other ways to compute it, on random numbers."
EPILOG = """Sizes left out fit the device. 'ratio' is the first row's time over this row's: above 1 is faster.
'of copy' is the bytes the operation must at least move, per second, over the copy bandwidth measured in the
same run."""

SECONDS = 1  # a row, unless --seconds says otherwise


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence, without the usage text."""
        self.exit(2, f"{self.prog}: {message}\n")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds, got {text!r}")
    return value


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def build_parser(found: Mapping[str, Operation]) -> Parser:
    parser = Parser(prog="python -m kernels.bench", description=DESCRIPTION)
    subparsers = parser.add_subparsers(dest="operation", required=True, metavar="|".join(found))
    for name, operation in found.items():
        sub = subparsers.add_parser(
            name, help=operation.what, description=f"Times {operation.what}.", epilog=EPILOG
        )
        for option, text in operation.options.items():
            sub.add_argument(flag(option), type=positive, metavar="N", help=text)
        for option, long_run in operation.long_runs.items():
            sub.add_argument(flag(option), action="store_true", help=long_run.help)
        for option, text in operation.folders.items():
            sub.add_argument(flag(option), type=Path, metavar="DIR", help=text)
        if operation.has_paper_sizes:
            sub.add_argument(
                "--paper",
                action="store_true",
                help="the sizes of the paper's four models instead, 16,384 tokens each",
            )
        sub.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
        sub.add_argument(
            "--dtype",
            choices=("float32", "bfloat16", "float16"),
            help="default: float32 on a CPU, bfloat16 on a GPU",
        )
        sub.add_argument(
            "--seconds", type=seconds, metavar="S", help=f"time to spend on each row (default {SECONDS})"
        )
        sub.add_argument(
            "--json",
            nargs="?",
            const="-",
            metavar="FILE",
            help="write JSON to FILE and the table to standard output; without FILE, JSON to standard output",
        )
    return parser


def one_plan(
    name: str, operation: Operation, given: Mapping[str, int | None], arguments: argparse.Namespace
) -> tuple[dict, str]:
    """The backends of one operation at one size. Raises ValueError, in one sentence, for what cannot run."""
    from kernels.bench import memory, plan, report

    folders = {option: getattr(arguments, option) for option in operation.folders}
    try:
        planned = plan.plan(name, given, device=arguments.device, dtype=arguments.dtype, folders=folders)
        result = report.run(planned, seconds=SECONDS if arguments.seconds is None else arguments.seconds)
    except memory.ERRORS as error:
        if not memory.no_room(error):
            raise
        sizes = " ".join(f"{flag(size)} {value}" for size, value in given.items() if value)
        what = f"--paper ({sizes})" if getattr(arguments, "paper", False) else sizes or name
        raise ValueError(f"{what}: there is no memory for these sizes here") from error
    return result, report.table(result)


def paper_sizes(
    name: str, operation: Operation, sizes: Sequence[str], arguments: argparse.Namespace
) -> tuple[dict, str]:
    """One operation at the paper's sizes. Raises ValueError, in one sentence, for what cannot run."""
    if sizes:
        raise ValueError(f"--paper has its own sizes: leave out {flag(sizes[0])}")
    bench = import_module(f"kernels.{name}.bench")
    # One after the other, so that the inputs of one are in memory.
    found = [one_plan(name, operation, given, arguments) for given in bench.PAPER_SIZES]
    tables = "\n\n".join(table for _, table in found)
    return {"operation": name, "cases": [result for result, _ in found]}, tables


def long_run(
    name: str,
    operation: Operation,
    chosen: str,
    sizes: Sequence[str],
    arguments: argparse.Namespace,
    save: Callable[[dict], None],
) -> tuple[dict, str]:
    """The run of `kernels/<name>/bench_<chosen>.py`. Raises ValueError, in one sentence, for what cannot run."""
    taken = operation.long_runs[chosen].folders
    left_out = [
        other for other in (*operation.long_runs, *operation.folders) if other not in (chosen, *taken)
    ]
    named = [*sizes, *(option for option in ("dtype", "seconds") if getattr(arguments, option) is not None)]
    named += [option for option in left_out if getattr(arguments, option)]
    if named:
        raise ValueError(
            f"{flag(chosen)} has its own sizes, dtype and repetitions: leave out {flag(named[0])}"
        )
    import torch

    from kernels.place import TRITON_IS_INSTALLED

    if arguments.device == "cpu" or not torch.cuda.is_available() or not TRITON_IS_INSTALLED:
        raise ValueError(
            f"{flag(chosen)} times the Triton kernel: it needs a CUDA device and the package triton"
        )
    bench = import_module(f"kernels.{name}.bench_{chosen}")
    folders = {option: getattr(arguments, option) for option in taken}
    result = bench.run(torch.device("cuda"), save=save, **folders)
    return result, bench.table(result)


def as_json(result: dict) -> str:
    return json.dumps(result, indent=2) + "\n"


def main(argv: list[str] | None = None) -> int:
    found = operations.find()
    parser = build_parser(found)
    arguments = parser.parse_args(argv)
    file = None if arguments.json == "-" else arguments.json
    why_not = None if file is None else files.why_not_writable(file)
    if why_not:
        parser.error(f"--json {file!r}: {why_not}")

    def write(result: dict) -> None:
        if file is not None:
            try:
                files.write(file, as_json(result))
            except ValueError as error:
                raise ValueError(f"--json {error}") from error

    saved = False

    def save(result: dict) -> None:
        nonlocal saved
        if file is not None and files.is_regular(file):  # a pipe takes one document, at the end
            write(result)
            saved = True

    name, operation = arguments.operation, found[arguments.operation]
    given: dict[str, int | None] = {option: getattr(arguments, option) for option in operation.options}
    try:
        named = [size for size, value in given.items() if value]
        chosen = next((run for run in operation.long_runs if getattr(arguments, run)), None)
        if chosen is not None:
            result, table = long_run(name, operation, chosen, named, arguments, save)
        elif getattr(arguments, "paper", False):
            result, table = paper_sizes(name, operation, named, arguments)
        else:
            result, table = one_plan(name, operation, given, arguments)
        if arguments.json == "-":
            print(as_json(result), end="")
            return 0
        print(table)
        write(result)
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        kept = f"; the finished rows are in {file}" if saved else ""
        parser.exit(130, f"{parser.prog}: interrupted{kept}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
