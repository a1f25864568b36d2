"""Checkpoints that are foreign, damaged or made to harm, from a good one."""

from __future__ import annotations

import copy
import os
import pickle
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

State = dict[str, Any]
CYCLE = object()
"""Stands for the whole state, inside itself."""


class RunsCode:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.marker}'",)


def foreign(marker: Path) -> dict[str, Callable[[State], Any]]:
    """Name -> what makes another state of a good one, in place or as its result. Each must be refused by all commands.

    Args:
        marker: a file that is made where code in one is run.
    """

    def weight(name: str, value: Callable[[torch.Tensor], Any]) -> Callable[[State], None]:
        def change(state: State) -> None:
            state["state_dict"][name] = value(state["state_dict"][name])

        return change

    def net(**values: Any) -> Callable[[State], None]:
        return lambda state: state["hyper_parameters"]["net"].update(values)

    def drop(values: State, name: str) -> None:
        del values[name]

    def tokenizer(text: Any) -> Callable[[State], None]:
        return lambda state: state.update(tokenizer=text)

    def itself(state: State) -> None:
        state["hyper_parameters"]["net"]["attention"] = state

    def laughs(state: State) -> None:
        value: list[Any] = ["ha"]
        for _ in range(40):
            value = [value, value]
        state["hyper_parameters"]["net"]["dropout"] = value

    def deep(state: State) -> None:
        for _ in range(200):
            state["hyper_parameters"] = {"net": state["hyper_parameters"]}

    big = '{"definition": "bytes", "eot": 1000000000}'
    any_weight = "net.embedding.weight"
    return {
        "a weight missing": lambda state: drop(state["state_dict"], any_weight),
        "a weight too many": lambda state: state["state_dict"].update({"net.other": torch.zeros(3)}),
        "no weights": lambda state: state.update(state_dict={}),
        "a weight of another shape": weight(any_weight, lambda value: value[:, :-1].clone()),
        "a weight of integers": weight(any_weight, torch.Tensor.long),
        "a complex weight": weight(any_weight, lambda value: value + 0j),
        "a sparse weight": weight(any_weight, torch.Tensor.to_sparse),
        "a weight without memory": weight(any_weight, lambda value: value.to("meta")),
        "a weight of one element": weight(any_weight, lambda value: value[:1, :1].expand(10**6, 10**6)),
        "a weight that is NaN": weight(any_weight, lambda value: value * float("nan")),
        "a weight that is text": weight(any_weight, lambda value: "weight"),
        "hyper_parameters None": lambda state: state.update(hyper_parameters=None),
        "hyper_parameters a list": lambda state: state.update(hyper_parameters=[1]),
        "no hyper_parameters": lambda state: drop(state, "hyper_parameters"),
        "net None": lambda state: state["hyper_parameters"].update(net=None),
        "an unknown field": net(width=3),
        "a huge vocabulary": net(vocab_size=10**12),
        "a billion layers": net(n_layers=10**9),
        "an integer of 400 digits": net(d_model=10**400),
        "an attention of no module": net(attention={"class_path": "nowhere.Attention"}),
        "an attention that is none": net(attention={"class_path": "os.system"}),
        "confinement that is text": lambda state: state["hyper_parameters"].update(confine_to_documents="no"),
        "values that refer to themselves": itself,
        "values that grow without bound": laughs,
        "values nested deep": deep,
        "a list": lambda state: [state],
        "a number": lambda state: 3,
        "a tensor": lambda state: torch.zeros(3),
        "code": lambda state: state.update(more=RunsCode(marker)),
        "code as a weight": lambda state: state["state_dict"].update({any_weight: RunsCode(marker)}),
        "a global_step that is text": lambda state: state.update(global_step="3"),
        "a global_step below 0": lambda state: state.update(global_step=-1),
        "no tokenizer": lambda state: drop(state, "tokenizer"),
        "a tokenizer that is a number": tokenizer(3),
        "a tokenizer that is no JSON": tokenizer("{"),
        "a tokenizer without a definition": tokenizer("{}"),
        "a tokenizer of nothing": tokenizer('{"definition": "{}", "eot": null}'),
        "a separator of 10**9": tokenizer(big),
        "a separator below 0": tokenizer(big.replace("1000000000", "-1")),
    }


NEEDS_TOKENIZER = "tokenizer", "separator"
"""In the names of those that commands on data of their own take: they have a tokenizer already."""

UNUSABLE: tuple[Any, ...] = (None, "x", [], {}, -1, float("nan"), 10**400, CYCLE)
"""Values that are of a wrong type, or out of range, nearly everywhere."""


def mutate(state: State, rng: random.Random) -> str:
    """Put an unusable value somewhere into a state, or take one out; returns what was done."""
    places = list(_places(state, ()))
    path = rng.choice(places)
    inside: Any = state
    for name in path[:-1]:
        inside = inside[name]
    named = ".".join(map(str, path))
    if isinstance(inside, dict) and rng.random() < 0.3:
        del inside[path[-1]]
        return f"without {named}"
    value = rng.choice(UNUSABLE)
    inside[path[-1]] = state if value is CYCLE else copy.copy(value)
    return f"{named}: {'itself' if value is CYCLE else str(value)[:20]!r}"


def _places(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    names = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for name in names:
        yield (*path, name)
        yield from _places(value[name], (*path, name))


def write(state: Any, file: Path) -> Path:
    """As any program writes it: without a checksum beside it."""
    torch.save(state, file)
    return file


def odd_files(good: Path, folder: Path, marker: Path) -> dict[str, Path]:
    """Name -> a file that is no checkpoint, or claims to be one."""
    folder.mkdir(parents=True, exist_ok=True)
    content = good.read_bytes()
    with zipfile.ZipFile(good) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}

    def zipped(name: str, compression: int, changed: dict[str, bytes]) -> None:
        with zipfile.ZipFile(folder / name, "w", compression) as archive:
            for entry, data in {**entries, **changed}.items():
                archive.writestr(entry, data)

    first_weight = next(name for name in entries if name.endswith("/data/0"))
    zipped("bomb", zipfile.ZIP_DEFLATED, {first_weight: b"\0" * 50_000_000})
    zipped("no-pickle", zipfile.ZIP_STORED, {next(n for n in entries if n.endswith("data.pkl")): b""})
    (folder / "empty").write_bytes(b"")
    (folder / "text").write_text("not a checkpoint")
    (folder / "cut").write_bytes(content[: len(content) // 2])
    (folder / "pickle").write_bytes(pickle.dumps(RunsCode(marker)))
    with zipfile.ZipFile(folder / "empty-zip", "w"):
        pass
    # The central directory's size of the largest entry.
    claims, at = bytearray(content), content.rindex(b"PK\x01\x02")
    claims[at + 24 : at + 28] = (2**31).to_bytes(4, "little")
    (folder / "claims").write_bytes(claims)
    (folder / "folder").mkdir(exist_ok=True)
    (folder / "shards").mkdir(exist_ok=True)
    (folder / "shards" / "shard-00000-of-99999.pt").write_bytes(content)
    if not (folder / "pipe").exists():
        os.mkfifo(folder / "pipe")
    return {file.name: file for file in sorted(folder.iterdir())}
