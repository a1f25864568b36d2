"""Names that MLflow would refuse: domains and sources are called what their data calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from commands import fit
from mlflow.utils.validation import _validate_metric_name

from t6_lightning.runs.folder import RunFolder
from t6_lightning.runs.tracking import mlflow_name
from t6_lightning.runs.tracking_store import open_client

NAMES = {
    "val/web/bits_per_byte": "val/web/bits_per_byte",
    "val/C++/bits_per_byte": "val/C:2b:2b/bits_per_byte",
    "val/q&a/bits_per_byte": "val/q:26a/bits_per_byte",
    "val/Straße 1.2/bits": "val/Straße 1.2/bits",
    "val/../../x/bits": "val/:2e:2e/:2e:2e/x/bits",
    "val//x": "val/:/x",
}


@pytest.mark.parametrize(("name", "expected"), NAMES.items())
def test_names_become_ones_that_mlflow_takes(name: str, expected: str) -> None:
    assert mlflow_name(name) == expected
    _validate_metric_name(expected)


def test_long_names_stay_different() -> None:
    first, second = (mlflow_name(f"val/{'x' * 300}{end}/bits") for end in "ab")
    assert first != second
    assert len(first) <= 250
    _validate_metric_name(first)


def test_a_run_over_domains_and_sources_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T6_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    labels = ["C++", "q&a", "../x"]
    rows = [{"text": f"Document {i} of {i % 3}. " * 20, "kind": labels[i % 3]} for i in range(90)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"files": str(tmp_path / "rows.jsonl"), "domain_field": "kind", "val_fraction": 0.3}
    data = {
        "class_path": "Mixture",
        "init_args": {
            "sources": {"C#": {"class_path": "TextFiles", "init_args": source}},
            "weights": {"C#": 1.0},
        },
    }
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"extends": "quickstart", "data": data}))
    done = fit("odd", "--config", tmp_path / "data.yaml", "--trainer.max_steps", "2")
    assert done.returncode == 0, done.stderr
    tracked = open_client().get_run(RunFolder("odd").record["mlflow_run_id"]).data
    for label in ("C:2b:2b", "q:26a", ":2e:2e/x"):
        assert tracked.metrics[f"val/C:23/{label}/bits_per_byte"] > 0
    summary = json.loads(RunFolder("odd").summary_file.read_text())
    assert {"val/C#/C++/bits_per_byte", "val/C#/q&a/bits_per_byte"} <= summary.keys()
    assert any(name.startswith("data.init_args.sources.C:23.") for name in tracked.params)
