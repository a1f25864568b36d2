"""Where runs, tokenizers and tokens are kept."""

import os
from pathlib import Path

from datamodules.errors import BadData


def t6_home() -> Path:
    """Absolute path of the environment's T6_HOME, or of ./t6_runs. The call creates nothing. Raises BadData."""
    home = Path(os.environ.get("T6_HOME") or "t6_runs").expanduser().absolute()
    if home.is_file():
        raise BadData(
            f"T6_HOME: {str(home)!r} is a file; allowed: a folder, which is made where it is missing."
        )
    return home


def write_atomically(path: Path, text: str) -> None:
    """Write `text` beside `path` and rename: a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
