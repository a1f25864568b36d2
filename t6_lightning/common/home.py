"""T6_HOME: where runs, tokenizers and tokens are kept."""

import os
import stat
from pathlib import Path

from t6_lightning.common.errors import BadInput, shown


def t6_home() -> Path:
    """Absolute path of the environment's T6_HOME, or of ./t6_runs. Creates nothing. Raises BadInput."""
    given = os.environ.get("T6_HOME") or "t6_runs"
    try:
        home = Path(given).expanduser().absolute()
        str(home).encode()  # databases and URLs take no other paths
    except RuntimeError as error:
        raise BadInput(f"T6_HOME: {shown(given)} cannot be used: that user has no home folder.") from error
    except UnicodeError as error:
        raise BadInput(f"T6_HOME: {shown(given)} cannot be used: it is not valid UTF-8.") from error
    try:
        is_folder = stat.S_ISDIR(home.stat().st_mode)
    except FileNotFoundError as error:
        if os.path.islink(home):
            raise BadInput(f"T6_HOME: {shown(given)} is a link to a folder that is missing.") from error
        return home
    except OSError as error:
        raise BadInput(f"T6_HOME: {shown(given)} cannot be used: {error.strerror}.") from error
    if not is_folder:
        raise BadInput(f"T6_HOME: {shown(str(home))} is a file; allowed: a folder, which is made if missing.")
    return home
