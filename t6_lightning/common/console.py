"""Where people read: a terminal as wide as it is, or a log of 120 columns."""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

from rich.console import Console

PIPE_CLOSED = 128 + signal.SIGPIPE
"""Exit code where nobody reads what is printed any more, as in `... | head`."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Let the command line end by it as it does where others print; rich would exit with code 1."""
        raise BrokenPipeError


console = _Console()
if not console.is_terminal:
    console = _Console(width=120)


def leave_closed_pipe() -> int:
    """After a BrokenPipeError: the exit code. Python flushes standard output at its end, and would say so again."""
    with suppress(OSError, ValueError):  # standard output is no file, in a test
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return PIPE_CLOSED


def python() -> str:
    """How this Python is called from here: `python` where its environment is active, else by its path."""
    active = os.environ.get("VIRTUAL_ENV")
    if sys.prefix == sys.base_prefix or (active and Path(active).resolve() == Path(sys.prefix).resolve()):
        return "python"
    try:
        return str(Path(sys.executable).relative_to(Path.cwd()))
    except ValueError:
        return sys.executable
