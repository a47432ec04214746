"""What went wrong in a run, for people and for their sensors: a text, and tags of the run.

A ``@dagster.run_failure_sensor`` reads them by ``failure_of``::

    @dg.run_failure_sensor
    def tell_us(context: dg.RunFailureSensorContext) -> None:
        if (failure := failure_of(context.dagster_run)) is not None:
            send(f"{failure.rows_missing} rows are missing: {failure.to_do}")

Rows that fail while the account goes on do not fail a run; it has the tags all the same, so that
a ``@dagster.run_status_sensor`` for SUCCESS can read them too.
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
from krea_dagster.models import credits_text

#: The tags of a run whose rows have not all got their image. The runs page filters by the first.
OUTCOME_TAG: Final = "krea/outcome"
ROWS_MISSING_TAG: Final = "krea/rows_missing"
AT_STAKE_TAG: Final = "krea/credits_at_stake"
STOPPED_TAG: Final = "krea/stopped"
TO_DO_TAG: Final = "krea/to_do"

#: The metadata of a failure that may pass by itself.
TRY_LATER: Final = "krea_try_later"

#: Longest text of a tag that is shown whole in the UI's dialogs.
_MOST_TEXT: Final = 250


@dataclass(frozen=True)
class KreaFailure:
    """What a run left undone.

    ``credits_at_stake`` are credits of purchases whose image is not there yet, or whose outcome
    is unknown, as exact text. ``stopped`` is the code by which the account ended the buying,
    None where it did not. ``to_do`` is one sentence.
    """

    run_id: str
    outcome: str
    rows_missing: int
    credits_at_stake: str
    stopped: str | None
    to_do: str


def failure_of(run: dg.DagsterRun) -> KreaFailure | None:
    """What a run left undone, from its tags; None where it has nothing to say.

    A run that fails before it has asked for anything, as by a wrong setting, has no tags: its
    failure's text says what to do.
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
    """The tags of a run; none where every row has its image."""
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
    """Errors of this package as Dagster's: their text says all.

    A retry helps only where what was away may be back.
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
        if redact.safe_cause(error) is None:  # Dagster would keep its text, and a URL in that
            raise dg.Failure(f"{type(error).__name__}: {redact.text(str(error))}") from None
        raise


def stop_failure(report: RunReport) -> dg.Failure:
    """A run that was stopped, as Dagster's failure: one sentence."""
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
            return "EvoLink takes nothing more for now", "wait until it does"
        case TryLater(code=policy.API_AWAY):
            return "EvoLink's API cannot be reached", "wait until it can"
        case TryLater():
            return "EvoLink gives no usable answer", "wait until it does"
        case RunStopped(code=policy.API_AWAY):
            return "EvoLink's API cannot be reached", "mend what the message says"
        case RunStopped(code=policy.TASKS_NOT_FOUND):
            return "the key is probably another account's", "set the right EVOLINK_API_KEY"
        case RunStopped(code=policy.PRICE_DOUBTED):
            return "a price cannot be believed", "run the command that the message names"
        case RunStopped():
            return (
                "the account stopped another run of this launch",
                "mend what its message says, wait five minutes",
            )
        case _:
            return "the key may not use this model", "ask for access or use another key"


def _to_do(report: RunReport) -> str:
    if report.stopped is not None:
        _, then = _what_and_then(report)
        return f"{then}, then launch these partitions again: only what is missing is bought"
    if report.caps_reached:
        return "raise the cap or wait for its next day, then launch these partitions again"
    if report.left:
        return "launch these partitions again: what is under way is taken up, not bought anew"
    return "see the rows of the check all_rows_delivered: they change, or retry_errors names them"
