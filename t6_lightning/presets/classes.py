"""What is kept of a base's settings where a file that extends it names another class: the command line's rule."""

from __future__ import annotations

from functools import cache
from typing import Any

from t6_lightning.common.classes import derived_classes, import_class
from t6_lightning.common.errors import BadInput


def find_class(name: Any, place: str) -> type | None:
    """The class that a class_path at `place` (a dotted setting) names, or None where it cannot be told.

    An import path is imported. A name alone is one of the classes that its setting takes: attention families,
    schedules and data modules.
    """
    if not isinstance(name, str):
        return None
    if "." in name:
        try:
            return import_class(name, object, place)
        except BadInput:
            return None  # whoever builds it says what is wrong
    found = [cls for cls in derived_classes(_base(place)) if cls.__name__ == name]
    return found[0] if len(found) == 1 else None


def _base(place: str) -> type:
    # Imported here: reading a preset's model needs neither Lightning nor data modules.
    if place == "model.net.attention":
        from t6_lightning.model.attention import AttentionConfig

        return AttentionConfig
    if place == "model.schedule":
        from t6_lightning.training.schedule import Schedule

        return Schedule
    if place == "data" or place.startswith("data.init_args.sources."):
        from datamodules import corpora  # noqa: F401  (its classes are known by name)
        from datamodules.base import TokenData

        return TokenData
    return type(None)


def kept_arguments(before: dict[str, Any], class_path: Any, place: str) -> dict[str, Any]:
    """The settings of a class without those init_args that the class `class_path` does not accept.

    An argument stays where the other class has one of the same name that takes its value. Of a class that cannot be
    told none stays, unless it has the name of the one before.
    """
    now, then = find_class(class_path, place), find_class(before.get("class_path"), place)
    same_name = str(class_path).rpartition(".")[2] == str(before.get("class_path")).rpartition(".")[2]
    if now is then if now and then else same_name:
        return before
    arguments = before.get("init_args")
    if now is None or not isinstance(arguments, dict):
        return {}
    kept = {name: value for name, value in arguments.items() if _accepts(now, name, value)}
    return {"class_path": class_path, "init_args": kept}


def _accepts(cls: type, name: str, value: Any) -> bool:
    parser = _parser_of(cls, name)
    if parser is None:
        return False
    try:
        parser.parse_object({name: value}, defaults=False)
    except Exception:  # argparse's and jsonargparse's own
        return False
    return True


@cache
def _parser_of(cls: type, name: str) -> Any:
    """jsonargparse's parser of one argument of a class, or None where it has no such argument."""
    from jsonargparse import ArgumentParser

    names = ArgumentParser().add_class_arguments(cls, fail_untyped=False)
    if name not in names:
        return None
    parser = ArgumentParser(exit_on_error=False)
    others: set[str | int] = {other for other in names if other != name}
    parser.add_class_arguments(cls, skip=others, fail_untyped=False)
    return parser
