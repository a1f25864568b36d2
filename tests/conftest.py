"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from commands import fit

if TYPE_CHECKING:  # it imports torch, which reads what is set here
    from small_runs import Small

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# Two pytest workers on two cores: threads of their own would only fight each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Read when triton is imported, which torch does by the way: kernels run in its interpreter where there is no GPU.
if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One T6_HOME for all runs of this pytest worker, so that it tokenizes the corpus once."""
    return tmp_path_factory.mktemp("t6_home")


@pytest.fixture
def home(shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """T6_HOME for the test and its subprocesses."""
    monkeypatch.setenv("T6_HOME", str(shared_home))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return shared_home


@pytest.fixture(scope="session")
def trained(shared_home: Path) -> Path:
    """The checkpoint of a finished tiny run, named "trained"; for reading only."""
    from t6_lightning.runs.folder import RunFolder

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("T6_HOME", str(shared_home))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        done = fit("trained")
        assert done.returncode == 0, done.stderr
        checkpoint = RunFolder("trained").last_checkpoint()
    assert checkpoint is not None
    return checkpoint


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A finished run of `small_runs` in a T6_HOME of its own; for reading only."""
    import small_runs
    from fuzzing import call

    from t6_lightning.runs.folder import RunFolder

    folder = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("T6_HOME", str(folder / "home"))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        text = small_runs.write_text(folder / "text.txt")
        done = call("fit", *small_runs.arguments(text), "--run", "good", seconds=200)
        assert done.code == 0, done
        checkpoint = RunFolder("good").last_checkpoint()
        assert checkpoint is not None
    return small_runs.Small(folder / "home", text, checkpoint)


# Files are dealt to workers whole, in this order: what takes minutes starts first, and none is left for the end.
LONG = (
    "test_readme",
    "test_attention_contract",
    "test_docs_variant",
    "test_distributed",
    "test_stream_runs",
    "test_spikes",
    "test_resume",
    "test_docs_extensions",
    "test_docs_python",
    "test_data_loaders",
    "test_as_a_library",
    "test_cli_runs",
    "test_cli_settings",
    "test_cli_failures",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; the order inside a file stays."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))
