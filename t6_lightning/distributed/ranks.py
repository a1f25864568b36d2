"""What the processes of one run tell each other; with one process nothing is sent and nothing is paid."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from t6_lightning.common.errors import BadInput
from t6_lightning.distributed.signals import RANK_VARIABLES, signals

Result = TypeVar("Result")

_hosts: distributed.ProcessGroup | None = None
"""Of the processes themselves, beside the group of their GPUs; None where the ranks' only group is that already."""


class FirstRankFailed(BadInput):
    """Rank 0 failed and has said why: the others end quietly."""


def connected() -> bool:
    """Whether this process is one of several that have found each other."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def is_first() -> bool:
    """Whether this is rank 0, which alone prints, logs and writes."""
    if connected():
        return distributed.get_rank() == 0
    named = [os.environ[name] for name in RANK_VARIABLES if name in os.environ]
    return not named or int(named[0]) == 0


def connect_hosts() -> None:
    """Let ranks whose devices are connected speak past them too. Every rank must call it.

    What they ask each other in every step would else wait for all that the devices have yet to do, and these then
    for the next step's first launches.
    """
    global _hosts
    if connected() and distributed.get_backend() != "gloo":
        group = distributed.new_group(backend="gloo")
        assert isinstance(group, distributed.ProcessGroup)
        _hosts = group


def is_lost(error: RuntimeError) -> bool:
    """Whether another rank is gone or answers no more: gloo, by which ranks ask each other in each step, says so in
    words alone."""
    said = str(error)
    gone = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
    return connected() and "gloo" in said and any(words in said for words in gone)


def disconnect(patience: float = 10) -> None:
    """Leave the group of processes, all at the same time: NCCL's part of it waits for the other ranks to leave too.

    A rank that died or hangs is waited for no longer than `patience` seconds.
    """
    global _hosts
    _hosts = None
    if distributed.is_available() and distributed.is_initialized():
        leaving = threading.Thread(target=distributed.destroy_process_group, daemon=True)
        leaving.start()
        leaving.join(patience)


def total(sums: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over all ranks, on its device, without waiting for it."""
    if connected():
        distributed.all_reduce(sums)
    return sums


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a spread tensor, in the same memory; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def total_norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of all elements of tensors, of which each rank may hold a part. Every rank must ask.

    Of parts as plain tensors: the dispatch of hundreds of spread ones takes the host longer than the device computes.
    """
    norm = torch.nn.utils.get_total_norm([local(tensor) for tensor in tensors])
    if not any(isinstance(tensor, DTensor) for tensor in tensors):
        return norm
    return total(norm.double().square()).sqrt().to(norm.dtype)


def largest(value: float) -> float:
    """The largest of the ranks' values. Waits for the other ranks to ask, not for any device."""
    if not connected():
        return value
    values = torch.tensor(value, dtype=torch.float64)
    distributed.all_reduce(values, distributed.ReduceOp.MAX, group=_hosts)
    return float(values)


def signalled() -> int:
    """The signal that this or another rank has noted, 0 for none. Every rank must ask."""
    return int(largest(signals.noted))


def barrier() -> None:
    """Wait for all ranks."""
    if connected():
        distributed.barrier(group=_hosts)


def gathered(value: Result) -> list[Result]:
    """What each rank hands in, in the order of ranks, on every rank; it must be picklable. Every rank must ask."""
    if not connected():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value, group=_hosts)
    return values


def number() -> tuple[int, int]:
    """(this rank, how many there are)."""
    return (distributed.get_rank(), distributed.get_world_size()) if connected() else (0, 1)


def first(function: Callable[[], Result]) -> Result:
    """Call on rank 0 and give what it returns to every rank; it must be picklable.

    Raises:
        FirstRankFailed: on the other ranks, whatever it raised on rank 0, where that goes on its way.
    """
    if not connected():
        return function()
    said: list[Any] = [None, False]
    try:
        if distributed.get_rank() == 0:
            said = [function(), True]
    finally:
        distributed.broadcast_object_list(said, src=0, group=_hosts)
    result, done = said
    if not done:
        raise FirstRankFailed("rank 0 failed")
    return result
