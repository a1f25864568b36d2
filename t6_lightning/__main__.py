"""The one front door: python -m t6_lightning COMMAND ..."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import signal
import sys
import warnings
from contextlib import nullcontext
from typing import NoReturn

from t6_lightning.common.errors import BadInput, CheckpointError, SourceUnavailable, disk_sentence, shown
from t6_lightning.distributed.signals import Interrupted, signals

# Each command's module has main(arguments) -> exit code; it is imported only when called.
COMMANDS = {
    "fit": ("t6_lightning.cli.fit", "train a model (without arguments: the preset `quickstart`)"),
    "validate": (
        "t6_lightning.cli.validate",
        "loss, perplexity and bits per byte of a checkpoint on its validation data",
    ),
    "test": (
        "t6_lightning.cli.validate",
        "the same figures on the test data, which neither training nor validation saw",
    ),
    "predict": ("t6_lightning.cli.predict", "write the loss of every validation token to a file"),
    "generate": ("t6_lightning.cli.generate", "write text from a prompt"),
    "evaluate": (
        "t6_lightning.cli.evaluate",
        "perplexity and bits per byte of a checkpoint on given files",
    ),
    "consolidate": ("t6_lightning.cli.consolidate", "one checkpoint file of a folder of shards"),
    "cache": ("t6_lightning.cli.cache", "measured and predicted key/value cache of presets"),
    "params": ("t6_lightning.cli.params", "parameters, cache and FLOPs of presets"),
    "bench": (
        "t6_lightning.cli.bench",
        "tokens per second of whole models: bench train, bench generate",
    ),
    "import": ("t6_lightning.cli.import_", "read a checkpoint of the paper's public code"),
}

# What is wrong with a path that was given.
NO_PATH = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)


def usage() -> str:
    lines = [f"  {name:<10} {about}" for name, (_, about) in COMMANDS.items()]
    return (
        "usage: python -m t6_lightning COMMAND [...]\n\n" + "\n".join(lines) + "\n\nCOMMAND --help says more."
    )


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 when the work is done, 2 for bad input (one sentence on standard error), 75 after a signal when the
        same command line will go on, 1 when the work failed, 141 when nobody reads standard output any more.
    """
    try:
        try:
            return _main(sys.argv[1:] if arguments is None else arguments)
        finally:
            sys.stdout.flush()  # a closed pipe shows here, and not when Python ends
    except BrokenPipeError:
        from t6_lightning.common.console import leave_closed_pipe

        return leave_closed_pipe()


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    command = arguments[0]
    if command not in COMMANDS:
        print(
            f"error: {shown(command)} is not a command: choose one of {', '.join(COMMANDS)}", file=sys.stderr
        )
        return 2
    quiet_libraries()
    try:
        with signals.taken() if command == "fit" else nullcontext():
            with signals.raised_where_alone() if command == "fit" else nullcontext():
                module = importlib.import_module(COMMANDS[command][0])
            return module.main(arguments)
    except Interrupted as error:
        if error.at_once:
            leave_at_once(128 + error.signum)
        print(f"stopped by {error} before training began: go on with the same command", file=sys.stderr)
        return 75
    except SourceUnavailable as error:
        print(f"error: {error}", file=sys.stderr)
        return 75
    except BadInput as error:
        from t6_lightning.cli.refusals import with_option
        from t6_lightning.distributed import ranks

        # Before ranks have found each other, all of them see the same arguments.
        if ranks.connected() or ranks.is_first():
            print(f"error: {with_option(str(error), arguments)}", file=sys.stderr)
        return 2
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        raise
    except OSError as error:
        sentence = disk_sentence(error)
        if sentence is None and error.errno in NO_PATH and error.filename is not None:
            print(f"error: {shown(str(error.filename))}: {error.strerror}", file=sys.stderr)
            return 2
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def leave_at_once(code: int) -> NoReturn:
    """End this process without waiting for its threads, one of which may be writing a checkpoint, and its workers."""
    import multiprocessing

    print("stopped at once by a second SIGINT: the last checkpoint stands", file=sys.stderr)
    for worker in multiprocessing.active_children():
        worker.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def quiet_libraries() -> None:
    """Keep a terminal for what concerns the user: our own log lines, and warnings of other libraries not at all."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for name in ("t6_lightning", "datamodules"):
        logging.getLogger(name).setLevel(logging.INFO)
    warnings.filterwarnings("ignore", module=r"(lightning|torch|jsonargparse|mlflow|optuna|torchmetrics)\b.*")


if __name__ == "__main__":
    sys.exit(main())
