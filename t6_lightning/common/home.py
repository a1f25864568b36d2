"""T6_HOME: where runs, tokenizers and tokens are kept."""

import os
from pathlib import Path

from t6_lightning.common.errors import BadInput


def t6_home() -> Path:
    """Absolute path of the environment's T6_HOME, or of ./t6_runs. Creates nothing. Raises BadInput."""
    home = Path(os.environ.get("T6_HOME") or "t6_runs").expanduser().absolute()
    if home.is_file():
        raise BadInput(
            f"T6_HOME: {str(home)!r} is a file; allowed: a folder, which is made where it is missing."
        )
    return home
