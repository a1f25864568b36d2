"""Files that a benchmark writes: refused before the work where they cannot be, and written whole or not at all."""

import os
from pathlib import Path


def target(file: str) -> Path:
    """What `file` leads to. A pipe or a terminal keeps its name: behind /dev/stdout lies one that no path leads to."""
    path = Path(file)
    return path if path.exists() and not path.is_file() else Path(os.path.realpath(path))


def is_regular(file: str) -> bool:
    """Whether `file` is a file, or nothing yet: what goes into a pipe or a terminal cannot be replaced later."""
    path = target(file)
    return path.is_file() or not path.exists()


def why_not_writable(file: str) -> str | None:
    """One sentence, or None where `file` can be written."""
    if not file:
        return "it names no file"
    try:
        path = target(file)
        if path.is_dir():
            return "it is a folder"
        if not path.parent.is_dir():
            return "there is no such folder"
        if path.exists() and not path.is_file():  # opening a pipe or a terminal could block
            return None
        is_new = not path.exists()
        path.open("a").close()
    except OSError as error:
        return f"it cannot be written ({error.strerror})"
    if is_new:
        path.unlink()
    return None


def write(file: str, content: str | bytes) -> None:
    """Write `content`; a file that was there stays until all of the new one is. Raises ValueError, in one sentence."""
    data = content.encode() if isinstance(content, str) else content
    try:
        path = target(file)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        if path.exists() and not (path.is_file() and os.access(path.parent, os.W_OK)):
            path.write_bytes(data)  # a pipe or a terminal, or nothing can lie beside it
            return
        try:
            beside.write_bytes(data)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{file} cannot be written: {error.strerror}") from error
