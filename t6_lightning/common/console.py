"""Where people read: a terminal as wide as it is, or a log of 120 columns."""

import os
import sys
from pathlib import Path

from rich.console import Console

console = Console()
if not console.is_terminal:
    console = Console(width=120)


def python() -> str:
    """How this Python is called from here: `python` where its environment is active, else by its path."""
    active = os.environ.get("VIRTUAL_ENV")
    if sys.prefix == sys.base_prefix or (active and Path(active).resolve() == Path(sys.prefix).resolve()):
        return "python"
    try:
        return str(Path(sys.executable).relative_to(Path.cwd()))
    except ValueError:
        return sys.executable
