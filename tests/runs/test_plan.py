"""What a run will cost, said before it starts."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from t6_lightning.common.errors import BadInput
from t6_lightning.runs.plan import check_disk


@pytest.mark.parametrize(
    ("needed", "free", "said"),
    [
        (3_500_000, 900, "checkpoints need 3.5 MB and {} has 900 bytes free"),
        (51_000_000_000, 12_345_678, "checkpoints need 51.0 GB and {} has 12.3 MB free"),
    ],
)
def test_too_small_a_disk_is_refused_in_fitting_units(
    needed: int, free: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("T6_HOME", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    with pytest.raises(BadInput) as raised:
        check_disk(needed)
    assert str(raised.value).startswith(said.format(tmp_path))
