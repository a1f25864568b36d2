"""Classes by name: the ones derived from a base, and the one that an import path names."""

from __future__ import annotations

import importlib
import inspect
from typing import Any, TypeVar, cast

from t6_lightning.common.errors import BadInput, first_line, require

Base = TypeVar("Base")


def import_path(cls: type) -> str:
    """`module.QualName`, which `import_class` reads back."""
    return f"{cls.__module__}.{cls.__qualname__}"


def derived_classes(base: type[Base]) -> list[type[Base]]:
    """Every class derived from `base`, at any depth, that can be built and named.

    Abstract classes are left out, and those defined inside a function, which no import path names.
    """
    found: dict[type[Base], None] = {}
    for cls in base.__subclasses__():
        if not inspect.isabstract(cls) and "<locals>" not in cls.__qualname__:
            found[cls] = None
        found |= dict.fromkeys(derived_classes(cls))
    return list(found)


def import_class(path: str, base: type[Base], field: str) -> type[Base]:
    """The class of an import path, which is checked to derive from `base`.

    Importing a module runs its code. Only modules that `import` finds on `sys.path` are imported (with `python -m`
    that includes the working directory), and nothing is added to it; whether the class fits is known afterwards.

    Raises:
        BadInput: no such module or class, a module that fails, or a class that is not derived from `base`.
    """
    names = path.split(".")
    is_path = len(names) > 1 and all(name.isidentifier() for name in names)
    require(is_path, field, path, "an import path is module.Class")
    found = _attribute(names, len(names) - 1, field)
    fits = isinstance(found, type) and issubclass(found, base)
    require(fits, field, path, f"it is not derived from {base.__name__}")
    require(not inspect.isabstract(found), field, path, "it is an abstract class; name one derived from it")
    return cast(type[Base], found)


def _attribute(names: list[str], n_module: int, field: str) -> Any:
    """The object `names`, of which the first `n_module` name the module, or fewer for a class inside a class."""
    path, module_name = ".".join(names), ".".join(names[:n_module])
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        is_missing = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        if is_missing and n_module > 1:
            return _attribute(names, n_module - 1, field)
        if is_missing:
            where = "run the command from the module's folder, or add that folder to PYTHONPATH"
            raise BadInput(f"{field}={path!r} is not possible: no module {module_name!r}; {where}") from error
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise BadInput(
            f"{field}={path!r} is not possible: importing {module_name} fails: {reason}"
        ) from error
    for name in names[n_module:]:
        known = hasattr(found, name)
        require(known, field, path, f"{getattr(found, '__name__', module_name)} has no {name!r}")
        found = getattr(found, name)
    return found
