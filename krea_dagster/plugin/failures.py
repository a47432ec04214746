"""Errors of this package as Dagster's failures, and the words for a run that was stopped."""

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg

from krea_dagster.engine.runner import RunReport
from krea_dagster.errors import KeyRejected, KreaError, OutOfCredits, RunStopped


@contextmanager
def as_failure() -> Iterator[None]:
    """Errors of this package as Dagster's: their text says all, and a retry would not help."""
    try:
        yield
    except KreaError as error:
        raise dg.Failure(str(error), allow_retries=False) from error


def stop_message(report: RunReport) -> str:
    """One sentence for a run that the account stopped."""
    match report.stopped:
        case KeyRejected():
            what, then = "EvoLink rejects the key", "set a valid EVOLINK_API_KEY"
        case OutOfCredits():
            what, then = "the account or its key has no credits left", "top up"
        case RunStopped(code="no_usable_answer"):
            what, then = "EvoLink gives no usable answer", "wait until it does"
        case RunStopped():
            what, then = "the account stopped another run of this launch", "see its message"
        case _:
            what, then = "the key may not use this model", "ask for access or use another key"
    return (
        f"Buying stopped, {what} ({report.stopped}): everything already paid for was finished, "
        f"the other rows are deferred; {then} and run again."
    )
