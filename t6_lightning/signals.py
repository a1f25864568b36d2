"""What asks `fit` to stop: SIGTERM and SIGUSR1, and in training SIGINT. Signals are noted, and acted upon where every
rank can stop at the same place.

Light to import: the handlers are there before seconds of other imports begin.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


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


signals = Signals()
