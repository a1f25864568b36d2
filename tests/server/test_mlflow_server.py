"""The tracking server: a real one, in a new process, on the SQLite file that training writes to."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlflow_server.settings import address_of, check_backend, free_port
from t6_lightning.common.errors import BadInput


def environment(home: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    return kept | {"T6_HOME": str(home), "MLFLOW_DISABLE_TELEMETRY": "true"} | more


def command(home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlflow_server", *arguments],
        env=environment(home, **more),
        capture_output=True,
        text=True,
        timeout=120,
    )


def processes_of_session(session: int) -> list[int]:
    """Process ids whose session is `session`; the server leads its own."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def home_with_a_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A T6_HOME with one run logged straight to SQLite, as training does; returns it and the run id."""
    from mlflow import MlflowClient

    home = tmp_path_factory.mktemp("t6")
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    experiment = client.create_experiment("t6", artifact_location=(home / "mlartifacts" / "t6").as_uri())
    run = client.create_run(experiment).info.run_id
    client.log_metric(run, "val/bits_per_byte", 2.25, step=7)
    client.log_text(run, "Simple is better than complex.", "sample.txt")
    client.set_terminated(run)
    return home, run


@pytest.fixture(scope="module")
def server(home_with_a_run: tuple[Path, str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server on a free port over that T6_HOME: its process and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow_server", "--port", "0"],
        env=environment(home_with_a_run[0]),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    first_line = process.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:\d+$", first_line.strip())
    try:
        assert found, f"{first_line!r} holds no address: {process.communicate(timeout=30)}"
        yield process, found[0]
    finally:
        process.terminate()
        process.wait(30)


def test_shows_the_runs_that_training_logged_to_sqlite(server, home_with_a_run):
    from mlflow import MlflowClient

    _, address = server
    _, run_id = home_with_a_run
    client = MlflowClient(address)
    experiment = client.get_experiment_by_name("t6")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == run_id
    assert run.data.metrics["val/bits_per_byte"] == 2.25
    assert [point.step for point in client.get_metric_history(run_id, "val/bits_per_byte")] == [7]


def test_serves_the_artifacts_that_training_wrote_to_the_disk(server, home_with_a_run):
    url = f"{server[1]}/get-artifact?path=sample.txt&run_uuid={home_with_a_run[1]}"
    with urllib.request.urlopen(url, timeout=30) as answer:
        assert answer.read() == b"Simple is better than complex."


def test_status_names_address_and_backend(server, home_with_a_run):
    home, _ = home_with_a_run
    shown = command(home, "status")
    assert shown.returncode == 0
    assert server[1] in shown.stdout
    assert f"sqlite:///{home}/mlflow.db" in shown.stdout


def test_second_server_on_the_same_port_is_refused(server, home_with_a_run):
    port = server[1].rpartition(":")[2]
    refused = command(home_with_a_run[0], "start", "--port", port)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert f"--port {port}" in refused.stderr
    assert "in use" in refused.stderr


def test_sigterm_ends_the_whole_process_group(server, home_with_a_run):
    """Runs last: it stops the server of this file."""
    process, address = server
    (mlflow,) = children(process.pid)
    assert len(processes_of_session(mlflow)) >= 2, "MLflow runs uvicorn as a process of its own"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert processes_of_session(mlflow) == []
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=5)
    stopped = command(home_with_a_run[0], "status", "--port", address.rpartition(":")[2])
    assert stopped.returncode == 1
    assert "No MLflow server answers" in stopped.stdout


def test_ctrl_c_while_starting_leaves_nothing_behind(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow_server", "--port", "0"],
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not children(process.pid):
        time.sleep(0.05)
    (mlflow,) = children(process.pid)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert output == ""
    assert "Traceback" not in errors
    assert processes_of_session(mlflow) == []


def test_server_that_dies_early_shows_its_log_without_the_password(tmp_path):
    died = command(tmp_path, "--port", "0", "--backend", "postgresql+nodriver://ada:s3cret@127.0.0.1:1/none")
    assert died.returncode == 1
    assert "the last lines of" in died.stderr
    assert "Can't load plugin: sqlalchemy.dialects:postgresql.nodriver" in died.stderr
    assert "s3cret" not in died.stdout + died.stderr


def test_configured_server_is_named_instead_of_starting_another(tmp_path):
    refused = command(tmp_path, MLFLOW_TRACKING_URI="https://ada:s3cret@mlflow.example.org")
    assert refused.returncode == 2
    assert "MLFLOW_TRACKING_URI is https://***@mlflow.example.org" in refused.stderr
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("backend", "says"),
    [
        ("runs.db", "is not a database URL"),
        ("redis://ada:s3cret@host/0", "is not a database URL"),
        ("sqlite:///", "names no file"),
        ("sqlite:////nowhere/at/all/mlflow.db", "does not exist"),
        (f"sqlite:///{__file__}", "is not an SQLite database"),
    ],
)
def test_bad_backend_is_one_sentence(backend, says):
    with pytest.raises(BadInput, match=says) as refused:
        check_backend("--backend", backend)
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize(
    ("host", "port"), [("127.0.0.1", 70000), ("127.0.0.1", -1), ("no.such.host.invalid", 0)]
)
def test_impossible_address_is_one_sentence(host, port):
    with pytest.raises(BadInput, match=r"--port|--host"):
        free_port(host, port)


def test_address_can_be_opened_from_this_machine():
    assert address_of("0.0.0.0", 80) == "http://127.0.0.1:80"
    assert address_of("::", 80) == "http://[::1]:80"
