"""A T6_HOME or an experiment of any name: databases and artifacts land inside T6_HOME, and nothing beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from t6_lightning.common.databases import is_sqlite, sqlite_file, sqlite_url
from t6_lightning.common.errors import BadInput
from t6_lightning.runs.folder import RunFolder
from t6_lightning.runs.tracking import MLflowTracking
from t6_lightning.runs.tracking_store import folder_name, tracking_uri

HOMES = ["ho me#1?x%20", "per%cent", "que?ry=1&x", "ü b"]


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """MLflow's tables, which take seconds to make."""
    from t6_lightning.runs.tracking_store import open_client

    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("plain")
        patch.setenv("T6_HOME", str(home))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        open_client().search_experiments()
        return (home / "mlflow.db").read_bytes()


def tracked(home: Path, experiment: str, empty_database: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Track a run with an artifact, as `fit` does."""
    home.mkdir()
    (home / "mlflow.db").write_bytes(empty_database)
    monkeypatch.setenv("T6_HOME", str(home))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = RunFolder("one")
    run.create("seed_everything: 0\n")
    tracking = MLflowTracking(experiment, run=run)
    tracking.start({})
    tracking.log_metrics({"x": 1.0}, step=1)
    tracking.log_artifact(run.config_file)
    tracking.close("FINISHED")
    assert tracking.history("x") == [(1, 1.0)]
    artifacts = tracking.experiment.list_artifacts(tracking.version or "")
    assert [file.path for file in artifacts] == ["config.yaml"]


@pytest.mark.parametrize("name", HOMES)
def test_a_home_of_any_name_holds_database_and_artifacts(
    name: str, tmp_path: Path, empty_database: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracked(tmp_path / name, "t6", empty_database, monkeypatch)
    assert [folder.name for folder in tmp_path.iterdir()] == [name]
    assert sqlite_file(tracking_uri()) == tmp_path / name / "mlflow.db"
    assert list((tmp_path / name / "mlartifacts" / "t6").rglob("config.yaml"))


def test_an_experiment_named_as_a_path_stays_inside(
    tmp_path: Path, empty_database: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracked(tmp_path / "home", "../../esc", empty_database, monkeypatch)
    assert [folder.name for folder in tmp_path.iterdir()] == ["home"]
    assert [folder.name for folder in (tmp_path / "home" / "mlartifacts").iterdir()] == [":2e.:2f..:2fesc"]


def test_folder_names_are_one_name_each() -> None:
    names = [
        "t6",
        "rank sweep",
        "..",
        ".",
        "a/b",
        "a:2fb",
        "/etc",
        "x" * 400,
        "x" * 401,
        "ü" * 300,
        "\n",
        "~",
    ]
    folders = [folder_name(name) for name in names]
    assert folders[:2] == names[:2]
    assert len(set(folders)) == len(names)
    for folder in folders:
        assert Path(folder).name == folder
        assert folder not in (".", "..")
        assert len(folder.encode()) <= 120


@pytest.mark.parametrize("experiment", ["", " ", "x" * 501, "a\0b"])
def test_an_experiment_that_mlflow_does_not_take(experiment: str) -> None:
    with pytest.raises(BadInput, match=r"^tracking\.experiment=.* is not possible: a name of 1 to 500"):
        MLflowTracking(experiment)


def test_a_tag_that_mlflow_does_not_take() -> None:
    with pytest.raises(BadInput, match=r"^tracking\.tags='a\?b' is not possible: a tag's name is letters"):
        MLflowTracking(tags={"a?b": "1"})


@pytest.mark.parametrize("path", ["/a/b.db", "/a b/#c.db", "/a?b/%20.db", "/100%/x.db"])
def test_sqlite_urls_lead_back_to_their_file(path: str) -> None:
    import sqlalchemy

    url = sqlite_url(Path(path))
    assert is_sqlite(url)
    assert sqlite_file(url) == Path(path)
    assert sqlalchemy.engine.make_url(url).database == path
