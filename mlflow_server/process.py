"""Run MLflow's server as a process group: start it, wait until it answers, stop all of it."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from mlflow_server.settings import ServerSettings
from t6_lightning.common.secrets import hide_password, without_secrets
from t6_lightning.common.state import write_state

START_SECONDS = 180  # a first start on a slow disk takes half a minute; a hanging one must not last for ever
STOP_SECONDS = 10
LOG_LINES = 15


def is_healthy(address: str, seconds: float = 2.0) -> bool:
    """Whether an MLflow server answers at `address`, a URL like http://127.0.0.1:5000."""
    # A proxy configured for the web must not be asked for this machine's own address.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{address.rstrip('/')}/health", timeout=seconds) as answer:
            return answer.read(16).strip() == b"OK"
    except (OSError, ValueError):  # ValueError: something answers that does not speak HTTP
        return False


def serve(settings: ServerSettings) -> int:
    """Start the server, wait, print the address, stay until a signal or its death; returns the exit code.

    0 after SIGINT, SIGTERM or SIGHUP, 1 when the server died or never answered.
    """
    stop = threading.Event()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda *_: stop.set())
    log = settings.home / "mlflow_server.log"
    server = _start(settings, log)
    record = record_file(settings.home)
    try:
        if not _wait_until_healthy(server, settings.address, stop):
            if stop.is_set():
                return 0
            _explain_failure(server, settings, log)
            return 1
        write_state(record, {"address": settings.address, "backend": hide_password(settings.backend)})
        _announce(settings, log)
        while server.poll() is None and not stop.wait(0.2):
            pass
        if not stop.is_set():
            _explain_failure(server, settings, log)
            return 1
        print("Stopping MLflow ...", file=sys.stderr)
        return 0
    finally:
        _stop_group(server)
        record.unlink(missing_ok=True)


def record_file(home: Path) -> Path:
    """Where a running server leaves its address and backend for `status`."""
    return home / "mlflow_server.json"


def _start(settings: ServerSettings, log: Path) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        settings.host,
        "--port",
        str(settings.port),
    ]
    command += ["--workers", "1"]  # each worker is a whole Python process; one serves a small team
    environment = os.environ | {
        # Here and not on the command line, which every user of the machine can read in the process list.
        "MLFLOW_BACKEND_STORE_URI": settings.backend,
        "MLFLOW_ARTIFACTS_DESTINATION": settings.artifacts,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # The queue for GenAI evaluations doubles the time to start and is of no use to training runs.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Its own group: Ctrl-C reaches only this process, which then stops the group in order.
            start_new_session=True,
        )


def _wait_until_healthy(server: subprocess.Popen[bytes], address: str, stop: threading.Event) -> bool:
    begun = time.monotonic()
    live = sys.stderr.isatty()
    print(
        f"Starting MLflow at {address} (about 15 s) ...",
        file=sys.stderr,
        end="" if live else "\n",
        flush=True,
    )
    while not stop.wait(0.25) and server.poll() is None and time.monotonic() - begun < START_SECONDS:
        if is_healthy(address):
            print("\r\033[K" if live else "", file=sys.stderr, end="", flush=True)
            return True
        if live:
            waited = time.monotonic() - begun
            print(f"\rStarting MLflow at {address} ... {waited:3.0f} s ", file=sys.stderr, end="", flush=True)
    if live:
        print(file=sys.stderr)
    return False


def _announce(settings: ServerSettings, log: Path) -> None:
    print(f"MLflow is ready: {settings.address}")
    print(f"  runs       {hide_password(settings.backend)}")
    print(f"  artifacts  {hide_password(settings.artifacts)}")
    print(f"  log        {log}")
    print("Ctrl-C stops it.", flush=True)
    if settings.host not in ("127.0.0.1", "localhost", "::1"):
        print(
            f"Note: --host {settings.host} lets everyone who reaches this machine read and delete runs; "
            "there is no password.",
            file=sys.stderr,
        )


def _explain_failure(server: subprocess.Popen[bytes], settings: ServerSettings, log: Path) -> None:
    code = server.poll()
    what = (
        f"did not answer within {START_SECONDS} s" if code is None else f"ended by itself (exit code {code})"
    )
    text = without_secrets(log.read_text(errors="replace"), settings.backend, settings.artifacts)
    print(f"The MLflow server {what}; the last lines of {log}:", file=sys.stderr)
    print("\n".join(f"  {line}" for line in text.splitlines()[-LOG_LINES:]), file=sys.stderr)


def _stop_group(server: subprocess.Popen[bytes]) -> None:
    """End every process of the server's group: asked first, then killed after STOP_SECONDS."""
    for signum, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, STOP_SECONDS)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signum)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            server.poll()  # reaps the leader, whose zombie would keep the group alive
            try:
                os.killpg(server.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)
