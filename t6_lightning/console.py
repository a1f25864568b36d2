"""Where people read: a terminal as wide as it is, or a log of 120 columns."""

from rich.console import Console

console = Console()
if not console.is_terminal:
    console = Console(width=120)
