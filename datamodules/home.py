"""Where runs, tokenizers and tokens are kept."""

import os
from pathlib import Path


def t6_home() -> Path:
    """Absolute path of the environment's T6_HOME, or of ./t6_runs. The call creates nothing."""
    return Path(os.environ.get("T6_HOME") or "t6_runs").expanduser().absolute()


def write_atomically(path: Path, text: str) -> None:
    """Write `text` beside `path` and rename: a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
