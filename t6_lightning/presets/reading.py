"""Reading YAML that may come from anywhere: bounded in size, depth and nodes, plain values only."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from t6_lightning.common.errors import BadInput

MOST_BYTES = 500_000
MOST_DEPTH = 64
MOST_NODES = 20_000
"""With aliases counted as often as they stand for their nodes."""
MOST_DIGITS = 100
"""Of one number."""

TAG = "tag:yaml.org,2002:"
MERGE = TAG + "merge"
PLAIN = {TAG + name for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge")}


class Unbounded(yaml.YAMLError):
    """YAML that goes beyond one of the bounds, or holds itself: whoever reads it as a whole never ends."""


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number and 2026-01-01 as text, as YAML 1.2 and jsonargparse do, and refuses what is unbounded."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = self.n_nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse deep nesting here: PyYAML composes, and everyone after it walks, by recursion."""
        self.depth += 1
        self._bound(self.depth, MOST_DEPTH, "levels of nesting")
        self.n_nodes += 1
        self._bound(self.n_nodes, MOST_NODES, "values")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            self._expanded(node, {})
        return node

    def _expanded(self, node: yaml.Node, sizes: dict[int, int | None]) -> int:
        """How many nodes a node stands for."""
        size = sizes.setdefault(id(node), 0)
        if size is None:
            raise Unbounded(
                f"an alias stands inside what it is an alias of in line {node.start_mark.line + 1}"
            )
        if size:
            return size
        if node.tag not in PLAIN:
            tag, line = node.tag.removeprefix(TAG), node.start_mark.line + 1
            raise yaml.YAMLError(f"the tag {tag!r} is not allowed in line {line}")
        sizes[id(node)] = None
        size = 1
        if isinstance(node, yaml.MappingNode):
            size += sum(self._expanded(part, sizes) for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            size += sum(self._expanded(part, sizes) for part in node.value)
        elif node.tag in (TAG + "int", TAG + "float"):
            self._bound(len(node.value), MOST_DIGITS, "digits of a number")
        self._bound(size, MOST_NODES, "values, aliases spelled out")
        sizes[id(node)] = size
        return size

    @staticmethod
    def _bound(number: int, most: int, what: str) -> None:
        if number > most:
            raise Unbounded(f"it has more than {most:,} {what}")

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """PyYAML would keep the last of two equal keys, and say nothing."""
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"a key is a list or a mapping in line {key.start_mark.line + 1}")
            name = self.construct_object(key) if key.tag != MERGE else None
            if name in seen:
                raise yaml.YAMLError(
                    f"{name!r} stands twice in one mapping in line {node.start_mark.line + 1}"
                )
            seen |= {name} if key.tag != MERGE else set()
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] != TAG + "timestamp"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    TAG + "float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def plain_values(text: str) -> Any:
    """The value of a YAML text: mappings, lists, texts, numbers, true, false and null.

    Raises:
        yaml.YAMLError: it is no YAML, has two equal keys, other tags or keys that are not scalars, or goes beyond
            one of the bounds above.
    """
    if len(text) > MOST_BYTES:
        raise Unbounded(f"it has more than {MOST_BYTES:,} characters")
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except ValueError as error:  # of a number such as `0x` or 1e_
        raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()


def read_mapping(file: Path) -> dict[str, Any]:
    """The settings in a YAML file. Raises BadInput, naming the file."""
    try:
        with file.open("rb") as stream:
            data = stream.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise yaml.YAMLError(f"it has more than {MOST_BYTES:,} bytes")
        content = plain_values(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadInput(f"{file} is not valid YAML: byte {error.start} is not UTF-8") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).replace('"<unicode string>", ', "").split())
        raise BadInput(f"{file} is not valid YAML: {reason}") from error
    except OSError as error:
        raise BadInput(f"{file} cannot be read: {error.strerror}") from error
    if not isinstance(content, dict):
        raise BadInput(f"{file} holds no settings: a configuration is a YAML mapping such as `trainer: ...`")
    return content
