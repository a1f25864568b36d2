"""Presets: YAML files that come with the package, called by name."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml

from t6_lightning.errors import BadInput
from t6_lightning.model.config import T6Config

FOLDER = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    """Every preset, as `--config` takes it."""
    return sorted(file.relative_to(FOLDER).with_suffix("").as_posix() for file in FOLDER.rglob("*.yaml"))


def config_file(name: str) -> Path:
    """The YAML file of a preset's name or a path.

    Raises:
        BadInput: neither a file nor a preset, or a file that holds no settings.
    """
    if Path(name).is_file():
        read_yaml(Path(name))
        return Path(name)
    preset = FOLDER / f"{name}.yaml"
    if preset.is_file():
        return preset
    near = difflib.get_close_matches(name, preset_names(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the presets are {', '.join(preset_names())}"
    raise BadInput(f"{name!r} is neither a file nor a preset: {hint}")


def read_yaml(file: Path) -> dict[str, Any]:
    """The settings that a file holds.

    Raises:
        BadInput: no text, no YAML, or no mapping of names to values.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise BadInput(f"{file} holds no settings: a configuration is a YAML mapping such as `trainer: ...`")
    return content


def load_net(name: str) -> T6Config:
    """The model of a preset or configuration file, without reading the rest of it.

    Raises:
        BadInput: no such file, no YAML, no `model.net`, or an impossible model.
    """
    file = config_file(name)
    content = read_yaml(file)
    try:
        net = content["model"]["net"]
    except (KeyError, TypeError):
        raise BadInput(f"{file} describes no model: it lacks model.net") from None
    return T6Config.from_dict(net)
