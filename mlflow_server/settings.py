"""Where the tracking server keeps its data and where it listens, from flags and environment."""

import errno
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from t6_lightning.common.databases import sqlite_file, sqlite_url
from t6_lightning.common.errors import BadInput
from t6_lightning.common.home import t6_home
from t6_lightning.common.secrets import hide_password

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 5000
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


@dataclass(frozen=True)
class ServerSettings:
    """One tracking server.

    backend: SQLAlchemy URL of the tracking database; may hold a password, print `hide_password(backend)`.
    artifacts: folder or URL under which the server stores what clients upload through it.
    home: T6_HOME, absolute; the server's log and its record for `status` lie there.
    """

    backend: str
    artifacts: str
    host: str
    port: int
    home: Path

    @property
    def address(self) -> str:
        return address_of(self.host, self.port)


def address_of(host: str, port: int) -> str:
    """The URL under which a browser on this machine reaches a server bound to host and port."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def resolve(backend: str | None, artifacts: str | None, host: str | None, port: int | None) -> ServerSettings:
    """Fill in what was not given from the environment and check all of it; creates T6_HOME.

    Raises BadInput for a URL that is no database, a file that is no SQLite database, an address that
    cannot be bound, or a MLFLOW_TRACKING_URI that already points to a server.
    """
    home = t6_home()
    configured = os.environ.get("MLFLOW_TRACKING_URI", "")
    if backend is None and is_server(configured):
        raise BadInput(
            f"MLFLOW_TRACKING_URI is {hide_password(configured)}: a tracking server is already configured; "
            "open that address, or unset the variable or give --backend to start another one here."
        )
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"T6_HOME {home} cannot be created ({error.strerror}).") from None
    source = "--backend" if backend else "MLFLOW_TRACKING_URI"
    backend = backend or configured or sqlite_url(home / "mlflow.db")
    check_backend(source, backend)
    host = DEFAULT_HOST if host is None else host
    port = free_port(host, DEFAULT_PORT if port is None else port)
    return ServerSettings(backend, artifacts or str(home / "mlartifacts"), host, port, home)


def is_server(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def check_backend(source: str, backend: str) -> None:
    """Raise BadInput, naming `source`, unless `backend` can be the URL of a tracking database."""
    scheme = backend.partition("://")[0].partition("+")[0] if "://" in backend else ""
    if scheme not in DATABASES:
        raise BadInput(
            f"{source} {hide_password(backend)!r} is not a database URL; allowed are sqlite:///FILE and "
            "postgresql+psycopg://USER:PASSWORD@HOST/NAME (or mysql, mssql)."
        )
    if scheme != "sqlite":
        return
    file = sqlite_file(backend)
    if not file.name or file.is_dir():
        raise BadInput(f"{source} {backend!r} names no file; write sqlite:///FILE.")
    if not file.parent.is_dir():
        raise BadInput(f"{source} {backend!r}: the folder {file.parent.absolute()} does not exist.")
    header = b""
    if file.is_file():
        with file.open("rb") as opened:
            header = opened.read(16)
    # An empty file is what SQLite itself leaves before the first table is written.
    if header not in (b"", b"SQLite format 3\0"):
        raise BadInput(f"{source} {backend!r}: {file.absolute()} is not an SQLite database.")


def free_port(host: str, port: int) -> int:
    """The port itself when it can be bound on host, a free one when it is 0; BadInput otherwise."""
    if not 0 <= port <= 65535:
        raise BadInput(f"--port {port} is not a port; allowed are 1 to 65535, or 0 for a free one.")
    try:
        family, _, _, _, sockaddr = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise BadInput(f"--host {host!r} is not an address of this machine ({error.strerror}).") from None
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(sockaddr)
        except PermissionError:
            raise BadInput(f"--port {port} needs administrator rights; take one above 1023.") from None
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise BadInput(f"--host {host!r} is not an address of this machine.") from None
            raise BadInput(
                f"--port {port} on {host} is in use by another program ({error.strerror}); see what answers "
                f"with `python -m mlflow_server status --port {port}`, choose another port, or let --port 0 "
                "find a free one."
            ) from None
        return probe.getsockname()[1]
