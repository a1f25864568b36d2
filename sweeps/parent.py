"""The MLflow run that a sweep's trials are nested under."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sweeps.definition import Sweep
from t6_lightning.common.errors import BadInput

if TYPE_CHECKING:
    import optuna
    from mlflow.tracking import MlflowClient

EXPERIMENT = "t6"


class ParentRun:
    """Made once for a sweep, its id kept in the study; opening it also makes MLflow's schema and experiment.

    Open it before any trial starts: several first starts at once would race for both.
    Raises BadInput when the tracking store cannot be reached.
    """

    def __init__(self, study: optuna.Study, sweep: Sweep) -> None:
        from mlflow.exceptions import MlflowException

        from t6_lightning.runs.tracking_store import experiment_id, open_client

        try:
            self._client: MlflowClient = open_client()
            experiment = experiment_id(self._client, EXPERIMENT)
            self.run_id: str = study.user_attrs.get("parent_run_id") or self._create(experiment, sweep)
            self._client.update_run(self.run_id, status="RUNNING")
        except MlflowException as error:
            reason = str(error).splitlines()[0]
            raise BadInput(f"MLFLOW_TRACKING_URI: the tracking store cannot be used ({reason}).") from None
        study.set_user_attr("parent_run_id", self.run_id)

    def _create(self, experiment: str, sweep: Sweep) -> str:
        description = f"Hypothesis: {sweep.hypothesis}\n\nStopping rule: {sweep.stopping_rule}"
        tags = {"sweep": sweep.name, "mlflow.note.content": description}
        return self._client.create_run(experiment, run_name=sweep.name, tags=tags).info.run_id

    def close(self, files: list[Path], status: str) -> None:
        """Log the report's files and end the run; a tracking store that is gone by now only costs a warning."""
        from mlflow.exceptions import MlflowException

        try:
            for file in files:
                self._client.log_artifact(self.run_id, str(file))
            self._client.set_terminated(self.run_id, status)
        except MlflowException as error:
            print(f"the report is not in MLflow: {str(error).splitlines()[0]}", file=sys.stderr)
