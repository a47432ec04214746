"""Says what a run does, and never stays silent for long."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Final, Protocol

from krea_dagster.application.run_text import duration_text, progress_line

if TYPE_CHECKING:
    from krea_dagster.engine.run.report import Progress

_logger = logging.getLogger(__name__)


class Listener(Protocol):
    """Hears what a run does."""

    def say(self, line: str) -> None:
        """Show a line."""

    def doing(self, what: str) -> None:
        """Note what the run does from now on, such as ``reading the prompt table``."""

    def progress(self, progress: Progress) -> None:
        """Note how far the run is."""


class _Silent:
    def say(self, line: str) -> None: ...

    def doing(self, what: str) -> None: ...

    def progress(self, progress: Progress) -> None: ...


#: Hears everything and shows nothing.
SILENT: Final[Listener] = _Silent()


class RunLog:
    """Writes lines at once, and what the run is doing whenever no line came for ``every_s``.

    Its thread writes the latter: a run calls ``progress`` thousands of times a second, and a phase
    may take minutes in which it calls nothing. ``also`` hears the same, except the repetitions.
    Use it as a context manager.
    """

    def __init__(
        self,
        write: Callable[[str], object],
        every_s: float,
        *,
        also: Listener | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write = write
        self._every_s = every_s
        self._also = also
        self._monotonic = monotonic
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="krea-run-log", daemon=True)
        self._began_s = monotonic()
        self._next_s = self._began_s + every_s
        self._doing = ""
        self._bought_since_s: float | None = None
        #: The last progress; None if nothing was bought yet.
        self.last: Progress | None = None

    def say(self, line: str) -> None:
        """Write a line."""
        self._next_s = self._monotonic() + self._every_s
        self._write(line)
        if self._also is not None:
            self._also.say(line)

    def doing(self, what: str) -> None:
        """Note what the run does from now on, instead of buying."""
        self._doing = what
        if self._also is not None:
            self._also.doing(what)

    def progress(self, progress: Progress) -> None:
        """Note how far buying is."""
        if self._bought_since_s is None:
            self._bought_since_s = self._monotonic()
        self.last, self._doing = progress, ""
        if self._also is not None:
            self._also.progress(progress)

    def line(self) -> str | None:
        """Return what the run does now; None if it has not said yet."""
        now_s = self._monotonic()
        if self._doing:
            return f"{self._doing}, {duration_text(now_s - self._began_s)} so far"
        if self.last is None or self._bought_since_s is None:
            return None
        return progress_line(self.last, now_s - self._bought_since_s)

    def __enter__(self) -> RunLog:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _repeat(self) -> None:
        while not self._ended.wait(max(0.0, self._next_s - self._monotonic())):
            if self._monotonic() < self._next_s:  # a line was written meanwhile
                continue
            self._next_s = self._monotonic() + self._every_s
            if (line := self.line()) is not None:
                try:
                    self._write(line)
                except Exception:  # a log that cannot be written ends no purchase
                    _logger.exception("a line of the run's log could not be written")
