"""Where runs are tracked: MLFLOW_TRACKING_URI, or a SQLite file in T6_HOME. Knows nothing of Lightning."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from typing import TYPE_CHECKING

from t6_lightning.common.databases import is_sqlite, sqlite_file, sqlite_url
from t6_lightning.common.errors import BadInput, first_line
from t6_lightning.common.home import t6_home
from t6_lightning.common.secrets import without_secrets

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


LONGEST_FOLDER = 120
"""Bytes of an artifact folder's name."""


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or a SQLite file in T6_HOME."""
    return os.environ.get("MLFLOW_TRACKING_URI") or sqlite_url(t6_home() / "mlflow.db")


def check() -> None:
    """Refuse a store that cannot be reached, without making one.

    Raises:
        BadInput: naming MLFLOW_TRACKING_URI.
    """
    uri = tracking_uri()
    if is_sqlite(uri) and not sqlite_file(uri).exists():
        return  # `plan.check_disk` says whether T6_HOME can be written to
    try:
        open_client().search_experiments(max_results=1)
    except Exception as error:
        raise unusable(error) from error


def unusable(error: Exception) -> BadInput:
    """What MLflow, SQLAlchemy or HTTP say of the store, which means the same to the user."""
    return BadInput(
        without_secrets(f"MLFLOW_TRACKING_URI={tracking_uri()!r} cannot be used: {first_line(error)[:200]}")
    )


def open_client() -> MlflowClient:
    """A client of the tracking store. MLflow takes seconds to import: only those who log pay for it."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # MLflow's own default keeps trying a dead server for four minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    uri = tracking_uri()
    if is_sqlite(uri):
        sqlite_file(uri).parent.mkdir(parents=True, exist_ok=True)
    from mlflow.tracking import MlflowClient

    # MLflow sets up its logging at import; the first start would announce every migration of a new database.
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def folder_name(experiment: str) -> str:
    """One name of a folder for each experiment's name, which may hold anything: other characters become :HEX."""
    name = re.sub(r"[^\w. -]|^\.", lambda found: f":{ord(found[0]):x}", experiment)
    if len(name.encode()) > LONGEST_FOLDER:
        digest = hashlib.sha256(experiment.encode()).hexdigest()[:16]
        name = f"{name.encode()[: LONGEST_FOLDER - 20].decode(errors='ignore')}:{digest}"
    return name


def experiment_id(client: MlflowClient, name: str) -> str:
    """The experiment of that name, made if need be; with a local store its artifacts go to T6_HOME/mlartifacts."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    local = is_sqlite(tracking_uri())
    location = (t6_home() / "mlartifacts" / folder_name(name)).as_uri() if local else None
    try:
        return client.create_experiment(name, artifact_location=location)
    except Exception:  # another process was first
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return found.experiment_id
