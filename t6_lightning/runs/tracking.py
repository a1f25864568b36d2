"""Logging a run to MLflow: a SQLite file unless MLFLOW_TRACKING_URI says otherwise; no server needed."""

# No postponed annotations here: to resolve them for the command line, jsonargparse would run the
# TYPE_CHECKING block below and so import MLflow, seconds before anyone needs it.
import hashlib
import math
import os
import re
import time
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from t6_lightning.common.errors import require
from t6_lightning.runs.folder import RunFolder
from t6_lightning.runs.tracking_store import experiment_id, open_client, unusable

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


LONGEST_NAME = 250
LONGEST_EXPERIMENT = 500
"""Characters, of MLflow's."""


class MLflowTracking(Logger):
    """One MLflow run per training run, kept across restarts; each step of a metric is logged once.

    In any Trainer it makes a run of its own, or with `run` takes up the one that the folder's record names. The store
    is MLFLOW_TRACKING_URI, else a SQLite file in T6_HOME.

    Args:
        experiment: MLflow experiment.
        tags: extra tags of the run.
        parent: id of the MLflow run that this one is nested under.
        run: folder of the training run. Then the caller ends the MLflow run by `close`: Lightning's own end says too
            little (a signal counts as success).
    """

    def __init__(
        self,
        experiment: str = "t6",
        tags: dict[str, str] | None = None,
        parent: str | None = None,
        run: RunFolder | None = None,
    ) -> None:
        super().__init__()
        allowed = f"a name of 1 to {LONGEST_EXPERIMENT} characters"
        fits = len(experiment.strip()) > 0 and len(experiment) <= LONGEST_EXPERIMENT
        require(fits and "\0" not in experiment, "tracking.experiment", experiment, allowed)
        for tag in tags or {}:
            fits = bool(re.fullmatch(rf"[/\w.\- :]{{1,{LONGEST_NAME}}}", tag)) and tag == os.path.normpath(
                tag
            )
            require(fits, "tracking.tags", tag, "a tag's name is letters, digits and _ - . : / and blanks")
        self.experiment_name = experiment
        self.tags = dict(tags or {})
        if parent:
            self.tags["mlflow.parentRunId"] = parent
        self._run = run
        self._client: MlflowClient | None = None
        self._run_id: str | None = None
        self._last_step: dict[str, int] = {}

    @property
    def name(self) -> str:
        return self.experiment_name

    @property
    def version(self) -> str | None:
        return self._run_id

    @property
    def save_dir(self) -> str | None:
        """The run's folder: where Lightning puts what it writes itself, such as a profiler's table."""
        return None if self._run is None else str(self._run.path)

    @property
    @rank_zero_experiment
    def experiment(self) -> "MlflowClient":
        """The client of the store, with a run opened."""
        self.start({})
        assert self._client is not None
        return self._client

    @rank_zero_only
    def connect(self) -> None:
        """Reach the tracking store, before anything is spent.

        Raises:
            BadInput: it cannot be reached or used.
        """
        if self._client is not None:
            return
        try:
            self._client = open_client()
            self._experiment_id = experiment_id(self._client, self.experiment_name)
        except Exception as error:
            self._client = None
            raise unusable(error) from error

    @rank_zero_only
    def start(self, tags: dict[str, str]) -> None:
        """Open the MLflow run, unless it is open: the one that the folder had before, or a new one with these tags."""
        if self._run_id is not None:
            return
        self.connect()
        client = self._client
        assert client is not None
        self._run_id = None if self._run is None else self._run.record.get("mlflow_run_id")
        if self._run_id is None and self._run is not None and self._run.has_saved:
            self._run_id = self._find_again(client, self._run)
        if self._run_id is None:
            name = None if self._run is None else self._run.name
            run = client.create_run(self._experiment_id, run_name=name, tags=self.tags | tags)
            self._run_id = run.info.run_id
            if self._run is not None:
                self._run.update_record(mlflow_run_id=self._run_id)
            return
        client.update_run(self._run_id, status="RUNNING")
        for key in client.get_run(self._run_id).data.metrics:
            self._last_step[key] = max(m.step for m in client.get_metric_history(self._run_id, key))

    def _find_again(self, client: "MlflowClient", run: RunFolder) -> str | None:
        """The newest MLflow run of the folder's name: a run that has checkpoints lost its record."""
        named = f"attributes.run_name = '{run.name}'"
        newest = ["attributes.start_time DESC"]
        found = client.search_runs([self._experiment_id], named, max_results=1, order_by=newest)
        if not found:
            return None
        run.update_record(mlflow_run_id=found[0].info.run_id)
        return found[0].info.run_id

    @rank_zero_only
    def leave(self) -> None:
        """Let the folder's MLflow run stay as it is, ended: `start` then opens a new one."""
        assert self._run is not None
        run_id = self._run.record.get("mlflow_run_id")
        self.connect()
        client = self._client
        if run_id is not None and client is not None and client.get_run(run_id).info.status == "RUNNING":
            client.set_terminated(run_id, status="KILLED")  # its process could not say so
        self._run.update_record(mlflow_run_id=None, started=None)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Log every value under its dotted name; a changed one becomes a tag, as MLflow's parameters stay."""
        from mlflow.entities import Param, RunTag

        client, run_id = self.experiment, self._run_id
        assert run_id is not None
        known = client.get_run(run_id).data.params
        flat = {
            mlflow_name(name): str(value)[:6000]
            for name, value in _flatten(dict(vars(params) if isinstance(params, Namespace) else params))
        }
        new = [Param(name, value) for name, value in flat.items() if name not in known]
        changed = {name: value for name, value in flat.items() if known.get(name, value) != value}
        tags = [RunTag(f"changed_on_resume.{name}", value[:5000]) for name, value in changed.items()]
        for start in range(0, max(len(new), 1), 100):  # MLflow takes 100 parameters a call
            client.log_batch(run_id, params=new[start : start + 100], tags=tags if start == 0 else [])

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log metrics at an optimizer step; steps it has from before a restart are passed over."""
        from mlflow.entities import Metric

        client = self.experiment  # which knows the steps from before a restart
        step = step or 0
        now = int(time.time() * 1000)
        metrics = {mlflow_name(name): value for name, value in metrics.items()}
        new = {name: value for name, value in metrics.items() if step > self._last_step.get(name, -1)}
        batch = [Metric(name, float(value), now, step) for name, value in new.items() if math.isfinite(value)]
        if batch:
            client.log_batch(self._run_id or "", metrics=batch)
        self._last_step.update(dict.fromkeys(new, step))

    @rank_zero_only
    def set_tags(self, tags: dict[str, str]) -> None:
        for name, value in tags.items():
            self.experiment.set_tag(self._run_id or "", name, value)

    @rank_zero_only
    def log_artifact(self, file: Path) -> None:
        """Copy a file to the run's artifacts."""
        self.experiment.log_artifact(self._run_id or "", str(file))

    def history(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of a metric over the whole run, restarts included."""
        found = self.experiment.get_metric_history(self._run_id or "", mlflow_name(name))
        return sorted((m.step, m.value) for m in found)

    @rank_zero_only
    def close(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        if self._client is not None and self._run_id is not None:
            self._client.set_terminated(self._run_id, status=status)

    def finalize(self, status: str) -> None:
        """End a run without a folder; Lightning calls it at the end of training with "success" or "failed"."""
        if self._run is None:
            self.close("FINISHED" if status == "success" else "FAILED")


def mlflow_name(name: str) -> str:
    """The name as MLflow takes it, which allows few characters and makes paths of names: `C++` becomes `C:2b:2b`.

    Others stand as their hexadecimal code, so that different names stay different; a very long one is cut and ends in
    its own checksum.
    """
    parts = [re.sub(r"[^\w .:-]", lambda found: f":{ord(found[0]):x}", part) for part in name.split("/")]
    said = "/".join(part.replace(".", ":2e") or ":" if part.strip(".") == "" else part for part in parts)
    if len(said) > LONGEST_NAME:
        said = f"{said[: LONGEST_NAME - 20]}...{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return said


def _flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat = []
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat += _flatten(value, f"{prefix}{name}.")
        else:
            flat.append((f"{prefix}{name}", value))
    return flat
