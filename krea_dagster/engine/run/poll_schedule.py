"""When to ask about a task, and about which together. Pure, given seconds of one clock.

Asking early costs a read that says "not yet"; asking late keeps a place in the window that
could hold the next task. So a task is asked about once the chance that it has ended is high
enough: a fair chance where places are wanted, a good one where they are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

import numpy as np

from krea_dagster.engine.run.latency import Floats, Latencies

#: Tasks per batch read: the server's limit.
BATCH: Final = 50

#: The chance at which a single task is asked about, where places are wanted and where not.
#: Some 2.4 and 1.1 reads an image follow from them.
_EAGER: Final = 0.38
_PATIENT: Final = 0.90
#: Ended tasks that a batch read should find: 0.25 and 0.07 reads an image.
_FINDS_EAGER: Final = 4.0
_FINDS_PATIENT: Final = 14.0
#: Where few are left, a batch read is worth it for this share of them.
_FINDS_SHARE: Final = 0.9
#: A batch read takes along what has this chance at least.
_ALONG: Final = 0.02
#: Until so many ended, one task of a kind is asked about early and again, to learn from it.
_LEARNED: Final = 4.0
_SCOUT_S: Final = 0.1
_SCOUT_GROWTH: Final = 1.5
#: A task that nobody called about is asked about when it has taken so long, and twice as long, ...
_QUIET_S: Final = 5.0
_QUIET_MEDIANS: Final = 4.0
_QUIET_GROWTH: Final = 2.0
#: Seconds between two questions about one task, however often it is called about.
_AGAIN_S: Final = 2.0
#: The shortest and the longest pause between two looks at the chances.
_PAUSE_LEAST_S: Final = 0.02
_PAUSE_MOST_S: Final = 1.0


@dataclass(frozen=True)
class Awaited:
    """A task that is waited for: submitted at ``since_s``, not ended at the age ``not_yet_s``."""

    quality: str
    since_s: float
    not_yet_s: float = 0.0


def scout_due_s(task: Awaited) -> float:
    """When to ask about the one task of a kind that shows how long its kind takes."""
    return task.since_s + max(_SCOUT_S, task.not_yet_s * _SCOUT_GROWTH)


def sweep_due_s(latencies: Latencies, task: Awaited) -> float:
    """When to ask about a task that should have been called about, and was not."""
    quiet_s = _QUIET_S + _QUIET_MEDIANS * latencies.of(task.quality).median_s
    return task.since_s + max(quiet_s, _QUIET_GROWTH * task.not_yet_s)


def worth_asking(latencies: Latencies, quality: str, age_s: float, *, called: bool | None) -> bool:
    """Whether a task of this age has probably ended, for a run that waits for none.

    ``called`` is whether it was called about, None where nobody will call about it.
    """
    if called is None:
        return bool(latencies.of(quality).done_since(0.0, age_s) >= _PATIENT)
    return called or age_s >= sweep_due_s(latencies, Awaited(quality, 0.0))


class Hint(Enum):
    """Why a task whose callback is waited for is asked about."""

    CALLED = "called"
    SWEPT = "swept"


def hint(
    latencies: Latencies, task: Awaited, *, calls: int, seen: int, asked_s: float, now_s: float
) -> Hint | None:
    """Whether to ask now about a task that was called about ``calls`` times, and why.

    ``seen`` of the calls have been followed by a question before, the last at ``asked_s``. Each
    rise is worth one question, and no more: a call may be early, late, doubled or forged.
    """
    if calls > seen and now_s - asked_s >= _AGAIN_S:
        return Hint.CALLED
    return Hint.SWEPT if now_s >= sweep_due_s(latencies, task) else None


def is_learned(latencies: Latencies, quality: str) -> bool:
    """Whether enough of a kind have ended to know how long they take."""
    return latencies.of(quality).seen >= _LEARNED


def chances(latencies: Latencies, tasks: Sequence[Awaited], now_s: float) -> Floats:
    """For each task, the chance that it has ended by now."""
    found = np.zeros(len(tasks))
    for quality in {task.quality for task in tasks}:
        which = [at for at, task in enumerate(tasks) if task.quality == quality]
        not_yet_s = np.array([tasks[at].not_yet_s for at in which])
        age_s = now_s - np.array([tasks[at].since_s for at in which])
        found[which] = latencies.of(quality).done_since(not_yet_s, age_s)
    return found


def to_read(ended: Floats, *, pressed: bool, batch: bool) -> list[int]:
    """Return which tasks to read now, by the chances that they have ended; in a ``batch`` together.

    ``pressed``: places in the window are wanted.
    """
    if batch:
        return _together(ended, pressed=pressed)
    return [int(at) for at in np.flatnonzero(ended >= (_EAGER if pressed else _PATIENT))]


def _together(ended: Floats, *, pressed: bool) -> list[int]:
    """Return the tasks of the next batch, the likeliest first; none where it would find few."""
    finds = _FINDS_EAGER if pressed else _FINDS_PATIENT
    if ended.sum() < min(finds, _FINDS_SHARE * len(ended)):
        return []
    order = np.argsort(-ended, kind="stable")[:BATCH]
    return [int(at) for at in order if ended[at] > _ALONG]


def pause_s(latencies: Latencies, tasks: Sequence[Awaited], now_s: float) -> float:
    """Return how long to wait before the chances are worth another look.

    A fiftieth of what the quickest of these tasks takes, or has taken already.
    """
    shortest_s = min(
        (max(latencies.of(task.quality).median_s, now_s - task.since_s) for task in tasks),
        default=2.0,
    )
    return min(_PAUSE_MOST_S, max(_PAUSE_LEAST_S, shortest_s / 50.0))
