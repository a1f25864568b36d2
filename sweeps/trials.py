"""One trial: one `python -m t6_lightning fit` process, whose output goes to a log.

A process each, although importing Lightning takes about ten seconds every time: a trial is then exactly the
command a person would type, runs out of memory alone, leaves no state to the next one, and Lightning can
restart it on several GPUs.
"""

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO

from t6_lightning.common.errors import BadInput

INTERRUPTED = 75  # exit code of `fit` after a signal: the same command goes on
ORPHAN_SECONDS = 120
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Signals:
    """SIGINT, SIGTERM and SIGHUP while a sweep runs: remembered, and passed on to the trial that is running."""

    def __init__(self) -> None:
        self.received = 0
        self.trial: subprocess.Popen[bytes] | None = None
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) != signal.SIG_IGN:  # as under nohup
                signal.signal(signum, self._receive)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        if self.trial is not None and self.trial.poll() is None:
            self.trial.send_signal(signum)


def run_trial(arguments: list[str], log: Path, lock: IO[str], signals: Signals) -> int:
    """Train and wait; returns the exit code of `fit`. The log is appended to: a retry keeps the cause."""
    command = [sys.executable, "-m", "t6_lightning", *arguments]
    with log.open("a") as output:
        print(f"$ {' '.join(command)}", file=output, flush=True)
        signals.trial = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Its own session, or Ctrl-C in a terminal would reach it twice: from the terminal and from here.
            start_new_session=True,
            # The trial keeps the sweep locked until it is gone, even when this process was killed before it.
            pass_fds=(lock.fileno(),),
            preexec_fn=_end_with_parent,
        )
    if signals.received:  # came in before there was a process to pass it on to
        signals.trial.send_signal(signals.received)
    code = signals.trial.wait()
    signals.trial = None
    return code


def last_words(log: Path) -> str:
    """The last line of a trial's log that is not empty: where `fit` says what was wrong."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ")


@contextlib.contextmanager
def locked(folder: Path, signals: Signals) -> Iterator[IO[str]]:
    """Hold the sweep on this machine: whoever holds it knows that no trial of it is running here.

    Waits for a trial that outlived its killed sweep (it saves a checkpoint and stops).
    Raises BadInput when another process runs the sweep.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as lock:
        deadline = time.monotonic() + ORPHAN_SECONDS
        while not _try_lock(lock):
            lock.seek(0)
            owner = lock.read().strip()
            if _is_alive(owner) or time.monotonic() > deadline or signals.received:
                raise BadInput(
                    f"sweep {folder.name!r} is being run by another process already (pid {owner})."
                )
            print("Waiting for the trial of a killed run to stop ...", file=sys.stderr)
            time.sleep(2)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield lock


def _try_lock(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:  # someone else's process
        return True
    return True


def _end_with_parent() -> None:
    """Between fork and exec: ask Linux to send the trial SIGTERM when the sweep dies, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
