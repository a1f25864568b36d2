"""Which launch of the decode kernel is the fastest: `python -m kernels.bench decode --launches`.

`kernels.decode.launch.choose_launch` follows what this finds on an H100; on another GPU it says what that choice costs.
Every launch of a case reads the same caches, one behind the other, as in `kernels.decode.bench_cases`. Compiling takes
most of the time, so that other processes do it first.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import product
from multiprocessing import get_context
from typing import Any

import torch

from kernels.bench.report import environment
from kernels.bench.timing import copy_bandwidth, graph_times, median
from kernels.decode.bench_cases import Case, tpa_calls
from kernels.decode.bench_table import where
from kernels.decode.launch import Launch, Work, choose_launch, leaves_room

HELP = "all launches of the Triton kernel beside the one that it takes (needs a GPU)"

CACHE_BYTES = 2.7e8
# Tokens while a launch is compiled: no number of them is a constant of the kernel.
FEW_TOKENS = 128
# Of a multiprocessor, on their way: with less it waits; a tile with more of them does not fit its registers.
FEWEST_BYTES, MOST_TILE_BYTES = 90_000, 100_000
MOST_WORKERS = 15

# Heads, head_dim, rank, and what else differs.
Kind = tuple[int, int, int, dict[str, Any]]


def cases() -> list[Case]:
    """One query token over heads, widths and ranks; several; rows that are made; pages."""
    plain: list[Kind] = [(H, D, R, {}) for H in (16, 32, 48) for D in (32, 64, 128) for R in (1, 2, 3, 4)]
    plain += [(78, D, R, {}) for D in (64, 128) for R in (1, 2)]
    plain += [(16, 64, 8, {}), (32, 64, 8, {}), (16, 256, 1, {}), (32, 256, 1, {})]
    several: list[Kind] = [
        (H, 64, R, {"queries": T})
        for H, T in ((16, 4), (16, 8), (32, 2), (32, 4), (32, 8), (48, 2), (48, 4), (78, 2), (78, 4))
        for R in (1, 2, 4)
    ]
    several += [(H, 128, R, {"queries": 4}) for H in (32, 48) for R in (1, 2)]
    made: list[Kind] = [
        (H, 64, R, how)
        for how in ({"further": 8}, {"shared_b": True})
        for H in (16, 32, 48)
        for R in (1, 2, 4)
    ]
    paged: list[Kind] = [
        (H, 64, R, {"pages": 64, "lengths": "ragged"}) for H, R in ((16, 1), (32, 1), (32, 2), (48, 2))
    ]
    listed = [Case(H, D, R, 16, FEW_TOKENS, **how) for H, D, R, how in (*plain, *several, *made, *paged)]
    return [replace(case, tokens=int(CACHE_BYTES / case.n_bytes) * FEW_TOKENS) for case in listed]


def candidates(work: Work) -> list[Launch]:
    """What `choose_launch` takes, and then all others that fit and have enough on their way."""
    chosen = choose_launch(work)
    found = [chosen]
    warps = (4, 8) if work.columns >= 128 else (4, 2) if work.heads == 16 else (4,)
    for tile, n_warps, stages, programs in product((128, 64, 32, 16), warps, (2, 3, 4), (1, 2, 3)):
        tile_bytes = tile * work.token_bytes(work.widths)
        enough = programs * stages * tile_bytes >= FEWEST_BYTES and tile_bytes <= MOST_TILE_BYTES
        if enough and work.page % tile == 0 and work.fits(tile, n_warps, stages, programs):
            launch = Launch(tile, n_warps, stages, programs, work.heads_first)
            found.append(replace(launch, overlap=not leaves_room(work, launch)))
    return list(dict.fromkeys(found))


def run(
    device: torch.device,
    *,
    chosen: Sequence[Case] | None = None,
    save: Callable[[dict[str, Any]], object] | None = None,
) -> dict[str, Any]:
    """Seconds of every launch of every case, the one that `choose_launch` takes first; a failed one says why.

    `save` takes the result after each case; its "complete" is False until the last one.
    """
    listed = cases() if chosen is None else list(chosen)
    launches = [candidates(_work(case, device)) for case in listed]
    _compile([(case, launch) for case, mine in zip(listed, launches, strict=True) for launch in mine], device)
    from kernels.decode import triton as kernel

    save = save or (lambda result: None)
    result: dict[str, Any] = {
        "operation": "decode launches",
        "dtype": "bfloat16",
        "copy_bytes_per_second": copy_bandwidth(device),
        **environment(device),
        "triton": kernel.triton.__version__,
        "complete": False,
        "rows": [],
    }
    for case, mine in zip(listed, launches, strict=True):
        torch.manual_seed(0)
        calls = tpa_calls(case, device)
        timed = [{**asdict(launch), **_seconds(calls, launch)} for launch in mine]
        known = [launch for launch in timed if "median_s" in launch]
        row: dict[str, Any] = {**asdict(case), "cache_bytes": case.n_bytes, "launches": timed}
        row["best"] = min(known, key=lambda launch: launch["median_s"]) if known else None
        result["rows"].append(row)
        save(result)
        print(_line(row), file=sys.stderr, flush=True)
        del calls
    result["complete"] = True
    return result


def table(result: dict[str, Any]) -> str:
    """Markdown, one row a case: the launch that is taken and the fastest."""
    return "\n".join(
        [
            f"{where(result)}; a launch: tile, warps, stages, programs",
            "",
            "| h, d_h, R | T | layout | launches | taken | µs | fastest | µs | taken over fastest |",
            "| --- " * 9 + "|",
            *map(_line, result["rows"]),
        ]
    )


def _line(row: dict[str, Any]) -> str:
    taken, best = row["launches"][0], row["best"]
    how = Case(**{name: row[name] for name in Case.__dataclass_fields__}).how
    start = f"| {row['heads']}, {row['head_dim']}, {row['rank']} | {row['queries']} | {how} | {len(row['launches'])} |"
    if best is None or "median_s" not in taken:
        return f"{start} {_said(taken)} | {taken.get('why_not', '')} | | | |"
    ratio = taken["median_s"] / best["median_s"]
    return (
        f"{start} {_said(taken)} | {1e6 * taken['median_s']:.1f} | {_said(best)} | {1e6 * best['median_s']:.1f} |"
        f" {ratio:.2f}× |"
    )


def _said(launch: dict[str, Any]) -> str:
    return ", ".join(str(launch[name]) for name in ("tile", "warps", "stages", "programs"))


@contextmanager
def _launched(pick: Callable[[Work], Launch]) -> Iterator[None]:
    """The kernel takes what `pick` says."""
    from kernels.decode import triton as kernel

    kernel.choose_launch = pick
    try:
        yield
    finally:
        kernel.choose_launch = choose_launch


class _AskedError(Exception):
    """Of the kernel for its launch, before it is compiled."""


def _work(case: Case, device: torch.device) -> Work:
    """What the kernel asks a launch for."""

    def pick(work: Work) -> Launch:
        raise _AskedError(work)

    with _launched(pick):
        try:
            tpa_calls(replace(case, tokens=FEW_TOKENS), device)[0]()
        except _AskedError as asked:
            return asked.args[0]
    raise AssertionError(f"no launch was asked for: {case}")


def _seconds(calls: Sequence[Callable[[], object]], launch: Launch) -> dict[str, Any]:
    with _launched(lambda work: launch):
        try:
            return {"median_s": median(graph_times(calls))}
        except Exception as error:  # Triton has several for what does not fit
            return {"why_not": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def _compile(work: Sequence[tuple[Case, Launch]], device: torch.device) -> None:
    """Into Triton's cache, which all processes share."""
    workers = min(MOST_WORKERS, len(work), (os.cpu_count() or 1) - 1)
    if device.type == "cpu" or workers < 2:
        return
    print(f"compiling {len(work)} launches in {workers} processes", file=sys.stderr, flush=True)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(_compile_one, *zip(*work, strict=True), [str(device)] * len(work)))


def _compile_one(case: Case, launch: Launch, device: str) -> None:
    calls = tpa_calls(replace(case, tokens=FEW_TOKENS), torch.device(device))
    with _launched(lambda work: launch):
        try:
            calls[0]()
        except Exception:
            return  # it is timed, and says why there
