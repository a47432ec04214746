"""The account that every client of one benchmark shares: its limits, its tasks, and its books.

Pure: every call is handed the present time, in seconds of a clock that never goes back.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Protocol

SHAPES: Final = ("uniform", "normal", "lognormal")
LIMITERS: Final = ("bucket", "fixed", "sliding")

#: Rounding of times may leave a token this much short of whole.
_NEARLY: Final = 1e-9


#: Seconds that a task takes, by its number and its quality.
DurationOf = Callable[[int, str], float]


@dataclass(frozen=True)
class Limits:
    """What the account allows.

    ``rate`` is submissions per second, None for no limit. ``bucket`` starts with ``burst`` tokens
    and holds no more; ``fixed`` allows ``rate`` in each second since the first that was taken;
    ``sliding`` allows ``rate`` in any second. ``concurrent`` is how many tasks may be unfinished,
    None for no limit. What is refused uses nothing up.
    """

    rate: float | None = None
    burst: int = 20
    limiter: str = "bucket"
    concurrent: int | None = None


@dataclass(frozen=True)
class Durations:
    """Seconds from submission to the finished image, drawn by the task's number from a seed.

    So every client of one run meets the same ones. ``uniform``: ``latency_s`` plus or minus
    ``spread`` of it. ``normal``: with the standard deviation ``spread``, and at least a tenth of
    ``latency_s``. ``lognormal``: with the median ``latency_s`` and the deviation ``spread`` of
    the logarithm. ``quality_s`` gives a quality another ``latency_s``.
    """

    latency_s: float = 2.0
    spread: float = 0.3
    shape: str = "uniform"
    seed: int = 0
    quality_s: dict[str, float] = field(default_factory=dict)

    def by_number(self) -> DurationOf:
        """How long the tasks 0, 1, 2 and so on take, by number and quality."""
        source = random.Random(self.seed)
        drawn: list[float] = []

        def duration_s(number: int, quality: str) -> float:
            while len(drawn) <= number:
                drawn.append(self._draw(source))
            return self.quality_s.get(quality, self.latency_s) * drawn[number]

        return duration_s

    def _draw(self, source: random.Random) -> float:
        if self.shape == "uniform":
            return 1 + self.spread * (2 * source.random() - 1)
        if self.shape == "normal":
            return max(0.1, source.gauss(1, self.spread))
        return math.exp(source.gauss(0, self.spread))


class Limiter(Protocol):
    """A limit on submissions per second."""

    def admits(self, now_s: float) -> bool:
        """Whether one may be taken now."""

    def take(self, now_s: float) -> None:
        """One is taken now."""


class Unlimited:
    """No limit."""

    def admits(self, now_s: float) -> bool:  # noqa: ARG002 - the protocol's
        """Always."""
        return True

    def take(self, now_s: float) -> None:
        """Nothing is used up."""


class Bucket:
    """A token bucket, which starts full."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = float(burst)
        self._at_s = -math.inf

    def admits(self, now_s: float) -> bool:
        """Whether a whole token is there."""
        if self._at_s > -math.inf:
            gained = (now_s - self._at_s) * self._rate
            self._tokens = min(float(self._burst), self._tokens + gained)
        self._at_s = now_s
        return self._tokens >= 1 - _NEARLY

    def take(self, now_s: float) -> None:  # noqa: ARG002 - admits has just brought it up to date
        """Use a token up."""
        self._tokens -= 1


class FixedWindow:
    """So many in each second, counted from the first that was taken."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._from_s: float | None = None
        self._window = 0
        self._taken = 0

    def admits(self, now_s: float) -> bool:
        """Whether the present second has room."""
        if self._from_s is None:
            return True
        window = int(now_s - self._from_s + _NEARLY)
        if window != self._window:
            self._window, self._taken = window, 0
        return self._taken + 1 <= self._rate

    def take(self, now_s: float) -> None:
        """Count one."""
        if self._from_s is None:
            self._from_s = now_s
        self._taken += 1


class SlidingWindow:
    """So many in any second."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._taken: deque[float] = deque()

    def admits(self, now_s: float) -> bool:
        """Whether the last second has room."""
        while self._taken and self._taken[0] <= now_s - 1 + _NEARLY:
            self._taken.popleft()
        return len(self._taken) + 1 <= self._rate

    def take(self, now_s: float) -> None:
        """Count one."""
        self._taken.append(now_s)


def limiter_of(limits: Limits) -> Limiter:
    """The limiter that these limits name."""
    if limits.rate is None:
        return Unlimited()
    if limits.limiter == "fixed":
        return FixedWindow(limits.rate)
    if limits.limiter == "sliding":
        return SlidingWindow(limits.rate)
    return Bucket(limits.rate, limits.burst)


@dataclass(frozen=True, slots=True)
class Order:
    """A create call: its whole body, what of it decides, its Idempotency-Key, and who sent it."""

    body: bytes
    size: str
    quality: str
    key: str
    worker: str


@dataclass(slots=True)
class Task:
    """One task that was created. Times are the clock's; ``downloaded_s`` is of the last byte."""

    number: int
    task_id: str
    order: Order
    created_s: float
    done_s: float
    downloaded_s: float | None = None


@dataclass(slots=True)
class Books:
    """What was asked of the server. ``creates`` holds time, outcome and worker of each."""

    creates: list[tuple[float, str, str]] = field(default_factory=list)
    single_reads: int = 0
    batch_reads: int = 0
    batch_ids: int = 0
    credits_reads: int = 0
    downloads: int = 0
    download_bytes: int = 0


class Account:
    """Takes, refuses or recognises submissions, and knows every task.

    ``duration_s`` is how long a task takes, by its number and its quality.
    """

    def __init__(self, limits: Limits, duration_s: DurationOf, id_prefix: str) -> None:
        self.limits = limits
        self.books = Books()
        self.tasks: dict[str, Task] = {}
        self._duration_s = duration_s
        self._limiter = limiter_of(limits)
        self._unfinished: list[float] = []  # a heap of the times of their ends
        self._by_key: dict[str, Task] = {}
        self._id_prefix = id_prefix

    def create(self, now_s: float, order: Order) -> tuple[str, Task | None]:
        """The outcome and its task: ``accepted``, ``replayed``, ``conflict`` or ``429``."""
        outcome, task = self._create(now_s, order)
        self.books.creates.append((now_s, outcome, order.worker))
        return outcome, task

    def _create(self, now_s: float, order: Order) -> tuple[str, Task | None]:
        known = self._by_key.get(order.key) if order.key else None
        if known is not None:
            same = known.order.body == order.body
            return ("replayed", known) if same else ("conflict", None)
        if not self._has_place(now_s) or not self._limiter.admits(now_s):
            return "429", None
        self._limiter.take(now_s)
        number = len(self.tasks)
        done_s = now_s + self._duration_s(number, order.quality)
        task = Task(number, self._id_prefix + _base36(number), order, now_s, done_s)
        heapq.heappush(self._unfinished, done_s)
        self.tasks[task.task_id] = task
        if order.key:
            self._by_key[order.key] = task
        return "accepted", task

    def _has_place(self, now_s: float) -> bool:
        while self._unfinished and self._unfinished[0] <= now_s:
            heapq.heappop(self._unfinished)
        return self.limits.concurrent is None or len(self._unfinished) < self.limits.concurrent

    def report(self, *, brief: bool) -> dict[str, Any]:
        """The books as JSON; ``brief`` leaves out the lists of create calls and tasks."""
        books, tasks = self.books, list(self.tasks.values())
        outcomes = [outcome for _, outcome, _ in books.creates]
        report: dict[str, Any] = {
            "limits": asdict(self.limits),
            "posts": len(outcomes),
            "accepted": outcomes.count("accepted"),
            "turned_away": outcomes.count("429"),
            "replayed": outcomes.count("replayed"),
            "conflicts": outcomes.count("conflict"),
            "single_reads": books.single_reads,
            "batch_reads": books.batch_reads,
            "batch_ids": books.batch_ids,
            "credits_reads": books.credits_reads,
            "downloads": books.downloads,
            "download_bytes": books.download_bytes,
            "first_post_s": books.creates[0][0] if books.creates else None,
            "last_done_s": max((task.done_s for task in tasks), default=None),
            "last_download_s": max((task.downloaded_s or 0.0 for task in tasks), default=None),
        }
        if not brief:
            report["creates"] = [
                {"at_s": at_s, "outcome": outcome, "worker": worker}
                for at_s, outcome, worker in books.creates
            ]
            report["tasks"] = [
                {
                    "number": task.number,
                    "id": task.task_id,
                    "worker": task.order.worker,
                    "size": task.order.size,
                    "quality": task.order.quality,
                    "created_s": task.created_s,
                    "latency_s": task.done_s - task.created_s,
                    "done_s": task.done_s,
                    "downloaded_s": task.downloaded_s,
                }
                for task in tasks
            ]
        return report


_DIGITS: Final = "0123456789abcdefghijklmnopqrstuvwxyz"


def _base36(number: int) -> str:
    """Eight characters of a-z0-9, as task ids end."""
    digits = []
    for _ in range(8):
        number, digit = divmod(number, 36)
        digits.append(_DIGITS[digit])
    return "".join(reversed(digits))
