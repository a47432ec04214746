"""The figures of a run, from the server's record of it, and the schedule bound. Pure.

The schedule bound is the least makespan that any client could reach, from the first POST to the end
of the last task, if

- every call and download takes no time;
- the client knows the limits beforehand, and the end of every task the moment it comes;
- all requests are there from the beginning, and none is refused or fails;
- the n-th task that the server takes has the n-th latency, for every client and order.

The best schedule then submits each request at the first moment that the limits allow. Each limit
only says that a submission may not come before a time that follows from earlier submissions. So no
client's n-th submission can be earlier than this schedule's, and no last task can end earlier.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.account import AccountLimits

#: Seconds from the first POST in which a client may still be learning the limits.
LEARNING_S: Final = 10.0


@dataclass(frozen=True)
class RunFigures:
    """The figures of one run.

    ``makespan_s`` is from the first POST to the last byte of the last image. ``turned_away`` and
    ``turned_away_later`` are the share of POSTs answered 429, in all and after the first 10
    seconds. Reads are per image; one batch read is for up to 50 tasks.
    """

    images: int
    makespan_s: float
    bound_s: float
    turned_away: float
    turned_away_later: float
    single_reads: float
    batch_reads: float

    @property
    def ratio(self) -> float:
        """Makespan to bound."""
        return self.makespan_s / self.bound_s


def figures_of(stats: dict[str, Any], images: int) -> RunFigures:
    """Return the figures of a run of ``images`` images.

    Raises ValueError if an image was bought twice or not downloaded: then a makespan means nothing.
    """
    tasks = stats["tasks"]
    if len(tasks) != images:
        raise ValueError(f"{len(tasks)} tasks were created for {images} images")
    missing = sum(task["downloaded_s"] is None for task in tasks)
    if missing:
        raise ValueError(f"{missing} of {images} images were never downloaded")
    first_s = stats["first_post_s"]
    creates = stats["creates"]
    later = [one for one in creates if one["at_s"] - first_s > LEARNING_S]
    return RunFigures(
        images=images,
        makespan_s=stats["last_download_s"] - first_s,
        bound_s=bound_of_s(stats),
        turned_away=_share_of_429(creates),
        turned_away_later=_share_of_429(later),
        single_reads=stats["single_reads"] / images,
        batch_reads=stats["batch_reads"] / images,
    )


def most_at_once(stats: dict[str, Any]) -> int:
    """Return the most tasks that were unfinished at one time."""
    steps = [(task["created_s"], 1) for task in stats["tasks"]]
    steps += [(task["done_s"], -1) for task in stats["tasks"]]
    most = now = 0
    for _, step in sorted(steps):
        now += step
        most = max(most, now)
    return most


def _share_of_429(creates: list[dict[str, Any]]) -> float:
    if not creates:
        return 0.0
    outcomes = [str(one["outcome"]) for one in creates]
    return outcomes.count("429") / len(outcomes)


def bound_of_s(stats: dict[str, Any]) -> float:
    """Return the schedule bound of a server's tasks under its limits."""
    tasks = sorted(stats["tasks"], key=lambda task: int(task["number"]))
    return schedule_bound_s([task["latency_s"] for task in tasks], AccountLimits(**stats["limits"]))


def schedule_bound_s(latencies_s: Sequence[float], limits: AccountLimits) -> float:
    """Return the least seconds from the first POST to the end of the last task."""
    starts = earliest_starts_s(latencies_s, limits)
    return max((s + latency for s, latency in zip(starts, latencies_s, strict=True)), default=0.0)


def earliest_starts_s(latencies_s: Sequence[float], limits: AccountLimits) -> list[float]:
    """Return the earliest time at which each task can be submitted, after the first POST."""
    starts: list[float] = []
    ends: list[float] = []  # of the tasks at the server, as a heap
    full_at_s = 0.0  # when the token bucket is full again
    for latency_s in latencies_s:
        start_s = starts[-1] if starts else 0.0
        if limits.concurrent is not None and len(ends) >= limits.concurrent:
            start_s = max(start_s, heapq.heappop(ends))
        if limits.rate is not None:
            start_s = max(start_s, full_at_s - (limits.burst - 1) / limits.rate)
            full_at_s = max(full_at_s, start_s) + 1 / limits.rate
        starts.append(start_s)
        heapq.heappush(ends, start_s + latency_s)
    return starts
