"""What asks `fit` to stop: SIGTERM and SIGUSR1, and in training SIGINT. Signals are noted, and acted upon where every
rank can stop at the same place.

Light to import: the handlers are there before seconds of other imports begin.
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

ASKS_TO_STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Interrupted(BaseException):
    """A signal stops the run; no `Exception`, which others on the way might take for a failure of their own.

    Args:
        signum: the signal.
        step: of the checkpoint that was written for it; None before training began.
    """

    def __init__(self, signum: int, step: int | None = None) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum, self.step = signum, step


class Signals:
    """The signals that this process has received."""

    def __init__(self) -> None:
        self.noted = 0
        """The last one's number, 0 before the first."""
        self._raised_at_once = False

    def note(self, signum: int, frame: Any = None) -> None:
        """Handle a signal."""
        is_first, self.noted = not self.noted, signum
        if signum == signal.SIGINT and not is_first:
            raise KeyboardInterrupt  # asked twice: leave at once, the last checkpoint stands
        if is_first and self._raised_at_once:
            raise Interrupted(signum)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Note SIGTERM and SIGUSR1 instead of ending by them."""
        self.noted, self._raised_at_once = 0, False
        previous = {signum: signal.signal(signum, self.note) for signum in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    @contextmanager
    def raised_at_once(self) -> Iterator[None]:
        """For long work that may be left anywhere.

        Raises:
            Interrupted: where a signal comes, or now if one has come.
        """
        self._raised_at_once = True
        try:
            if self.noted:
                raise Interrupted(self.noted)
            yield
        finally:
            self._raised_at_once = False

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


signals = Signals()
