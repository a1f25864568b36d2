"""What asks `fit` to stop: SIGINT, SIGTERM, SIGHUP and SIGUSR1, alike at every moment. They are noted, and acted upon
where every rank can stop at the same place.

Light to import: the handlers are there before seconds of other imports begin.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

ASKS_TO_STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
"""Where torchrun, Lightning's launcher and SLURM say who a process is, before any group exists."""
SECONDS_APART = 0.5
"""Of two SIGINTs: closer ones are one that the terminal and a launcher both passed on."""


class Interrupted(BaseException):
    """A signal stops the run; no `Exception`, which others on the way might take for a failure of their own.

    Args:
        signum: the signal.
        step: of the checkpoint that was written for it; None before training began, or with `at_once`.
        at_once: it was asked for twice, and nothing more is waited for.
    """

    def __init__(self, signum: int, step: int | None = None, at_once: bool = False) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum, self.step, self.at_once = signum, step, at_once


class Signals:
    """The signals that this process has received."""

    def __init__(self) -> None:
        self.noted = 0
        """The last one's number, 0 before the first."""
        self._raised_at_once = False
        self._first = 0.0

    def note(self, signum: int, frame: Any = None) -> None:
        """Handle a signal."""
        is_first, self.noted = not self.noted, signum
        now = time.monotonic()
        self._first = now if is_first else self._first
        if signum == signal.SIGHUP:
            _leave_terminal()
        if signum == signal.SIGINT and not is_first and now - self._first >= SECONDS_APART:
            raise Interrupted(signum, at_once=True)  # the last checkpoint stands
        if is_first and self._raised_at_once:
            raise Interrupted(signum)

    def handle(self) -> dict[int, Any]:
        """Note signals from now on, but those that this process was told to ignore (`nohup`).

        Returns:
            what handled each before, for `restore`.
        """
        taken = [signum for signum in ASKS_TO_STOP if signal.getsignal(signum) != signal.SIG_IGN]
        return {signum: signal.signal(signum, self.note) for signum in taken}

    @staticmethod
    def restore(previous: dict[int, Any]) -> None:
        """Undo `handle`."""
        for signum, handler in previous.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Note signals instead of ending by them."""
        self.noted, self._raised_at_once = 0, False
        previous = self.handle()
        try:
            yield
        finally:
            self.restore(previous)

    @contextmanager
    def raised_at_once(self) -> Iterator[None]:
        """For long work that may be left anywhere.

        Raises:
            Interrupted: where a signal comes, or now if one has come.
        """
        before, self._raised_at_once = self._raised_at_once, True
        try:
            if self.noted:
                raise Interrupted(self.noted)
            yield
        finally:
            self._raised_at_once = before

    def raised_where_alone(self) -> Any:
        """`raised_at_once` unless this is one of several ranks, which leave together once they have met."""
        is_rank = any(name in os.environ for name in RANK_VARIABLES)
        return nullcontext() if is_rank else self.raised_at_once()

    @contextmanager
    def heeded_in_c(self, leave: Callable[[int], object], patience: float) -> Iterator[None]:
        """For calls into libraries that may wait for ever: while they do, no handler of Python's is run.

        Args:
            leave: called with a signal, in another thread, where the call goes on `patience` seconds after it.
        """
        over = threading.Event()
        told, teller = socket.socketpair()
        teller.setblocking(False)

        def watch() -> None:
            signum = self.noted
            while not signum:
                numbers = told.recv(1)  # none once `teller` is closed
                if not numbers:
                    return
                signum = numbers[0] if numbers[0] in ASKS_TO_STOP else 0
            # Who asks at a terminal sits there.
            if not over.wait(min(patience, 1) if signum == signal.SIGINT else patience):
                leave(signum)

        previous = signal.set_wakeup_fd(teller.fileno(), warn_on_full_buffer=False)
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            signal.set_wakeup_fd(previous)
            teller.close()
            watcher.join()
            told.close()


def _leave_terminal() -> None:
    """Write to nowhere what would go to a terminal that was closed: every line would fail, the progress bar's first."""
    for descriptor in (1, 2):
        try:
            termios.tcgetattr(descriptor)
        except termios.error as error:  # of other files too
            if error.args[0] == errno.EIO:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


signals = Signals()
