"""What a step says: to Dagster's log, and to a listener in the same process."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

import dagster as dg

from krea_dagster.application.run_log import Listener, RunLog
from krea_dagster.engine.run.report import RunReport

_listener: Final[ContextVar[Listener]] = ContextVar("krea_listener")
_report: Final[ContextVar[Callable[[RunReport], None]]] = ContextVar("krea_report")

#: Seconds between two lines in Dagster's log: each is an event in its database.
LOG_EVERY_S: Final = 30.0


def step_log(log: dg.DagsterLogManager, doing: str) -> RunLog:
    """Return the log of a step, which says at least every 30 seconds what the step is ``doing``."""
    said = RunLog(log.info, LOG_EVERY_S, also=_listener.get(None))
    said.doing(doing)
    return said


@contextmanager
def observed(listener: Listener, on_report: Callable[[RunReport], None]) -> Iterator[None]:
    """Let the steps of runs in this process tell these what they do, and how runs ended."""
    listener_token = _listener.set(listener)
    report_token = _report.set(on_report)
    try:
        yield
    finally:
        _listener.reset(listener_token)
        _report.reset(report_token)


def tell_report(report: RunReport) -> None:
    """Pass the report of a run to the observer, if there is one."""
    if (hears := _report.get(None)) is not None:
        hears(report)
