"""The polling schedule: when to read a task, and which tasks to read in one batch.

Pure, given seconds of one clock. An early read finds the task unfinished; a late one keeps a place
in the window that the next task could have. So a task is read once the chance that it has ended is
high enough: a fair chance if places are wanted, a good one if not.
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

#: The chance at which a single task is read, if places are wanted and if not. They lead to about
#: 2.4 and 1.1 reads an image.
_EAGER: Final = 0.38
_PATIENT: Final = 0.90
#: Ended tasks that a batch read should find: 0.25 and 0.07 reads an image.
_FINDS_EAGER: Final = 4.0
_FINDS_PATIENT: Final = 14.0
#: If few tasks are left, a batch read is worth it for this share of them.
_FINDS_SHARE: Final = 0.9
#: The least chance of a task that is added to a batch read.
_BATCH_MIN_CHANCE: Final = 0.02
#: Until this many tasks of a kind have ended, one of them is read early and again, to learn from.
_LEARNED: Final = 4.0
_SCOUT_S: Final = 0.1
_SCOUT_GROWTH: Final = 1.5
#: A task without a callback is read at this age, and then at each doubling of its age.
_QUIET_S: Final = 5.0
_QUIET_MEDIANS: Final = 4.0
_QUIET_GROWTH: Final = 2.0
#: Seconds between two reads of one task, however many callbacks come.
_AGAIN_S: Final = 2.0
#: The shortest and the longest pause before the chances are computed again.
_PAUSE_MIN_S: Final = 0.02
_PAUSE_MAX_S: Final = 1.0


class PollReason(Enum):
    """Why a task is read whose callback is expected."""

    CALLBACK = "callback"
    TIMEOUT = "timeout"


@dataclass(frozen=True)
class PendingTask:
    """A task submitted at ``since_s``, and last seen unfinished at the age ``not_yet_s``."""

    quality: str
    since_s: float
    not_yet_s: float = 0.0


def scout_due_s(task: PendingTask) -> float:
    """Return when to read the one task that shows how long its kind takes."""
    return task.since_s + max(_SCOUT_S, task.not_yet_s * _SCOUT_GROWTH)


def timeout_due_s(latencies: Latencies, task: PendingTask) -> float:
    """Return when to read a task whose expected callback has not come."""
    quiet_s = _QUIET_S + _QUIET_MEDIANS * latencies.of(task.quality).median_s
    return task.since_s + max(quiet_s, _QUIET_GROWTH * task.not_yet_s)


def worth_polling(latencies: Latencies, quality: str, age_s: float, *, called: bool | None) -> bool:
    """Whether a task of this age has probably ended, for a run that does not wait.

    ``called`` is whether its callback has come, None if no callback is expected.
    """
    if called is None:
        return bool(latencies.of(quality).done_since(0.0, age_s) >= _PATIENT)
    return called or age_s >= timeout_due_s(latencies, PendingTask(quality, 0.0))


def poll_reason(
    latencies: Latencies,
    task: PendingTask,
    *,
    calls: int,
    seen: int,
    read_at_s: float,
    now_s: float,
) -> PollReason | None:
    """Return why to read a task now for which ``calls`` callbacks have come, None if not now.

    ``seen`` of them were followed by a read, the last at ``read_at_s``. Each rise is worth only one
    read: a callback may be early, late, doubled or forged.
    """
    if calls > seen and now_s - read_at_s >= _AGAIN_S:
        return PollReason.CALLBACK
    return PollReason.TIMEOUT if now_s >= timeout_due_s(latencies, task) else None


def is_learned(latencies: Latencies, quality: str) -> bool:
    """Whether enough tasks of a kind have ended to know how long they take."""
    return latencies.of(quality).seen >= _LEARNED


def chances(latencies: Latencies, tasks: Sequence[PendingTask], now_s: float) -> Floats:
    """Return for each task the chance that it has ended by now."""
    found = np.zeros(len(tasks))
    for quality in {task.quality for task in tasks}:
        which = [at for at, task in enumerate(tasks) if task.quality == quality]
        not_yet_s = np.array([tasks[at].not_yet_s for at in which])
        age_s = now_s - np.array([tasks[at].since_s for at in which])
        found[which] = latencies.of(quality).done_since(not_yet_s, age_s)
    return found


def select_reads(ended: Floats, *, pressed: bool, batch: bool) -> list[int]:
    """Return which tasks to read now, by the chances that they have ended.

    ``pressed``: places in the window are wanted. ``batch``: they are read in one call.
    """
    if batch:
        return _select_batch(ended, pressed=pressed)
    return [int(at) for at in np.flatnonzero(ended >= (_EAGER if pressed else _PATIENT))]


def _select_batch(ended: Floats, *, pressed: bool) -> list[int]:
    """Return the tasks of the next batch, the likeliest first; none if it would find few."""
    finds = _FINDS_EAGER if pressed else _FINDS_PATIENT
    if ended.sum() < min(finds, _FINDS_SHARE * len(ended)):
        return []
    order = np.argsort(-ended, kind="stable")[:BATCH]
    return [int(at) for at in order if ended[at] > _BATCH_MIN_CHANCE]


def pause_s(latencies: Latencies, tasks: Sequence[PendingTask], now_s: float) -> float:
    """Return how long to wait before the chances are computed again.

    A fiftieth of what the quickest of these tasks takes, or has taken already.
    """
    shortest_s = min(
        (max(latencies.of(task.quality).median_s, now_s - task.since_s) for task in tasks),
        default=2.0,
    )
    return min(_PAUSE_MAX_S, max(_PAUSE_MIN_S, shortest_s / 50.0))
