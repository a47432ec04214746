"""Lets whoever runs Dagster in its own process watch the engine: the command's progress bar."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

from krea_dagster.engine.run.report import Progress, RunReport

_progress: Final[ContextVar[Callable[[Progress], None]]] = ContextVar("krea_progress")
_report: Final[ContextVar[Callable[[RunReport], None]]] = ContextVar("krea_report")


@contextmanager
def observed(
    on_progress: Callable[[Progress], None], on_report: Callable[[RunReport], None]
) -> Iterator[None]:
    """Within it, runs in this process tell of their progress and of their end."""
    progress_token = _progress.set(on_progress)
    report_token = _report.set(on_report)
    try:
        yield
    finally:
        _progress.reset(progress_token)
        _report.reset(report_token)


def tell_progress(progress: Progress) -> None:
    """Tell the observer, if there is one, how far the run is."""
    if (listener := _progress.get(None)) is not None:
        listener(progress)


def tell_report(report: RunReport) -> None:
    """Tell the observer, if there is one, how the run ended."""
    if (listener := _report.get(None)) is not None:
        listener(report)
