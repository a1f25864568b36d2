"""How far tokenizing is: a bar on a terminal, otherwise a line now and then."""

import logging
import sys
import time
from types import TracebackType

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


class TokenizingProgress:
    """Counts sources, documents and tokens; used as a context manager."""

    def __init__(self, sources: int):
        self.sources, self.done = sources, 0
        self.documents = self.tokens = 0
        self._began = self._last_line = time.monotonic()
        self._bar = None

    def __enter__(self) -> "TokenizingProgress":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("tokenizing", total=self.sources)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is None:
            log.info("Tokenized %s", self._counts())

    def add(self, source: str, documents: int, tokens: int) -> None:
        self.documents += documents
        self.tokens += tokens
        if self._bar is not None:
            self._bar.update(self._task, description=f"tokenizing {source}: {self.tokens / 1e6:.1f} M tokens")
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            log.info("Tokenizing %s (%d of %d): %s", source, self.done + 1, self.sources, self._counts())

    def finish_source(self) -> None:
        self.done += 1
        if self._bar is not None:
            self._bar.advance(self._task)

    def _counts(self) -> str:
        seconds = max(time.monotonic() - self._began, 1e-9)
        return (
            f"{self.documents:,} documents, {self.tokens:,} tokens in {seconds:.1f} s "
            f"({self.tokens / seconds / 1e6:.2f} M tokens/s)."
        )
