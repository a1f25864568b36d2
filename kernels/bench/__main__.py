"""Command line of the operation benchmark. Imports torch only once the arguments are known to be good."""

import argparse
import json
import sys
from pathlib import Path
from typing import NoReturn

from kernels.bench import files

DESCRIPTION = "Times one operation of the kernels beside other ways to compute it, on random numbers."
EPILOG = """Sizes left out fit the device. 'ratio' is the first row's time over this row's: above 1 is faster.
'of copy' is the bytes the operation must at least move, per second, over the copy bandwidth measured in the
same run."""

SECONDS = 1  # a row, unless --seconds says otherwise

# operation -> (what it compares, {size option: help}); the defaults stand in kernels/bench/cases.py.
BATCH = {"batch": "sequences"}
HEADS = {"heads": "attention heads", "head-dim": "features per head"}
OPERATIONS: dict[str, tuple[str, dict[str, str]]] = {
    "decode": (
        "TPA attention over a cache of factors, and MHA over a full cache",
        {**BATCH, "context": "cached tokens", "queries": "new tokens", **HEADS, "rank": "rank of K and of V"},
    ),
    "contract": (
        "queries, keys or values from their factors, RoPE included",
        {**BATCH, "context": "tokens per sequence", **HEADS, "rank": "rank"},
    ),
    "attention": (
        "causal attention over full keys and values",
        {**BATCH, "context": "tokens per sequence", **HEADS, "kv-heads": "heads of keys and values"},
    ),
    "linear": (
        "a linear layer of a few rows, alone and with what stands around it in decoding",
        {"batch": "rows", "inputs": "features of a row", "outputs": "features of the result"},
    ),
    "swiglu": (
        "SwiGLU of gate and up side by side, in training",
        {**BATCH, "context": "tokens per sequence", "hidden": "hidden size of the FFN"},
    ),
    "loss": (
        "linear layer and cross-entropy",
        {**BATCH, "context": "tokens per sequence", "d-model": "hidden size", "vocabulary": "classes"},
    ),
}


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


def build_parser() -> Parser:
    parser = Parser(prog="python -m kernels.bench", description=DESCRIPTION)
    operations = parser.add_subparsers(dest="operation", required=True, metavar="|".join(OPERATIONS))
    for name, (what, sizes) in OPERATIONS.items():
        sub = operations.add_parser(name, help=what, description=f"Times {what}.", epilog=EPILOG)
        for option, text in sizes.items():
            sub.add_argument(f"--{option}", type=positive, metavar="N", help=text)
        if name == "decode":
            sub.add_argument(
                "--table",
                action="store_true",
                help="the Triton kernel over heads, ranks, lengths and layouts beside SDPA (needs a GPU)",
            )
            sub.add_argument(
                "--launches",
                action="store_true",
                help="all launches of the Triton kernel beside the one that it takes (needs a GPU)",
            )
            sub.add_argument(
                "--reference",
                type=Path,
                metavar="DIR",
                help="a clone of the paper's public code, whose kernel is timed too (needs a GPU)",
            )
        else:
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


def one_plan(operation: str, given: dict[str, int | None], arguments: argparse.Namespace) -> tuple[dict, str]:
    """The backends of one operation at one size. Raises ValueError, in one sentence, for what cannot run."""
    from kernels.bench import cases, memory, report

    try:
        plan = cases.plan(
            operation,
            given,
            device=arguments.device,
            dtype=arguments.dtype,
            reference=getattr(arguments, "reference", None),
        )
        result = report.run(plan, seconds=SECONDS if arguments.seconds is None else arguments.seconds)
    except memory.ERRORS as error:
        if not memory.no_room(error):
            raise
        sizes = " ".join(f"--{name.replace('_', '-')} {size}" for name, size in given.items() if size)
        said = f"--paper ({sizes})" if getattr(arguments, "paper", False) else sizes or operation
        raise ValueError(f"{said}: there is no memory for these sizes here") from error
    return result, report.table(result)


def paper_sizes(operation: str, sizes: list[str], arguments: argparse.Namespace) -> tuple[dict, str]:
    """One operation at the paper's sizes. Raises ValueError, in one sentence, for what cannot run."""
    if sizes:
        raise ValueError(f"--paper has its own sizes: leave out --{sizes[0].replace('_', '-')}")
    from kernels.bench.cases import PAPER_SIZES

    # One after the other, so that the inputs of one are in memory.
    found = [one_plan(operation, given, arguments) for given in PAPER_SIZES[operation]]
    tables = "\n\n".join(table for _, table in found)
    return {"operation": operation, "cases": [result for result, _ in found]}, tables


def decode_table(sizes: list[str], arguments: argparse.Namespace) -> tuple[dict, str]:
    """The decode kernel over a table of cases or launches. Raises ValueError, in one sentence, for what cannot run."""
    option = "--launches" if arguments.launches else "--table"
    named = [*sizes, *(name for name in ("dtype", "seconds") if getattr(arguments, name) is not None)]
    if arguments.launches:
        named += [name for name in ("table", "reference") if getattr(arguments, name)]
    if named:
        raise ValueError(
            f"{option} has its own sizes, dtype and repetitions: leave out --{named[0].replace('_', '-')}"
        )
    import torch

    from kernels.place import TRITON_IS_INSTALLED

    if arguments.device == "cpu" or not torch.cuda.is_available() or not TRITON_IS_INSTALLED:
        raise ValueError(f"{option} times the Triton kernel: it needs a CUDA device and the package triton")
    from kernels.bench import decode_launches, decode_table
    from kernels.bench.others import Reference

    if arguments.launches:
        result = decode_launches.run(torch.device("cuda"))
        return result, decode_launches.table(result)
    folder = arguments.reference
    result = decode_table.run(torch.device("cuda"), reference=Reference(folder) if folder else None)
    return result, decode_table.table(result)


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    why_not = None if arguments.json in (None, "-") else files.why_not_writable(arguments.json)
    if why_not:
        parser.error(f"--json {arguments.json!r}: {why_not}")

    given = {
        option.replace("-", "_"): getattr(arguments, option.replace("-", "_"))
        for option in OPERATIONS[arguments.operation][1]
    }
    try:
        named = [name for name, size in given.items() if size]
        if getattr(arguments, "table", False) or getattr(arguments, "launches", False):
            result, table = decode_table(named, arguments)
        elif getattr(arguments, "paper", False):
            result, table = paper_sizes(arguments.operation, named, arguments)
        else:
            result, table = one_plan(arguments.operation, given, arguments)
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")

    if arguments.json == "-":
        print(json.dumps(result, indent=2))
        return 0
    print(table)
    if arguments.json:
        try:
            files.write(arguments.json, json.dumps(result, indent=2) + "\n")
        except ValueError as error:
            parser.error(f"--json {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
