"""A run as a person sees it: MLflow's page in a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import fit

from t6_lightning.runs.folder import RunFolder
from t6_lightning.runs.tracking_store import open_client

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: MLflow's page is not looked at")
def test_the_page_of_a_run_shows_its_name_metrics_and_tags(home: Path, tmp_path: Path) -> None:
    done = fit("on-the-page", "--trainer.max_steps", "2")
    assert done.returncode == 0, done.stderr
    run = open_client().get_run(RunFolder("on-the-page").record["mlflow_run_id"]).info
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow_server", "--port", "0"], stdout=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        assert server.stdout is not None
        lines = iter(server.stdout.readline, "")
        ready = next(line for line in lines if "is ready" in line)
        address = re.search(r"http://127\.0\.0\.1:\d+", ready)
        assert address is not None
        page = subprocess.run(
            [
                *(str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
                *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
                *(f"--user-data-dir={tmp_path}", "--virtual-time-budget=25000", "--dump-dom"),
                f"{address[0]}/#/experiments/{run.experiment_id}/runs/{run.run_id}",
            ],
            capture_output=True,
            text=True,
            timeout=200,
        ).stdout
    finally:
        server.terminate()
        assert server.wait(timeout=30) == 0
    for text in ("on-the-page", "Finished", "val/bits_per_byte", "kv_cache/ratio_to_mha", "PythonDocs"):
        assert text in page, text
