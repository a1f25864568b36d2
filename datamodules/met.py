"""What went wrong in reading, put together over loader processes and ranks."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from datamodules import stores
from datamodules.documents import Damage

T = TypeVar("T")


@dataclass
class Met:
    """What went wrong in reading."""

    passing: Counter[str] = field(default_factory=Counter)
    damage: Damage = field(default_factory=Counter)

    def add(self, other: "Met") -> None:
        """Take in what others met, who may have read the same places."""
        self.passing.update(other.passing)
        self.damage |= other.damage

    def by_kind(self) -> Counter[str]:
        """kind -> how often"""
        kinds = self.passing.copy()
        for (kind, _), times in self.damage.items():
            kinds[kind] += times
        return kinds


class News:
    """What this process has met since it was last asked."""

    def __init__(self) -> None:
        self._told = Met(stores.faults.copy(), stores.damage.copy())

    def take(self) -> Met:
        new = Met(stores.faults.copy() - self._told.passing, stores.damage.copy() - self._told.damage)
        self._told.passing.update(new.passing)
        self._told.damage.update(new.damage)
        return new


def of_all_ranks(value: T) -> list[T]:
    """What each rank has, in their order; every rank must ask."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, value)
    return every
