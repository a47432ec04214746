"""Failures of runs, as texts for people and as tags for sensors.

Rows that fail do not fail a run unless the account stops it. The run has the tags anyway, so that a
``@dagster.run_status_sensor`` for SUCCESS can read them too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import dagster as dg

from krea_dagster import redact
from krea_dagster.engine import policy
from krea_dagster.engine.run.report import RunReport
from krea_dagster.errors import (
    JournalUnavailable,
    KeyRejected,
    KreaError,
    OutOfCredits,
    RunStopped,
    StorageUnavailable,
    TryLater,
)
from krea_dagster.file_systems import error_of_client
from krea_dagster.models import credits_text

#: The tags of a run with missing images. The runs page can filter by the first.
OUTCOME_TAG: Final = "krea/outcome"
ROWS_MISSING_TAG: Final = "krea/rows_missing"
AT_STAKE_TAG: Final = "krea/credits_at_stake"
STOPPED_TAG: Final = "krea/stopped"
TO_DO_TAG: Final = "krea/to_do"

#: The metadata of a failure that may be temporary.
TRY_LATER: Final = "krea_try_later"

#: Maximum length of a tag that the UI's dialogs show completely.
_MOST_TEXT: Final = 250


@dataclass(frozen=True)
class KreaFailure:
    """The outcome of a run whose images are not all delivered.

    Attributes:
        run_id: The run.
        outcome: ``stopped`` or ``rows_missing``.
        rows_missing: Number of rows without an image.
        credits_at_stake: Credits of purchases whose image is not delivered yet or whose outcome is
            unknown, as exact text.
        stopped: The code with which the account stopped the run, or None.
        to_do: What to do, in one sentence.
    """

    run_id: str
    outcome: str
    rows_missing: int
    credits_at_stake: str
    stopped: str | None
    to_do: str


def failure_of(run: dg.DagsterRun) -> KreaFailure | None:
    """Read the failure of a run from its tags.

    Args:
        run: The run.

    Returns:
        The failure; None if all images were delivered. A run that fails before it requests
        anything, as with a wrong setting, has no tags either: its error message says what to do.

    Example::

        @dg.run_failure_sensor
        def notify(context: dg.RunFailureSensorContext) -> None:
            if (failure := failure_of(context.dagster_run)) is not None:
                send(f"{failure.rows_missing} rows are missing: {failure.to_do}")
    """
    if OUTCOME_TAG not in run.tags:
        return None
    return KreaFailure(
        run_id=run.run_id,
        outcome=run.tags[OUTCOME_TAG],
        rows_missing=int(run.tags.get(ROWS_MISSING_TAG, "0")),
        credits_at_stake=run.tags.get(AT_STAKE_TAG, "0"),
        stopped=run.tags.get(STOPPED_TAG),
        to_do=run.tags.get(TO_DO_TAG, ""),
    )


def failure_tags(report: RunReport, rows_missing: int) -> dict[str, str]:
    """Return the tags of a run; empty if every row has its image."""
    if not rows_missing and report.stopped is None:
        return {}
    tags = {
        OUTCOME_TAG: "stopped" if report.stopped else "rows_missing",
        ROWS_MISSING_TAG: str(rows_missing),
        AT_STAKE_TAG: credits_text(report.at_stake_units),
        TO_DO_TAG: _to_do(report)[:_MOST_TEXT],
    }
    if report.stopped is not None:
        tags[STOPPED_TAG] = report.stopped.code or type(report.stopped).__name__
    return tags


@contextmanager
def as_failure() -> Iterator[None]:
    """Raise errors of this package as Dagster's Failure with their text.

    A retry is allowed only if something was unavailable.
    """
    try:
        yield
    except (JournalUnavailable, StorageUnavailable) as error:
        raise dg.Failure(
            str(error), metadata={TRY_LATER: True}, allow_retries=True
        ) from redact.safe_cause(error)
    except KreaError as error:
        raise dg.Failure(str(error), allow_retries=False) from redact.safe_cause(error)
    except Exception as error:
        if (said := error_of_client(error)) is not None:
            later = isinstance(said, StorageUnavailable)
            metadata = {TRY_LATER: True} if later else None
            raise dg.Failure(str(said), metadata=metadata, allow_retries=later) from None
        if redact.safe_cause(error) is None:  # Dagster would keep its text, and a URL in that
            raise dg.Failure(f"{type(error).__name__}: {redact.text(str(error))}") from None
        raise


def stop_failure(report: RunReport) -> dg.Failure:
    """Return the failure of a run that was stopped: what happened, and what to do."""
    what, then = _what_and_then(report)
    later = isinstance(report.stopped, TryLater)
    return dg.Failure(
        f"Buying stopped, {what} ({report.stopped}): everything already paid for was "
        f"{'kept' if later else 'finished'}, the other rows are deferred; {then} and run again.",
        metadata={TRY_LATER: True} if later else None,
        allow_retries=later,
    )


def _what_and_then(report: RunReport) -> tuple[str, str]:
    match report.stopped:
        case KeyRejected():
            return "EvoLink rejects the key", "set a valid EVOLINK_API_KEY"
        case OutOfCredits():
            return "the account or its key has no credits left", "top up"
        case TryLater(code=policy.RATE_LIMITED):
            return "EvoLink accepts no more requests for now", "wait until it does"
        case TryLater(code=policy.API_AWAY):
            return "EvoLink's API cannot be reached", "wait until it can"
        case TryLater():
            return "EvoLink's responses are unusable", "wait until it has recovered"
        case RunStopped(code=policy.API_AWAY):
            return "EvoLink's API cannot be reached", "fix what the message says"
        case RunStopped(code=policy.TASKS_NOT_FOUND):
            return "the key is probably another account's", "set the right EVOLINK_API_KEY"
        case RunStopped(code=policy.PRICE_DOUBTED):
            return "a price is implausible", "run the command that the message names"
        case RunStopped():
            return (
                "the account stopped another run of this launch",
                "fix what its message says, wait five minutes",
            )
        case _:
            return "the key may not use this model", "ask for access or use another key"


def _to_do(report: RunReport) -> str:
    if report.stopped is not None:
        _, then = _what_and_then(report)
        return f"{then}, then launch these partitions again: only missing images are bought"
    if report.caps_reached:
        return "raise the cap or wait for its next day, then launch these partitions again"
    if report.left:
        return "launch these partitions again: tasks under way are resumed, not bought again"
    return "see the check all_rows_delivered: change its rows, or retry them with retry_errors"
