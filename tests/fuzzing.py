"""Many damaged inputs through the real commands: in this process under a watchdog, and a sample as new processes."""

from __future__ import annotations

import contextlib
import io
import random
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from commands import command

SECONDS = 20.0
"""What a command may compute beyond its imports, in seconds of a processor: others may use the machine too."""
WALL_FACTOR = 8
"""How many times as long it may take by the clock."""


class TooLong(BaseException):
    """The watchdog's; no Exception, which the code under test might take for a failure of its own."""


class Outcome(NamedTuple):
    """How a command ended: `crash` is a traceback, or empty."""

    code: int
    out: str
    err: str
    crash: str = ""

    @property
    def is_refusal(self) -> bool:
        """Exit 2 and exactly one sentence that begins with "error: "."""
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        return self.code == 2 and len(errors) == 1 and not self.crash and "Traceback" not in self.err


@contextlib.contextmanager
def watched(seconds: float = SECONDS) -> Iterator[None]:
    """Raises TooLong in a block that takes longer."""

    def stop(signum: int, frame: Any) -> None:
        raise TooLong(f"longer than {seconds:g} s")

    timers = (
        (signal.SIGPROF, signal.ITIMER_PROF, seconds),
        (signal.SIGALRM, signal.ITIMER_REAL, seconds * WALL_FACTOR),
    )
    previous = [signal.signal(signum, stop) for signum, _, _ in timers]
    for _, timer, limit in timers:
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for (signum, timer, _), handler in zip(timers, previous, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(signum, handler)


def call(*arguments: str | Path, seconds: float = SECONDS) -> Outcome:
    """Run a command in this process, which has paid its imports."""
    from t6_lightning.__main__ import main

    out, err, crash = io.StringIO(), io.StringIO(), ""
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with watched(seconds):
                code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            code, crash = 1, traceback.format_exc()
    return Outcome(code, out.getvalue(), err.getvalue(), crash)


def call_anew(*arguments: str | Path, seconds: float = SECONDS + 60) -> Outcome:
    """Run a command in a new process, as a user would."""
    begin = time.monotonic()
    try:
        done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return Outcome(1, "", "", f"longer than {time.monotonic() - begin:.0f} s")
    return Outcome(done.returncode, done.stdout, done.stderr)


def flip_or_cut(data: bytes, rng: random.Random) -> bytes:
    """Bytes with one to three flipped bits, cut short, or with a run overwritten."""
    damaged = bytearray(data)
    kind = rng.choice(("flip", "cut", "overwrite")) if damaged else "cut"
    if kind == "flip":
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        damaged = damaged[: rng.randrange(len(damaged) + 1)]
    else:
        at, length = rng.randrange(len(damaged)), rng.choice((1, 8, 64))
        damaged[at : at + length] = rng.randbytes(len(damaged[at : at + length]))
    return bytes(damaged)


class Tally:
    """Counts how inputs were met, and fails with those that were met badly.

    Args:
        name: printed with the counts.
        marker: a file that code hidden in an input would make.
    """

    def __init__(self, name: str, marker: Path | None = None) -> None:
        self.name, self.marker = name, marker
        self.refused, self.unharmed, self.bad = 0, 0, list[str]()

    def add(self, case: str, outcome: Outcome, unharmed: Callable[[Outcome], bool]) -> None:
        """Count one: refused in a sentence, or `unharmed` (its result is the undamaged input's)."""
        if self.marker is not None and self.marker.exists():
            self.marker.unlink()
            self.bad.append(f"{case}: its code was run")
        elif outcome.is_refusal:
            self.refused += 1
        elif outcome.code == 0 and not outcome.crash and unharmed(outcome):
            self.unharmed += 1
        else:
            self.bad.append(f"{case}: exit {outcome.code}\n{outcome.crash or outcome.err[-1500:]}")
            print(f"met badly: {self.bad[-1]}", flush=True)

    def close(self) -> None:
        """Print the counts. Raises AssertionError where an input was met badly."""
        total = self.refused + self.unharmed + len(self.bad)
        print(
            f"\n{self.name}: {total} inputs, {self.refused} refused in one sentence, {self.unharmed} with the "
            f"undamaged result, {len(self.bad)} met badly"
        )
        assert not self.bad, "\n\n".join(self.bad[:10])


def sample(cases: Sequence[Any], n: int, rng: random.Random) -> list[Any]:
    """At most n of the cases."""
    return rng.sample(list(cases), min(n, len(cases)))
