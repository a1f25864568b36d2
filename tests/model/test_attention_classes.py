"""Attention classes by name: families found at any depth, import paths in checkpoints, modules of the user's own."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from commands import in_new_process

from t6_lightning.common.classes import derived_classes, import_class, import_path
from t6_lightning.common.errors import BadInput
from t6_lightning.model.attention import AttentionConfig, attention_config, attention_configs
from t6_lightning.model.attention.mha import MHAConfig
from t6_lightning.model.attention.tpa import TPAConfig
from t6_lightning.model.config import T6Config

FAMILIES = {"MFAConfig", "MHAConfig", "MLAConfig", "TPAConfig"}

DERIVED = """
from dataclasses import dataclass
from t6_lightning.model.attention.mha import MHAConfig
from t6_lightning.model.attention.tpa import TPAConfig

@dataclass(frozen=True)
class {name}(TPAConfig):
    strength: float = 1.0

@dataclass(frozen=True)
class Further{name}({name}):
    pass

class Group:
    @dataclass(frozen=True)
    class Inner{name}(MHAConfig):
        pass

NUMBER = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on sys.path."""
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return tmp_path


def test_families_derived_from_any_family_are_found(folder: Path) -> None:
    (folder / "ideas.py").write_text(DERIVED.format(name="IdeaConfig"))
    code = """
import ideas
from t6_lightning.model.attention import attention_config, attention_configs
print(*sorted(attention_configs()))
assert attention_config("IdeaConfig") is attention_config("ideas.IdeaConfig") is ideas.IdeaConfig
"""
    derived = {"IdeaConfig", "FurtherIdeaConfig", "InnerIdeaConfig"}
    assert set(in_new_process(code, folder).split()) == FAMILIES | derived


def test_a_name_that_two_classes_have_belongs_to_this_package_and_else_to_none(folder: Path) -> None:
    for module, name in (("one", "SameConfig"), ("two", "SameConfig"), ("three", "TPAConfig")):
        text = DERIVED.format(name=name) if name != "TPAConfig" else SHADOW
        (folder / f"{module}.py").write_text(text.replace("Further", module.title()).replace("Inner", module))
    code = """
import one, two, three
from t6_lightning.model.attention import attention_config, attention_configs
from t6_lightning.model.attention.tpa import TPAConfig
assert attention_config("TPAConfig") is TPAConfig
print(*(name for name in attention_configs() if name.endswith(("SameConfig", "TPAConfig"))))
"""
    found = set(in_new_process(code, folder).split())
    assert {"TPAConfig", "three.TPAConfig", "one.SameConfig", "two.SameConfig"} <= found
    assert "SameConfig" not in found


SHADOW = """
from dataclasses import dataclass
from t6_lightning.model.attention import tpa

@dataclass(frozen=True)
class TPAConfig(tpa.TPAConfig):
    pass
"""


def test_abstract_and_local_classes_are_no_families() -> None:
    class LocalConfig(MHAConfig):
        pass

    assert LocalConfig in MHAConfig.__subclasses__()
    assert LocalConfig not in derived_classes(AttentionConfig)
    assert AttentionConfig not in attention_configs().values()


def test_a_checkpoint_names_its_class_by_import_path(folder: Path) -> None:
    (folder / "ideas.py").write_text(DERIVED.format(name="IdeaConfig"))
    code = """
from t6_lightning.common.classes import import_path
from t6_lightning.model.attention import attention_config
from t6_lightning.model.config import T6Config
config = T6Config.from_dict({"attention": {"class_path": "ideas.IdeaConfig", "init_args": {"strength": 2.0}}})
assert type(config.attention).__name__ == "IdeaConfig"
assert config.attention.mechanism == "idea"
assert config.to_dict()["attention"]["class_path"] == "ideas.IdeaConfig"
assert T6Config.from_dict(config.architecture()) == config
inner = attention_config("ideas.Group.InnerIdeaConfig")
assert import_path(inner) == "ideas.Group.InnerIdeaConfig"
assert inner().mechanism == "inneridea"
"""
    in_new_process(code, folder)


@pytest.mark.parametrize(
    "saved",
    [
        "TPAConfig",
        "t6_lightning.model.attention.tpa.TPAConfig",
        "t6_lightning.model.attention.tpa.config.TPAConfig",
        "t6_lightning.attention.moved_since.TPAConfig",
    ],
)
def test_class_paths_of_earlier_checkpoints_are_read(saved: str) -> None:
    assert attention_config(saved) is TPAConfig
    config = T6Config(attention=TPAConfig(n_heads=3, order=3, feature_dims=(8, 8)))
    before = config.architecture()
    before["attention"] = {"class_path": saved, "init_args": before["attention"]["init_args"]}
    assert config.differences(before) == {}
    # A field that did not exist then.
    del before["attention"]["init_args"]["kv_shift"], before["rope_base"]
    assert config.differences(before) == {}


def test_differences_name_what_differs() -> None:
    config = T6Config(attention=TPAConfig(n_heads=3))
    there = T6Config(attention=TPAConfig(n_heads=5), d_model=64).architecture()
    assert config.differences(there) == {"attention.init_args.n_heads": (5, 3), "d_model": (64, 256)}
    other = config.differences(T6Config(attention=MHAConfig()).architecture())
    assert other["attention.class_path"] == (import_path(MHAConfig), import_path(TPAConfig))


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        (
            "no_such_module.MyConfig",
            "no module 'no_such_module'; run the command from the module's folder, or add that folder to PYTHONPATH",
        ),
        ("own_package.no_such_module.MyConfig", "own_package has no 'no_such_module'"),
        ("broken.MyConfig", "importing broken fails: NameError: name 'undefined' is not defined"),
        ("leaving.MyConfig", "importing leaving fails: SystemExit: 3"),
        ("needs.MyConfig", "importing needs fails: ModuleNotFoundError: No module named 'not_installed'"),
        ("ideas.Missing", "ideas has no 'Missing'"),
        ("ideas.NUMBER", "it is not derived from AttentionConfig"),
        ("os.PathLike", "it is not derived from AttentionConfig"),
        ("t6_lightning.model.attention.base.AttentionConfig", "it is an abstract class"),
        (".ideas.SomeConfig", "an import path is module.Class"),
        ("ideas/SomeConfig.x", "an import path is module.Class"),
    ],
)
def test_classes_that_cannot_be_used(path: str, reason: str, folder: Path) -> None:
    (folder / "ideas.py").write_text("NUMBER = 3\n")
    (folder / "broken.py").write_text("undefined\n")
    (folder / "leaving.py").write_text("import sys\nsys.exit(3)\n")
    (folder / "needs.py").write_text("import not_installed\n")
    (folder / "own_package").mkdir()
    (folder / "own_package" / "__init__.py").write_text("")
    sys.modules.pop("ideas", None)
    with pytest.raises(BadInput) as caught:
        T6Config.from_dict({"attention": {"class_path": path}})
    assert str(caught.value).startswith(f"attention.class_path={path!r} is not possible: {reason}")
    assert "\n" not in str(caught.value)


def test_nothing_is_added_to_the_path_and_no_file_is_looked_for(tmp_path: Path) -> None:
    (tmp_path / "elsewhere.py").write_text(DERIVED.format(name="ElsewhereConfig"))
    before = list(sys.path)
    for path in (f"{tmp_path}/elsewhere.ElsewhereConfig", "elsewhere.ElsewhereConfig"):
        with pytest.raises(BadInput):
            import_class(path, AttentionConfig, "attention.class_path")
    assert sys.path == before


def test_mistakes_in_a_class_of_ones_own_are_told_in_a_sentence(folder: Path) -> None:
    """Classes defined here would be families of every other test: they live in another process."""
    (folder / "mistakes.py").write_text("""
from dataclasses import dataclass
from t6_lightning.model.attention.tpa import TensorProductAttention, TPAConfig

class Bare(TPAConfig):
    strength: float = 2.0

@dataclass(frozen=True)
class Partial(TPAConfig):
    def build(self, d_model):
        return PartialAttention(self, d_model)

class PartialAttention(TensorProductAttention):
    def adapt_factors(self, factors):
        return {"a_k": factors["a_k"]}
""")
    code = """
import torch
from mistakes import Bare, Partial
from t6_lightning.common.errors import BadInput
from t6_lightning.model.config import T6Config
from t6_lightning.model.init_report import NAMES, predicted
from t6_lightning.model.t6 import T6
try:
    T6Config(attention=Bare())
except BadInput as error:
    print(error)
config = T6Config(64, 32, 1, 16, Partial(n_heads=2, head_dim=16))
try:
    T6(config)(torch.zeros(1, 4, dtype=torch.long))
except BadInput as error:
    print(error)
print([name for name in NAMES if predicted(config)[name] is not None])
"""
    bare, partial, known = in_new_process(code, folder).splitlines()
    assert bare == (
        "attention='Bare' is not possible: Bare.strength is no field: put @dataclass(frozen=True) above the class"
    )
    assert partial == (
        "PartialAttention.adapt_factors must return the factors a_q, b_q, a_k, b_k, a_v, b_v, not a_k"
    )
    assert known == "['embedding']"
