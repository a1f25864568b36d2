"""python -m mlflow_server [start] [--backend URL] [--artifacts URL] [--host H] [--port P], and status."""

import os
import sys

from mlflow_server.process import is_healthy, record_file, serve
from mlflow_server.settings import (
    DEFAULT_HOST,
    DEFAULT_PORT,
    address_of,
    is_server,
    resolve,
)
from t6_lightning.common.arguments import Parser
from t6_lightning.common.errors import BadInput
from t6_lightning.common.home import t6_home
from t6_lightning.common.secrets import hide_password
from t6_lightning.common.state import DamagedState, read_state


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code (2 for bad input, said in one sentence on stderr)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # `start` may be left out, but not before --help, which lists the commands.
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["start", *arguments]
    try:
        given = _parser().parse_args(arguments)
        if given.command == "status":
            return status(given.host, given.port)
        return serve(resolve(given.backend, given.artifacts, given.host, given.port))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def status(host: str | None, port: int | None) -> int:
    """Say whether a server answers and on which backend; returns 0 when one does, 1 when none does.

    Without host and port it asks the server started from this T6_HOME, else the one that
    MLFLOW_TRACKING_URI names, else the default address.
    """
    record = _read_record()
    configured = os.environ.get("MLFLOW_TRACKING_URI", "")
    if host is not None or port is not None:
        address = address_of(host or DEFAULT_HOST, DEFAULT_PORT if port is None else port)
    elif record:
        address = record["address"]
    else:
        address = configured if is_server(configured) else address_of(DEFAULT_HOST, DEFAULT_PORT)
    shown = hide_password(address)
    if not is_healthy(address):
        print(f"No MLflow server answers at {shown}; `python -m mlflow_server` starts one.")
        return 1
    if record.get("address") == address:
        backend = record["backend"]
    else:
        backend = f"unknown (not started from T6_HOME {t6_home()})"
    print(f"An MLflow server answers at {shown}\n  runs       {backend}")
    return 0


def _read_record() -> dict[str, str]:
    try:
        return read_state(record_file(t6_home()), {"address": str, "backend": str})
    except (OSError, DamagedState):
        return {}


def _parser() -> Parser:
    parser = Parser(
        prog="python -m mlflow_server",
        description="Show the runs of T6_HOME in MLflow's own pages. Without a command: start.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{start,status}")
    start = commands.add_parser("start", help="serve until Ctrl-C")
    start.add_argument(
        "--backend",
        metavar="URL",
        help="tracking database, sqlite:///FILE or postgresql+psycopg://USER:PASSWORD@HOST/NAME "
        "(default: MLFLOW_TRACKING_URI, else T6_HOME/mlflow.db)",
    )
    start.add_argument(
        "--artifacts",
        metavar="URL",
        help="folder or object store for artifacts sent through the server (default: T6_HOME/mlartifacts)",
    )
    state = commands.add_parser("status", help="say whether a server answers, and on which backend")
    for command in (start, state):
        command.add_argument("--host", help=f"address to listen on (default: {DEFAULT_HOST})")
        command.add_argument(
            "--port", type=int, help=f"default: {DEFAULT_PORT}; start takes 0 for any free port"
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
