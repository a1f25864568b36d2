"""Where runs are tracked: MLFLOW_TRACKING_URI, or a SQLite file in T6_HOME. Knows nothing of Lightning."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from t6_lightning.common.home import t6_home

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or a SQLite file in T6_HOME."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{t6_home() / 'mlflow.db'}"


def open_client() -> MlflowClient:
    """A client of the tracking store. MLflow takes seconds to import: only those who log pay for it."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # MLflow's own default keeps trying a dead server for four minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    uri = tracking_uri()
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    from mlflow.tracking import MlflowClient

    # MLflow sets up its logging at import; the first start would announce every migration of a new database.
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def experiment_id(client: MlflowClient, name: str) -> str:
    """The experiment of that name, made if need be; with a local store its artifacts go to T6_HOME/mlartifacts."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    local = tracking_uri().startswith("sqlite:")
    location = (t6_home() / "mlartifacts" / name).as_uri() if local else None
    try:
        return client.create_experiment(name, artifact_location=location)
    except Exception:  # another process was first
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return found.experiment_id
