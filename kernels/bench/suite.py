"""Checks, times and tabulates everything that is claimed of the kernels, on one GPU.

python -m kernels.bench.suite FOLDER [--only PART ...] [--limit SECONDS] [--reference DIR]

Each part is a command of its own with a result file of its own in FOLDER. A part that fails or takes too long leaves
the other parts and its own older result as they are; the rows that it has finished are in name.json.partial.
"""

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from kernels.bench import operations, targets
from kernels.bench.__main__ import Parser, seconds

PYTHON = sys.executable
BENCH = [PYTHON, "-m", "kernels.bench"]
MODELS = [PYTHON, "-m", "t6_lightning", "bench"]
TRAINED = ["paper/medium-tpa", "paper/medium-mha"]
GENERATED = [
    *("paper/medium-tpa", "paper/medium-mla-as-released", "paper/medium-gqa", "paper/medium-mqa"),
    *("paper/medium-mha", "matched/medium-gqa-at-medium-tpa-cache", "matched/medium-mla-at-medium-tpa-cache"),
]
TESTS = Path(__file__).parents[2] / "tests" / "kernels"


def parts(folder: Path, reference: Path | None) -> dict[str, list[str]]:
    """Name -> command, those first without which the others say little.

    A part writes FOLDER/name.json, and some a name-profile.txt, both with .new behind until it has come to its end.
    """

    def json(name: str) -> list[str]:
        return ["--json", str(folder / f"{name}.json.new")]

    def profiled(name: str) -> list[str]:
        return ["--profile", str(folder / f"{name}-profile.txt.new"), *json(name)]

    # By name: the others' imports may be missing where only kernels run.
    checks = [str(file) for file in sorted(TESTS.glob("test_*.py")) if "mark.gpu" in file.read_text()]
    named = {
        "checks": [PYTHON, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *checks],
        "train": [*MODELS, "train", *TRAINED, *profiled("train")],
        "generate": [*MODELS, "generate", *GENERATED, "--new_tokens", "32", *profiled("generate")],
        "decode": [*BENCH, "decode", "--table", *json("decode")],
        "cache": [
            *(PYTHON, "-m", "t6_lightning", "cache", "paper/medium-tpa", "--context", "16384", "131072"),
            *json("cache"),
        ],
        "saves": [*MODELS, "train", "paper/medium-tpa", "--attention_saves", "factors", *json("saves")],
    }
    if reference is not None:
        named["decode"] += ["--reference", str(reference)]
    return named | {
        name: [*BENCH, name, "--paper", *json(name)]
        for name, operation in operations.find().items()
        if operation.has_paper_sizes
    }


def run(commands: Mapping[str, Sequence[str]], folder: Path, limit: float) -> dict[str, str]:
    """Run the parts in turn; what each printed is in FOLDER/name.txt.

    Returns:
        name -> "done", or what went wrong.
    """
    ended = {}
    for name, command in commands.items():
        began = time.monotonic()
        print(f"{name}: {' '.join(command)}", flush=True)
        fresh = [folder / f"{name}{end}.new" for end in (".json", "-profile.txt")]
        partial = folder / f"{name}.json.partial"
        _remove([*fresh, partial])
        with open(folder / f"{name}.txt", "wb") as said:
            try:
                code = subprocess.run(
                    command, stdout=said, stderr=said, timeout=limit, check=False
                ).returncode
                ended[name] = "done" if code == 0 else f"exit code {code}, see {said.name}"
                for file in fresh:
                    if code == 0 and file.is_file():
                        file.replace(file.with_suffix(""))
            except subprocess.TimeoutExpired:
                ended[name] = f"stopped after {limit:.0f} s, see {said.name}"
            finally:
                if fresh[0].is_file():
                    fresh[0].replace(partial)
                _remove(fresh)
        print(f"{name}: {ended[name]} ({time.monotonic() - began:.0f} s)", flush=True)
    return ended


def _remove(files: Sequence[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
    what, usage = (__doc__ or "").strip().partition("\n")[0], "python -m kernels.bench.suite"
    parser = Parser(prog=usage, description=what)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where results go; made if it is missing")
    parser.add_argument("--only", nargs="+", metavar="PART", help="of " + ", ".join(parts(Path(), None)))
    parser.add_argument(
        "--limit", type=seconds, default=600.0, metavar="SECONDS", help="of a part (default 600)"
    )
    parser.add_argument(
        "--reference", type=Path, metavar="DIR", help="a clone of the paper's public code, timed too"
    )
    given = parser.parse_args(argv)
    commands = parts(given.folder, given.reference)
    unknown = [name for name in given.only or [] if name not in commands]
    if unknown:
        parser.error(f"--only {unknown[0]}: allowed: {', '.join(commands)}")
    if given.limit <= 0:
        parser.error(f"--limit must be above 0, got {given.limit:g}")
    import torch

    from kernels.bench.others import check_reference

    try:
        if given.reference is not None:
            check_reference(given.reference)
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        parser.error("it times kernels for a GPU, and torch sees no CUDA device")
    try:
        given.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"{given.folder} cannot be made: {error.strerror}")
    try:
        ended = run({name: commands[name] for name in given.only or commands}, given.folder, given.limit)
    except KeyboardInterrupt:
        parser.exit(130, f"{usage}: interrupted\n")
    try:
        found = targets.table(targets.read(given.folder))
    except ValueError as error:
        print(error)
    else:
        (given.folder / "targets.md").write_text(found + "\n")
        print(f"\n{found}")
    return 0 if set(ended.values()) == {"done"} else 1


if __name__ == "__main__":
    sys.exit(main())
