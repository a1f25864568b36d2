"""Addresses of SQLite files, for SQLAlchemy and those who build on it."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote, unquote


def sqlite_url(file: Path) -> str:
    """The URL of an absolute path, whatever stands in it.

    SQLAlchemy unquotes the path of a URL and cuts it at `?`. MLflow makes the parent folders of `sqlite:///PATH`
    without unquoting: a path that must be quoted names the driver, which MLflow passes by.
    """
    path = str(file)
    if "%" in path or "?" in path:
        return f"sqlite+pysqlite:///{quote(path, safe='/ #')}"
    return f"sqlite:///{path}"


def is_sqlite(url: str) -> bool:
    """Whether a database URL is of SQLite, by whichever driver."""
    return url.partition(":")[0].partition("+")[0] == "sqlite"


def sqlite_file(url: str) -> Path:
    """The file of a SQLite URL; Path(".") of one that names none, as a database in memory."""
    return Path(unquote(url.partition(":///")[2].partition("?")[0]))
