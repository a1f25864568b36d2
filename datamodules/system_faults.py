"""What the operating system says, told from what is wrong with the data."""

import contextlib
import errno
from collections.abc import Iterator

from t6_lightning.common.errors import BadInput, first_line

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def system_fault(error: BaseException, what: str) -> BadInput | None:
    """One sentence on a limit, permission, missing package or missing memory that was met at `what`; None of errors
    that a decoder raises."""
    if isinstance(error, ImportError):
        return BadInput(
            f"{what} cannot be read: the package {error.name or first_line(error)} is missing; install it with pip."
        )
    if isinstance(error, MemoryError):
        return BadInput(f"{what} cannot be read: memory ran out.")
    # pyarrow raises OSErrors of its own; those of the system have a number.
    if not isinstance(error, OSError) or error.errno is None:
        return None
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return BadInput(f"{what} cannot be opened: {_descriptors()}.")
    return BadInput(f"{what} cannot be read: {error.strerror or first_line(error)}.")


@contextlib.contextmanager
def named(what: str) -> Iterator[None]:
    """Raise BadInput in place of what the operating system says while `what` is read."""
    try:
        yield
    except (OSError, MemoryError, ImportError) as error:
        if (fault := system_fault(error, what)) is None:
            raise
        raise fault from error


@contextlib.contextmanager
def written(path: object) -> Iterator[None]:
    """Raise BadInput in place of what the operating system says while a file below T6_HOME is written.

    Its sentence stands alone: an OSError of a full disk names no file, and one of a loader's worker process comes
    without its number.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        reason = error.strerror or first_line(error)
        if error.errno in (errno.EMFILE, errno.ENFILE):
            reason = _descriptors()
        elif error.errno in NO_ROOM:
            reason += "; make room there or set T6_HOME to a folder on another disk"
        raise BadInput(f"{path} cannot be written: {reason}.") from error


def _descriptors() -> str:
    import resource

    return (
        f"this process has as many files open as it may ({resource.getrlimit(resource.RLIMIT_NOFILE)[0]:,}); "
        "raise that limit (ulimit -n)"
    )
