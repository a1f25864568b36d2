"""Checkpoints in shards: a folder in which every rank wrote its own rows, readable on any number of ranks.

    step-00000100.ckpt/
        rest.pt                     what is not spread: counters, callbacks, data position, settings
        shard-00000-of-00004.pt     the rows of each spread tensor that rank 0 of 4 held
        *.sha256                    beside each file

Parameters are spread along their first dimension, so the whole is the shards one below the other. Not
torch.distributed.checkpoint: its metadata is a pickle, and checkpoints here are read without unpickling code.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

REST = "rest.pt"


def shard_file(folder: Path, rank: int, world: int) -> Path:
    """Where rank `rank` of `world` writes."""
    return folder / f"shard-{rank:05d}-of-{world:05d}.pt"


SHARD = re.compile(r"shard-\d{5}-of-(\d{5})\.pt")


def files_of(folder: Path) -> list[Path]:
    """All files that a whole checkpoint has: the count is in the shards' names; none when there are no shards."""
    counts = [int(found[1]) for file in folder.glob("shard-*.pt") if (found := SHARD.fullmatch(file.name))]
    if not counts:
        return []
    world = max(counts)
    return [folder / REST, *(shard_file(folder, rank, world) for rank in range(world))]


class Pieces:
    """A tensor in pieces, one below the other, each in memory mapped from its file.

    Args:
        pieces: what each rank held, in the order of ranks; ranks without rows hold empty ones.
    """

    def __init__(self, pieces: list[torch.Tensor]) -> None:
        self.pieces = pieces
        self.shape = torch.Size([sum(len(piece) for piece in pieces), *pieces[0].shape[1:]])
        self.dtype = pieces[0].dtype

    def rows(self, first: int, behind: int) -> torch.Tensor:
        """Rows `first` to `behind` - 1; only the files that hold them are read."""
        found, start = [], 0
        for piece in self.pieces:
            found.append(piece[max(first - start, 0) : max(behind - start, 0)])
            start += len(piece)
        return torch.cat(found)

    def whole(self) -> torch.Tensor:
        """The tensor."""
        return torch.cat(self.pieces)


def split(checkpoint: dict[str, Any], is_spread: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(rest, spread values by name) of a checkpoint's weights and optimizer states."""
    spread: dict[str, Any] = {}
    rest = dict(checkpoint, state_dict={}, optimizer_states=[])
    for name, value in checkpoint["state_dict"].items():
        if is_spread(value):
            spread[f"weight/{name}"] = value
        else:
            rest["state_dict"][name] = value
    for number, state in enumerate(checkpoint.get("optimizer_states", [])):
        kept: dict[int, dict[str, Any]] = {}
        for index, values in state["state"].items():
            kept[index] = {}
            for name, value in values.items():
                if is_spread(value):
                    spread[f"optimizer/{number}/{index}/{name}"] = value
                else:
                    kept[index][name] = value
        rest["optimizer_states"].append({"state": kept, "param_groups": state["param_groups"]})
    return rest, spread


def join(rest: dict[str, Any], spread: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint that `split` took apart."""
    for full_name, value in spread.items():
        kind, _, name = full_name.partition("/")
        if kind == "weight":
            rest["state_dict"][name] = value
        else:
            number, index, name = name.split("/")
            rest["optimizer_states"][int(number)]["state"].setdefault(int(index), {})[name] = value
    return rest


def load(folder: Path) -> dict[str, Any]:
    """Read a folder; spread tensors are `Pieces` that read what is asked of them."""

    def read(file: Path) -> dict[str, Any]:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)

    rest_file, *shard_files = files_of(folder)
    shards = [read(file) for file in shard_files]
    pieces = {name: Pieces([shard[name] for shard in shards]) for name in shards[0]}
    return join(read(rest_file), pieces)


def put_together(state: Any) -> Any:
    """A state of `load` with whole tensors on the CPU in place of `Pieces`."""
    if isinstance(state, Pieces):
        return state.whole()
    if isinstance(state, dict):
        return {name: put_together(value) for name, value in state.items()}
    return [put_together(value) for value in state] if isinstance(state, list) else state
