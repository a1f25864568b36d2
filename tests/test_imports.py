"""Who imports whom, what importing costs, and that everything is in the installed package."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

import t6_lightning

ROOT = Path(__file__).parent.parent
PACKAGES = ("t6_lightning", "kernels", "datamodules", "sweeps", "mlflow_server")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LAYERS = PYPROJECT["tool"]["importlinter"]["contracts"][0]


@cache
def import_graph() -> Any:
    """Every import of the project: inside functions and under TYPE_CHECKING too."""
    import grimp

    return grimp.build_graph(*PACKAGES, include_external_packages=True, cache_dir=None)


def ours(module: str) -> bool:
    return module.split(".")[0] in PACKAGES


def python(code: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_modules_do_not_import_each_other_in_a_cycle() -> None:
    graph = import_graph()
    imports = {
        module: set(filter(ours, graph.find_modules_directly_imported_by(module)))
        for module in filter(ours, graph.modules)
    }
    TopologicalSorter(imports).prepare()  # raises CycleError, which shows the cycle


def test_common_imports_the_standard_library_and_rich_alone() -> None:
    graph = import_graph()
    imported = {
        other.split(".")[0]
        for module in {"t6_lightning.common", *graph.find_descendants("t6_lightning.common")}
        for other in graph.find_modules_directly_imported_by(module)
        if not other.startswith("t6_lightning.common")
    }
    assert imported - set(sys.stdlib_module_names) == {"rich"}


def test_the_layers_name_every_package() -> None:
    named = {name.strip() for line in LAYERS["layers"] for name in line.split("|")}
    graph = import_graph()
    for module in [*PACKAGES[1:], *graph.find_children("t6_lightning")]:
        parts = graph.find_children(module)
        assert module in named or (parts and parts <= named), f"pyproject.toml gives {module} no layer"


@pytest.mark.parametrize("folder", ["t6_lightning/model", "kernels"])
def test_models_and_kernels_know_nothing_of_ranks(folder: str) -> None:
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            written = (
                ast.unparse(node) if isinstance(node, ast.Attribute | ast.Import | ast.ImportFrom) else ""
            )
            spread = ("torch.distributed", "from torch import distributed")
            assert not written.removeprefix("import ").removeprefix("from ").startswith(spread), file


def test_importing_the_package_is_light() -> None:
    heavy = ("torch", "lightning", "mlflow", "optuna", "datasets", "transformers", "numpy", "rich")
    assert python(f"import sys, t6_lightning; print([m for m in {heavy} if m in sys.modules])") == "[]\n"


def test_the_model_alone_imports_no_lightning() -> None:
    heavy = ("lightning", "mlflow", "optuna", "datasets", "transformers", "jsonargparse")
    code = "import sys; from t6_lightning import T6, T6Config, generate"
    assert python(f"{code}; print([m for m in {heavy} if m in sys.modules])") == "[]\n"


def test_kernels_and_the_model_work_without_the_other_dependencies() -> None:
    missing = (
        *("lightning", "torchmetrics", "mlflow", "optuna", "jsonargparse", "yaml", "datasets", "pyarrow"),
        *(
            "zstandard",
            "transformers",
            "tokenizers",
            "tiktoken",
            "huggingface_hub",
            "safetensors",
            "scipy",
            "matplotlib",
        ),
    )
    python(
        f"""
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys({missing}))
import kernels, t6_lightning.model
for package in (kernels, t6_lightning.model):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if package is t6_lightning.model or (module.ispkg and module.name != "kernels.bench"):
            importlib.import_module(module.name)
import torch
from t6_lightning import MHAConfig, MFAConfig, MLAConfig, T6, T6Config, TPAConfig, generate
for attention in (TPAConfig(n_heads=2, head_dim=16), MHAConfig(n_heads=2, head_dim=16)):
    model = T6(T6Config(vocab_size=17, d_model=32, n_layers=1, context=16, attention=attention))
    tokens = torch.arange(8)[None]
    model(tokens).sum().backward()
    generate(model, tokens, 2)
"""
    )


@pytest.mark.parametrize(("old", "new"), t6_lightning._MOVED.items())
def test_a_module_that_moved_is_imported_under_its_old_name_too(old: str, new: str) -> None:
    moved = importlib.import_module(f"t6_lightning.{old}")
    assert moved is importlib.import_module(f"t6_lightning.{new}")
    assert moved.__name__ == moved.__spec__.name == f"t6_lightning.{new}"  # type: ignore[union-attr]


def test_old_names_come_first() -> None:
    """In a new process, where no new name has been imported before."""
    code = "\n".join(
        f"import t6_lightning.{old} as m; assert m.__name__ == 't6_lightning.{new}', m"
        for old, new in t6_lightning._MOVED.items()
    )
    python(code)


def test_the_package_holds_every_folder_of_python_files() -> None:
    setuptools = pytest.importorskip("setuptools")
    assert PYPROJECT["project"]["version"] == t6_lightning.__version__
    settings = PYPROJECT["tool"]["setuptools"]
    found = setuptools.find_packages(str(ROOT), include=settings["packages"]["find"]["include"])
    folders = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for name in PACKAGES
        for file in (ROOT / name).rglob("*.py")
    }
    assert set(found) == folders
    listed = {
        file
        for pattern in settings["package-data"]["t6_lightning"]
        for file in (ROOT / "t6_lightning").glob(pattern)
    }
    data = {
        file
        for file in (ROOT / "t6_lightning").rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc")
    }
    assert data == listed
