"""The account that all clients of one benchmark share: its limits, its tasks and its record. Pure.

Every call gets the present time, in seconds of a monotonic clock.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Final

#: Rounding of times may leave a token this much short of whole.
_NEARLY: Final = 1e-9


@dataclass(frozen=True)
class AccountLimits:
    """What the account allows. A refused call uses nothing up.

    ``rate`` is submissions per second, by a token bucket that starts with ``burst`` tokens and
    holds no more. ``concurrent`` is how many tasks may be unfinished. None: no limit.
    """

    rate: float | None = None
    burst: int = 20
    concurrent: int | None = None


def drawn_latencies(latency_s: float, spread: float, seed: int) -> Callable[[int], float]:
    """Return a function from a task's number to its seconds: ``latency_s`` plus or minus a share.

    They are drawn from the seed in the order of the numbers, so all clients meet the same ones.
    """
    source = random.Random(seed)
    drawn: list[float] = []

    def of_task(number: int) -> float:
        while len(drawn) <= number:
            drawn.append(latency_s * (1 + spread * (2 * source.random() - 1)))
        return drawn[number]

    return of_task


class TokenBucket:
    """A limit on submissions per second. The bucket starts full."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = float(burst)
        self._at_s = -math.inf

    def admits(self, now_s: float) -> bool:
        """Return whether there is a whole token."""
        if self._at_s > -math.inf:
            gained = (now_s - self._at_s) * self._rate
            self._tokens = min(float(self._burst), self._tokens + gained)
        self._at_s = now_s
        return self._tokens >= 1 - _NEARLY

    def take(self) -> None:
        """Use up a token."""
        self._tokens -= 1


@dataclass(frozen=True, slots=True)
class CreateCall:
    """A create call: its body, the fields that decide, its Idempotency-Key, and the sender."""

    body: bytes
    size: str
    quality: str
    key: str
    worker: str


@dataclass(slots=True)
class AccountTask:
    """One task. Times are the clock's; ``downloaded_s`` is the time of the last byte."""

    number: int
    task_id: str
    call: CreateCall
    created_s: float
    done_s: float
    downloaded_s: float | None = None


@dataclass(slots=True)
class CallCounts:
    """The calls to the server. ``creates`` holds time, outcome and worker of each create call."""

    creates: list[tuple[float, str, str]] = field(default_factory=list)
    single_reads: int = 0
    batch_reads: int = 0
    batch_ids: int = 0
    credits_reads: int = 0
    downloads: int = 0
    download_bytes: int = 0


class Account:
    """Accepts, refuses or recognises submissions, and knows every task."""

    def __init__(
        self, limits: AccountLimits, latency_of: Callable[[int], float], id_prefix: str
    ) -> None:
        self.limits = limits
        self.counts = CallCounts()
        self.tasks: dict[str, AccountTask] = {}
        self._latency_of = latency_of
        self._bucket = None if limits.rate is None else TokenBucket(limits.rate, limits.burst)
        self._unfinished: list[float] = []  # a heap of the times of their ends
        self._by_key: dict[str, AccountTask] = {}
        self._id_prefix = id_prefix

    def create(self, now_s: float, call: CreateCall) -> tuple[str, AccountTask | None]:
        """Return the outcome and its task: ``accepted``, ``replayed``, ``conflict`` or ``429``."""
        outcome, task = self._create(now_s, call)
        self.counts.creates.append((now_s, outcome, call.worker))
        return outcome, task

    def _create(self, now_s: float, call: CreateCall) -> tuple[str, AccountTask | None]:
        known = self._by_key.get(call.key) if call.key else None
        if known is not None:
            same = known.call.body == call.body
            return ("replayed", known) if same else ("conflict", None)
        if not self._has_place(now_s) or not (self._bucket is None or self._bucket.admits(now_s)):
            return "429", None
        if self._bucket is not None:
            self._bucket.take()
        number = len(self.tasks)
        done_s = now_s + self._latency_of(number)
        task = AccountTask(number, f"{self._id_prefix}{number:08x}", call, now_s, done_s)
        heapq.heappush(self._unfinished, done_s)
        self.tasks[task.task_id] = task
        if call.key:
            self._by_key[call.key] = task
        return "accepted", task

    def _has_place(self, now_s: float) -> bool:
        while self._unfinished and self._unfinished[0] <= now_s:
            heapq.heappop(self._unfinished)
        return self.limits.concurrent is None or len(self._unfinished) < self.limits.concurrent

    def stats(self, *, brief: bool) -> dict[str, Any]:
        """Return the record as JSON; ``brief`` leaves out the lists of create calls and tasks."""
        counts, tasks = self.counts, list(self.tasks.values())
        outcomes = [outcome for _, outcome, _ in counts.creates]
        stats: dict[str, Any] = {
            "limits": asdict(self.limits),
            "accepted": outcomes.count("accepted"),
            "replayed": outcomes.count("replayed"),
            "conflicts": outcomes.count("conflict"),
            **{name: value for name, value in asdict(counts).items() if name != "creates"},
            "first_post_s": counts.creates[0][0] if counts.creates else None,
            "last_download_s": max((task.downloaded_s or 0.0 for task in tasks), default=None),
        }
        if not brief:
            stats["creates"] = [
                {"at_s": at_s, "outcome": outcome, "worker": worker}
                for at_s, outcome, worker in counts.creates
            ]
            stats["tasks"] = [
                {
                    "number": task.number,
                    "worker": task.call.worker,
                    "created_s": task.created_s,
                    "latency_s": task.done_s - task.created_s,
                    "done_s": task.done_s,
                    "downloaded_s": task.downloaded_s,
                }
                for task in tasks
            ]
        return stats
