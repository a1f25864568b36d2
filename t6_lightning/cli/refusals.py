"""What is wrong with a command line or a file, in one sentence: the option, its value, and what is allowed."""

from __future__ import annotations

import collections.abc
import difflib
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from t6_lightning.common.classes import derived_classes
from t6_lightning.common.errors import BadInput, first_line, shown

MOST_CHOICES = 16
"""Of classes that a sentence lists."""

WORDS: dict[Any, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    str: ("text", "texts"),
    Path: ("a path", "paths"),
    type(None): ("null", "null"),
    Any: ("any value", "values"),
}
"""Type -> what one and several of its values are called."""

LISTS = (list, set, collections.abc.Iterable, collections.abc.Sequence, list[Any])


def words(hint: Any, several: bool = False) -> str:
    """What values a type hint allows."""
    if hint in WORDS:
        return WORDS[hint][several]
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(dict.fromkeys(words(kind, several) for kind in inside))
    if origin is Literal:
        return f"one of {', '.join(map(str, inside))}"
    if origin is tuple:
        if inside[-1:] != (...,):
            return f"a list of {len(inside)} {words(inside[0], True)}"
        return f"a list of {words(inside[0], True)}"
    if origin is dict or hint is dict:
        return f"a mapping of {words(inside[0])} to {words(inside[1])}" if inside else "a mapping"
    if origin in LISTS or hint in LISTS:
        return f"a list of {words(inside[0], True)}" if inside else "a list"
    name = getattr(hint, "__name__", str(hint))
    return f"{name} classes" if several else f"{'an' if name[0] in 'AEIOU' else 'a'} {name} class"


def allows_null(hint: Any) -> bool:
    """Whether null is a value of the type."""
    return hint is Any or type(None) in get_args(hint)


def classes_of(hint: Any) -> list[type]:
    """Classes that may be named where a type hint holds."""
    if get_args(hint) and get_origin(hint) is not Literal:
        return [cls for part in get_args(hint) for cls in classes_of(part)]
    is_plain = not inspect.isclass(hint) or hint in WORDS or hint.__module__ == "builtins"
    if is_plain or get_origin(hint) is not None:
        return []
    return [cls for cls in (hint, *derived_classes(hint)) if not inspect.isabstract(cls)]


def hint_of(parser: Any, key: str) -> Any:
    """The type of a parser's option, or None."""
    return next((getattr(a, "_typehint", None) for a in parser._actions if a.dest == key), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " (did you mean ...?)", or nothing where no known name is near."""
    folded = {choice.lower(): choice for choice in known if not choice.endswith(".help")}
    if name.lower() in folded:
        return f" (did you mean {folded[name.lower()]}?)"
    near = difflib.get_close_matches(name.lower()[:100], folded, n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(folded[found] for found in near)}?)" if near else ""


def one_sentence(message: str, parser: Any) -> str:
    """jsonargparse's nested report as one sentence.

    Parsers of classes inside others are of the same kind: their sentence stands in a line of the report that this one
    gets, which adds its own key in front.
    """
    found = re.match(r'\s*Parser key "([^"]+)":?', message)
    key, report = (found[1], message[found.end() :]) if found else ("", message)
    inner = re.search(r"^\s*(?:- )?(\S+?(?:=.*)? is (?:not possible: .*|missing: .*))$", report, re.MULTILINE)
    if inner is None:  # jsonargparse writes some of them on one line
        inner = re.search(
            r"- (\S+?(?:=.*?)? is (?:not possible: .*?|missing: .*?))(?= - Expected a | *$)", report
        )
    if key and inner:
        return f"{key}.{inner[1].removeprefix('init_args.')}"
    text = " ".join(report.split())
    if unknown := re.search(r"unrecognized arguments: --([\w.]+)", text):
        options = {option.lstrip("-") for action in parser._actions for option in action.option_strings}
        return text[:1000] + did_you_mean(unknown[1], options)
    if unknown := re.search(
        r"Option '([^']*)' is not accepted|Group '(.*)' does not accept option '(.*)'", text
    ):
        name = unknown[1] if unknown[1] is not None else f"{unknown[2]}.{unknown[3]}"
        hint = did_you_mean(name, {action.dest for action in parser._actions})
        return f"{key + '.' if key else ''}{name} is not possible: {name!r} is not accepted{hint}"
    if missing := re.search(r"the following arguments are required: (.*)", text):
        return f"{key + '.' if key else ''}{missing[1]} is missing: it has no default"
    if not key:
        return text[:1000].removeprefix("argument ")
    hint = hint_of(parser, key)
    value = _value(report)
    setting = key if value is None else f"{key}={value}"
    return f"{setting} is not possible: {_reason(text, hint, value)}"


def _value(report: str) -> str | None:
    """The value that a report says was given, as it stands in a sentence."""
    if nested := re.search(r"Given value: NestedArg\(key='(.*?)', val=(.*)\)\s*$", report, re.DOTALL):
        value = nested[2]
    elif given := re.search(r"(?:Given|Got) value: (.*)", report):
        value = given[1]
    elif loaded := re.search(r"Unable to load config '(.*)'", report):
        value = loaded[1]
    elif path := re.search(r"(?:import path string: |a path but )(\S+)", report):
        value = path[1]
    else:
        return None
    is_literal = re.match(r"[\[{(<'\"]|[-+.\d]+$|None$|True$|False$|Namespace", value)
    return shown(value) if not is_literal or value.startswith("<") else _cut(value)


def _cut(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:120]}…{text[-20:]}"


def _reason(text: str, hint: Any, value: str | None) -> str:
    if problem := re.search(r"Problem with given class_path '(.*?)': (.*?)(?= - Expected a |$)", text):
        return f"{problem[1]}: {_without_value(problem[2])}"
    if other := re.search(r"Import path (\S+) does not correspond to a subclass of (\w+)", text):
        return f"{other[1]} is not a class derived from {other[2]}"
    if hint is None and "Unable to load config" in text:
        return "it must be a mapping of settings, or a file that holds one"
    if hint is None:
        return _without_value(text)[:600]
    by_name = re.search(r"dot import path string: (\S+)|Not a valid subclass", text)
    names = sorted({cls.__name__ for cls in classes_of(hint)})
    if by_name and names:
        near = did_you_mean(by_name[1] or "", names)
        if len(names) > MOST_CHOICES:
            return f"it must be {words(hint)}{near}"
        return f"choose one of {', '.join(names)}{near}"
    if get_origin(hint) is Literal:
        return f"choose one of {', '.join(map(str, get_args(hint)))}"
    literals = [value for kind in get_args(hint) if get_origin(kind) is Literal for value in get_args(kind)]
    if literals:
        return f"choose one of {', '.join(map(str, dict.fromkeys(literals)))}"
    if "Expected a tuple" in text or "Expected a" in text or "Unable to load" in text:
        return f"it must be {words(hint)}"
    return _without_value(text)[:600]


def _without_value(text: str) -> str:
    return re.split(r" ?(?:Given value type|Got value): ", text)[0].strip(" -").rstrip(".")


# --- which option is to blame ---


def options_in(arguments: Sequence[str]) -> list[list[str]]:
    """A command line's options, each with the words up to the next."""
    groups: list[list[str]] = []
    for word in arguments:
        if word.startswith("--") or not groups or is_config(groups[-1]):
            groups.append([])
        groups[-1].append(word)
    return groups


def is_config(option: list[str]) -> bool:
    """Whether an option names a configuration file, which is read before all others."""
    return option[0].startswith("--config=")


def blamed(error: Exception, arguments: Sequence[str], attempt: Callable[[list[str]], object]) -> BadInput:
    """An error as one sentence that names an option of the command line.

    Where it names none of those that were given, each is left out once: those without which the command line is right
    are to blame, whichever layer found the error.

    Args:
        error: what is wrong with the arguments.
        arguments: options and values.
        attempt: raises where it is given arguments with something wrong.
    """
    sentence = str(error) if isinstance(error, BadInput) else f"{type(error).__name__}: {first_line(error)}"
    options = options_in(arguments)
    flags = [option for option in options if not is_config(option)]
    if any(_is_named(names_of(option)[0], sentence) for option in flags):
        return BadInput(sentence)
    guilty = []
    for left_out in flags:
        try:
            attempt([word for option in options if option is not left_out for word in option])
        except Exception:
            continue
        guilty.append(left_out)
    if not guilty:
        return BadInput(sentence)
    named = " with ".join(f"{name}={shown(value)}" for name, value in map(names_of, guilty[:3]))
    return BadInput(f"{named}{'' if 'is not possible' in sentence else ' is not possible'}: {sentence}")


def with_option(sentence: str, arguments: Sequence[str]) -> str:
    """A sentence that mentions an option's value and no option, with that option in front."""
    options = [names_of(option) for option in options_in(arguments) if option[0].startswith("--")]
    options = [
        (name, value) for name, value in options if name != "config"
    ]  # a file's sentence names it already
    if any(_is_named(name, sentence) or f"--{name}" in sentence for name, _ in options):
        return sentence
    for name, value in options:
        if len(value) > 3 and not value.replace(".", "").isdecimal() and value in sentence:
            leaf = name.rpartition(".")[2]
            return f"{name}: {sentence.removeprefix(f'{leaf}: ')}"
    return sentence


def _is_named(option: str, sentence: str) -> bool:
    after = r"(?![\w.])" if "." in option else "(=|: )"  # words such as `run` occur in any sentence
    return bool(re.search(rf"(?<![\w.]){re.escape(option)}{after}", sentence.replace(".init_args", "")))


def names_of(option: list[str]) -> tuple[str, str]:
    """Dotted name and value of an option and its words."""
    name, _, value = option[0].partition("=")
    return name.lstrip("-").rstrip("+").replace(".init_args", ""), value or " ".join(option[1:])
