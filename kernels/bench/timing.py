"""Timing on the clock or the device: every function in turn, so that a slow moment hits them all."""

import time
from collections.abc import Callable, Sequence

import torch

MIN_REPEATS = 5
MAX_REPEATS = 200
# Written between timed calls on a GPU: larger than any L2 cache, so that every call starts from memory.
FLUSH_BYTES = 256 * 2**20
HEAD_START_CYCLES = 2_000_000  # about a millisecond
# Of one graph.
REPLAYS = 20


def time_in_turn(
    functions: Sequence[Callable[[], object]], device: torch.device, seconds: float
) -> list[list[float]]:
    """Seconds of each call of each function, after one call to warm up.

    Rounds go on for about `seconds` per function, at least MIN_REPEATS and at most MAX_REPEATS of them.
    """
    for function in functions:
        function()
    time_once = _cuda_timer(device) if device.type == "cuda" else _cpu_time_once
    times: list[list[float]] = [[] for _ in functions]
    began = time.perf_counter()
    for done in range(MAX_REPEATS):
        if done >= MIN_REPEATS and time.perf_counter() - began > seconds * len(functions):
            break
        for function, mine in zip(functions, times, strict=True):
            mine.append(time_once(function))
    return times


def graph_times(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Seconds of one call, from each replay of one graph of all of them."""
    with torch.no_grad():
        calls[0]()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        return [event_seconds(graph.replay) / len(calls) for _ in range(REPLAYS)]


def event_seconds(run: Callable[[], object]) -> float:
    """Of the device, which waits while the host starts `run`: what lies between the events is the device's time."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(HEAD_START_CYCLES)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def copy_bandwidth(device: torch.device, seconds: float = 0.5) -> float:
    """Bytes per second, read plus written, of copying a buffer far larger than any cache."""
    n_bytes = 2**30 if device.type == "cuda" else 2**27
    source = torch.ones(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    [times] = time_in_turn([lambda: target.copy_(source)], device, seconds)
    return 2 * n_bytes / median(times)


def median(values: Sequence[float]) -> float:
    return quantile(values, 0.5)


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between the sorted values."""
    return float(torch.tensor(list(values), dtype=torch.float64).quantile(q))


def _cpu_time_once(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _cuda_timer(device: torch.device) -> Callable[[Callable[[], object]], float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def time_once(function: Callable[[], object]) -> float:
        flush.zero_()
        return event_seconds(function)

    return time_once
