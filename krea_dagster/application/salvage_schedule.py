"""When a request that was paid for and left behind is polled again. Pure.

This follows from its age alone, so that nothing has to be stored: a salvage takes the requests
that have reached one of ``AGES`` since the last salvage. A salvage that a person starts takes all.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from datetime import datetime, timedelta, timezone
from typing import Final

from krea_dagster.engine.record import Record

EVER: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)

#: A link lives for 24 hours from its task's end. A task that had not ended is polled again at one
#: and a half times its age, so before a link that has come meanwhile expires. This holds for two
#: days; what was not fetched by then is left to people. No pause is longer than four hours, so that
#: a link that could not be fetched is tried several times while it lives.
_GROWTH: Final = 1.5
_LEAST_PAUSE: Final = timedelta(minutes=5)
_MOST_PAUSE: Final = timedelta(hours=4)
LAST_AGE: Final = timedelta(hours=48)


def _ages() -> tuple[timedelta, ...]:
    ages = [timedelta(0)]
    while ages[-1] < LAST_AGE:
        pause = min(max(ages[-1] * (_GROWTH - 1), _LEAST_PAUSE), _MOST_PAUSE)
        ages.append(min(ages[-1] + pause, LAST_AGE))
    return tuple(ages)


#: The ages at which a request is polled.
AGES: Final = _ages()


def due(
    left: Iterable[Record], since: datetime, now: datetime, *, first: timedelta = timedelta(0)
) -> list[Record]:
    """Return the requests that have reached one of ``AGES`` after ``since``.

    Those younger than ``first`` are not due yet.
    """

    def polls(record: Record, at: datetime) -> int:
        age = at - paid_at(record)
        return bisect_right(AGES, age) if age >= first else 0

    return [record for record in left if polls(record, since) < polls(record, now)]


def past_last_age(left: Iterable[Record], since: datetime, now: datetime) -> list[Record]:
    """Return the requests that have reached ``LAST_AGE`` after ``since``."""
    return [one for one in left if since < paid_at(one) + LAST_AGE <= now]


def paid_at(record: Record) -> datetime:
    """Return when a request was submitted; the epoch if that is not known."""
    return record.submitted_at or record.sent_at or EVER
