"""bench: speed of whole models side by side, in training or in generation."""

from __future__ import annotations

import importlib

from t6_lightning.errors import BadInput

WHAT = {"train": "t6_lightning.commands.bench_train", "generate": "t6_lightning.commands.bench_generate"}


def main(arguments: list[str]) -> int:
    """`bench train ...` or `bench generate ...`."""
    what = arguments[1] if len(arguments) > 1 else None
    if what in ("-h", "--help"):
        print(f"usage: python -m t6_lightning bench {{{','.join(WHAT)}}} PRESET... [...]")
        return 0
    if what not in WHAT:
        raise BadInput(f"bench {what or ''}".rstrip() + f": say what to time: {' or '.join(WHAT)}")
    return importlib.import_module(WHAT[what]).main(arguments[1:])
