"""bench: speed and memory of whole models, side by side."""

from __future__ import annotations

import importlib

from t6_lightning.common.errors import BadInput

# Each has main(arguments), with its own name first.
KINDS = {
    "train": "t6_lightning.cli.bench_train",
    "generate": "t6_lightning.cli.bench_generate",
}


def main(arguments: list[str]) -> int:
    """Run `bench train ...` or `bench generate ...`."""
    kind = arguments[1] if len(arguments) > 1 else ""
    if kind in ("-h", "--help"):
        print(f"usage: python -m t6_lightning bench {{{','.join(KINDS)}}} PRESET... [...]\n\n{__doc__}")
        raise SystemExit(0)
    if kind not in KINDS:
        raise BadInput(f"{' '.join(['bench', kind]).strip()}: choose one of {', '.join(KINDS)}")
    return importlib.import_module(KINDS[kind]).main(arguments[1:])
