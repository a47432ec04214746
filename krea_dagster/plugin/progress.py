"""Progress of a step: to an observer in the same process, and now and then to Dagster's log."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

from krea_dagster.engine.run.report import Progress, RunReport

_progress: Final[ContextVar[Callable[[Progress], None]]] = ContextVar("krea_progress")
_report: Final[ContextVar[Callable[[RunReport], None]]] = ContextVar("krea_report")

#: Seconds between two lines in Dagster's log: each is an event in its database.
_LOG_EVERY_S: Final = 30.0


class ThrottledLog:
    """Writes a line to Dagster's log every 30 seconds at most."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._next_s = time.monotonic() + _LOG_EVERY_S

    def info(self, line: Callable[[], str]) -> None:
        """Write a line if it is time for one."""
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _LOG_EVERY_S
            self._log.info(line())


@contextmanager
def observed(
    on_progress: Callable[[Progress], None], on_report: Callable[[RunReport], None]
) -> Iterator[None]:
    """Call these functions with the progress and the reports of runs in this process."""
    progress_token = _progress.set(on_progress)
    report_token = _report.set(on_report)
    try:
        yield
    finally:
        _progress.reset(progress_token)
        _report.reset(report_token)


def tell_progress(progress: Progress) -> None:
    """Pass the progress of a run to the observer, if there is one."""
    if (listener := _progress.get(None)) is not None:
        listener(progress)


def tell_report(report: RunReport) -> None:
    """Pass the report of a run to the observer, if there is one."""
    if (listener := _report.get(None)) is not None:
        listener(report)
