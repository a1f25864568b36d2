"""Presets: YAML files that come with the package, called by name, each of which may extend another."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from t6_lightning.common.errors import BadInput, require, shown
from t6_lightning.model.config import T6Config
from t6_lightning.presets.classes import find_class, kept_arguments
from t6_lightning.presets.reading import read_mapping

FOLDER = Path(__file__).parent
LONGEST_CHAIN = 32
"""Files that extend each other."""

RECIPES = ("paper", "released")
"""Whose settings a run has where the paper and its released trainer differ. The first is the default."""


def preset_names() -> list[str]:
    """Every preset, as `--config` takes it."""
    files = (file.relative_to(FOLDER).with_suffix("").as_posix() for file in FOLDER.rglob("*.yaml"))
    return sorted(name for name in files if not name.startswith("recipes/"))


def recipe_table(recipe: str) -> Path | None:
    """The file of what a recipe sets for every model, under all other files and flags; None for the default recipe.

    Raises:
        BadInput: an unknown recipe.
    """
    require(recipe in RECIPES, "recipe", recipe, f"choose one of {', '.join(RECIPES)}")
    return None if recipe == RECIPES[0] else FOLDER / "recipes" / f"{recipe}.yaml"


def model_presets() -> list[str]:
    """The presets that describe a model; those of `data/` are combined with one."""
    return [name for name in preset_names() if not name.startswith("data/")]


def preset_label(file: Path) -> str:
    """A preset's name, or the name of a file that is none."""
    try:
        return file.absolute().relative_to(FOLDER).with_suffix("").as_posix()
    except ValueError:
        return file.stem


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name[:200], preset_names(), n=3, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(near)}?" if near else "`python -m t6_lightning params` lists the presets"
    )
    return f"{shown(name)} is neither a file nor a preset: {hint}"


def config_file(name: str) -> Path:
    """The YAML file of a preset's name or a path.

    Raises:
        BadInput: neither a file nor a preset, or a file whose settings cannot be read.
    """
    if os.path.isfile(name):
        settings(Path(name))
        return Path(name)
    preset = FOLDER / f"{name}.yaml"
    if os.path.isfile(preset):
        return preset
    raise BadInput(_unknown(name))


def settings(file: Path, recipe: str | None = None) -> dict[str, Any]:
    """The settings of a preset or configuration file, those of the file that it `extends` included.

    `extends: NAME_OR_FILE` names a preset, or a file seen from the folder of the one that says so. Its settings hold
    wherever this file says nothing: mappings are merged, everything else is replaced. Where this file names another
    class_path, those init_args of the base stay that the new class accepts, as on the command line.

    `recipes: {RECIPE: SETTINGS}` says what a file sets instead under a recipe: `recipe`, or else the one that the files
    state as `recipe: RECIPE`.

    Raises:
        BadInput: a file that is no text, no YAML or no mapping, a base that does not exist, files that extend
            each other in a circle, or an unknown recipe.
    """
    found = _settings(file, (), recipe or RECIPES[0])
    stated = found.get("recipe", RECIPES[0])
    require(stated in RECIPES, f"recipe in {file}", stated, f"choose one of {', '.join(RECIPES)}")
    return found if recipe or stated == RECIPES[0] else _settings(file, (), stated)


def _settings(file: Path, above: tuple[Path, ...], recipe: str) -> dict[str, Any]:
    if file.resolve() in above:
        circle = " extends ".join(path.name for path in (*above[above.index(file.resolve()) :], file))
        raise BadInput(f"extends={above[-1].name!r} is not possible: {circle} again, which is a circle")
    if len(above) > LONGEST_CHAIN:
        raise BadInput(
            f"extends is not possible in {above[0]}: more than {LONGEST_CHAIN} files extend each other"
        )
    own = read_mapping(file)
    instead = _recipes(own, file).get(recipe, {})
    if "extends" not in own:
        return _merged(own, instead)
    name = own.pop("extends")
    if not isinstance(name, str):
        raise BadInput(
            f"extends={shown(name)} is not possible in {file}: it takes the name of one preset or file"
        )
    candidates = (FOLDER / f"{name}.yaml", file.parent / name)
    base = next((candidate for candidate in candidates if os.path.isfile(candidate)), None)
    if base is None:
        raise BadInput(f"extends={shown(name)} is not possible in {file}: {_unknown(name)}")
    return _merged(_merged(_settings(base, (*above, file.resolve()), recipe), own), instead)


def _recipes(own: dict[str, Any], file: Path) -> dict[str, dict[str, Any]]:
    """Take what a file sets under each recipe out of its settings."""
    found = own.pop("recipes", {})
    is_table = isinstance(found, dict) and all(isinstance(settings, dict) for settings in found.values())
    allowed = f"it maps some of {', '.join(RECIPES)} to settings"
    require(is_table and set(found) <= set(RECIPES), f"recipes in {file}", found, allowed)
    return found


def _merged(base: dict[str, Any], own: dict[str, Any], place: str = "") -> dict[str, Any]:
    """`base` with what `own` says instead; `place` is the dotted name of both."""
    if "class_path" in own:
        base = kept_arguments(base, own["class_path"], place)
    merged = dict(base)
    for name, value in own.items():
        before, inside = base.get(name), f"{place}.{name}" if place else name
        # A class by its name alone, as the command line takes it too.
        if isinstance(value, str) and isinstance(before, dict) and "class_path" in before:
            value = _spelled_out(value, inside)
        if isinstance(before, str) and isinstance(value, dict):
            before = _spelled_out(before, inside)
        if isinstance(before, dict) and isinstance(value, dict):
            value = _merged(before, value, inside)
        merged[name] = value
    return merged


def _spelled_out(name: str, place: str) -> str | dict[str, Any]:
    return {"class_path": name} if find_class(name, place) else name


def load_net(name: str) -> T6Config:
    """The model of a preset or configuration file, without building the rest of it.

    Raises:
        BadInput: no such file, no YAML, no `model.net`, or an impossible model.
    """
    file = config_file(name)
    found = settings(file)
    table = recipe_table(found.get("recipe", RECIPES[0]))
    try:
        net = found["model"]["net"]
        if table is not None:
            net = _merged(settings(table)["model"]["net"], net, "model.net")
    except (KeyError, TypeError):
        raise BadInput(f"{file} describes no model: it lacks model.net") from None
    return T6Config.from_dict(net)
