"""The schedule bound: the least makespan that any client could reach. Pure.

Between the first POST and the end of the last task, assumed is that

- every call takes no time, and so does the download of an image;
- the client knows the limits beforehand and the end of every task the moment it comes;
- all requests are there from the beginning, and none is refused or fails;
- the n-th task that the server takes has the n-th latency, whichever request it carries, so
  that a client cannot choose its order;
- the limits are the account's alone: of one client, or of several that never hinder each other.

Under these the best that can be done is to submit at the first moment that the limits allow
(list scheduling). Each limit says only that a submission may not come before some time that
follows from earlier ones, later if those were later. So nobody's n-th submission can be earlier
than this one's, nor can the end of the last task.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

from benchmarks.account import Limits


def earliest_starts_s(latencies_s: Sequence[float], limits: Limits) -> list[float]:
    """When each task can be submitted at the earliest, in seconds after the first POST."""
    starts: list[float] = []
    ends: list[float] = []  # of the tasks that hold a place, as a heap
    full_at_s = 0.0  # when the token bucket is full again
    for number, latency_s in enumerate(latencies_s):
        start_s = starts[-1] if starts else 0.0
        if limits.concurrent is not None and len(ends) >= limits.concurrent:
            start_s = max(start_s, heapq.heappop(ends))
        if limits.rate is not None and limits.limiter == "bucket":
            start_s = max(start_s, full_at_s - (limits.burst - 1) / limits.rate)
            full_at_s = max(full_at_s, start_s) + 1 / limits.rate
        elif limits.rate is not None and number >= int(limits.rate):
            before_s = starts[number - int(limits.rate)]
            # In the same window as the one so many before: the next window, of one second each.
            free_s = before_s + 1 if limits.limiter == "sliding" else float(int(before_s) + 1)
            start_s = max(start_s, free_s)
        starts.append(start_s)
        heapq.heappush(ends, start_s + latency_s)
    return starts


def schedule_bound_s(latencies_s: Sequence[float], limits: Limits) -> float:
    """Seconds from the first POST to the end of the last task, at the least."""
    starts = earliest_starts_s(latencies_s, limits)
    return max((s + latency for s, latency in zip(starts, latencies_s, strict=True)), default=0.0)


def bound_of_s(books: dict[str, Any]) -> float:
    """The bound of the tasks in a server's books, under that server's limits."""
    tasks = sorted(books["tasks"], key=lambda task: int(task["number"]))
    return schedule_bound_s([task["latency_s"] for task in tasks], Limits(**books["limits"]))
