"""An account with limits and runs that pace themselves at it, in virtual time.

The decisions (pace, poll_schedule, latency) are the package's; the actions (the scheduler, the
poller, the network) are replaced by a few lines, so that a hundred seconds take one.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from krea_dagster.engine.pace import InWork, Pace
from krea_dagster.engine.pace_sharing import (
    LEASE_S,
    Lease,
    PaceEvent,
    PaceExchange,
    SharedPace,
    dump_history,
    load_history,
)
from krea_dagster.engine.run.latency import Latencies
from krea_dagster.engine.run.poll_schedule import (
    BATCH,
    PendingTask,
    chances,
    is_learned,
    pause_s,
    scout_due_s,
    select_reads,
)

_T = TypeVar("_T")

#: Seconds of a round trip to the server.
ROUND_TRIP_S = 0.006
JOIN_S = 0.1


@dataclass
class Account:
    """The server's side: a rate (a bucket, or a sliding second), a number at once, or both."""

    rate: float | None = None
    burst: float = 20.0
    sliding: bool = False
    at_once: int | None = None
    retry_after_s: float = 0.0
    refuse_by_chance: float = 0.0
    latency_s: tuple[float, float] = (1.4, 2.6)
    seed: int = 1
    taken: int = 0
    most_seen: int = 0
    _tokens: float = field(default=math.nan)
    _filled_s: float = 0.0
    _recent: list[float] = field(default_factory=list)
    _ends: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._tokens = self.burst
        self._latencies = random.Random(self.seed)
        self._chance = random.Random(self.seed + 1)

    def afresh(self) -> Account:
        """The same account, unused."""
        return replace(self, _tokens=math.nan, _recent=[], _ends=[], taken=0, most_seen=0)

    def create(self, now_s: float) -> float | None:
        """When the task will end, or None for a 429."""
        while self._ends and self._ends[0] <= now_s:
            heapq.heappop(self._ends)
        if self._chance.random() < self.refuse_by_chance:
            return None
        if self.at_once is not None and len(self._ends) >= self.at_once:
            return None
        if self.rate is not None and not self._within_rate(now_s, self.rate):
            return None
        end_s = now_s + self._latencies.uniform(*self.latency_s)
        heapq.heappush(self._ends, end_s)
        self.taken += 1
        self.most_seen = max(self.most_seen, len(self._ends))
        return end_s

    def _within_rate(self, now_s: float, rate: float) -> bool:
        if self.sliding:
            self._recent = [at_s for at_s in self._recent if at_s > now_s - 1.0]
            if len(self._recent) >= rate:
                return False
            self._recent.append(now_s)
            return True
        self._tokens = min(self.burst, self._tokens + (now_s - self._filled_s) * rate)
        self._filled_s = now_s
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    def bound_s(self, images: int) -> float:
        """The least time in which these images can be made."""
        latencies = random.Random(self.seed)
        running: list[float] = []
        start_s = end_s = 0.0
        for number in range(images):
            if self.rate is not None:
                saved = self.rate if self.sliding else self.burst
                start_s = max(start_s, (number + 1 - saved) / self.rate)
            if self.at_once is not None and len(running) >= self.at_once:
                start_s = max(start_s, heapq.heappop(running))
            ended_s = start_s + latencies.uniform(*self.latency_s)
            heapq.heappush(running, ended_s)
            end_s = max(end_s, ended_s)
        return end_s


@dataclass
class SharedJournal:
    """The shared pace and the leases, as a journal keeps them."""

    kept: str = ""
    kept_at_s: float = 0.0
    leases: dict[str, tuple[Lease, float]] = field(default_factory=dict)
    exchanges: int = 0
    is_away: bool = False


@dataclass
class _Task:
    awaited: PendingTask
    ends_s: float
    asked: bool = False


class Run:
    """One run: submits by the pace, polls by the chances."""

    def __init__(
        self,
        images: int,
        *,
        batch: bool,
        most: int = 256,
        starts_s: float = 0.0,
        shared: SharedJournal | None = None,
        owner: str = "",
    ) -> None:
        self.images = images
        self.left = images
        self.batch = batch
        self.starts_s = starts_s
        self.shared = SharedPace(Pace(most))
        self.shelf = shared
        self.owner = owner
        self.exchanging = False
        self.latencies = Latencies()
        self.tasks: list[_Task] = []
        self.submitting = 0
        self.pressed = False
        self.delivered = 0
        self.finished_s = math.inf
        self.posts_s: list[float] = []
        self.refused_s: list[float] = []
        self.taken_s: list[float] = []
        self.reads = 0
        self.retry_after_s = 0.0
        self.joined = self.met = False

    @property
    def pace(self) -> Pace:
        return self.shared.pace

    @pace.setter
    def pace(self, pace: Pace) -> None:
        self.shared.pace = pace

    def step(self, now_s: float, world: World) -> float:
        """Do what is due; return when to continue."""
        if now_s < self.starts_s:
            return self.starts_s
        again_s = self._exchange(now_s, world)
        if self.shelf is not None and not self.joined:
            return again_s
        again_s = min(again_s, self._submit(now_s, world))
        return min(again_s, self._ask(now_s, world))

    def _exchange(self, now_s: float, world: World) -> float:
        shared = self.shelf
        if shared is None or self.exchanging or not (self.left or self.tasks or self.submitting):
            return math.inf
        due_s = self.shared.due_s(now_s) if self.joined else self.starts_s + JOIN_S - now_s
        if due_s > 1e-9 and self.met:
            return now_s + due_s
        self.exchanging = True
        untold = self.shared.untold()
        at_server = self._in_work(now_s).expected - self.shared.elsewhere
        in_flight = round(at_server) + self.submitting
        lease = Lease(self.owner, in_flight, self.left)

        def arrive(at_s: float) -> PaceExchange:
            shared.leases[self.owner] = (lease, at_s)
            shared.exchanges += 1
            others = [
                one
                for owner, (one, then_s) in shared.leases.items()
                if owner != self.owner and at_s - then_s <= LEASE_S
            ]
            told = load_history(shared.kept, at_s - shared.kept_at_s, at_s).among((lease, *others))
            told = told.with_events(untold, at_s)
            shared.kept, shared.kept_at_s = dump_history(told, at_s), at_s
            return PaceExchange(told.learned(), lease, others, len(untold), at_s)

        def answered(at_s: float, found: PaceExchange) -> None:
            self.exchanging = False
            self.shared.exchanged(found, at_s)
            self.joined = self.met  # once more before the first submission, as a run does
            self.met = True

        world.call(arrive, answered)
        return math.inf

    def _submit(self, now_s: float, world: World) -> float:
        def in_flight() -> int:
            return len(self.tasks) + self.submitting

        self.pressed = self.left > 0 and (in_flight() >= self.pace.room or self.pace.unclear)
        while self.left and in_flight() < self.pace.room:
            if self.pace.one_by_one and self.submitting:
                break
            wait_s = self.pace.wait_s(now_s)
            if wait_s > 1e-9:
                return now_s + wait_s
            self.pace = self.pace.sent(now_s)
            self.left -= 1
            self.submitting += 1
            self.posts_s.append(now_s)
            world.call(world.account.create, self._answered(now_s))
        return math.inf

    def _answered(self, sent_s: float) -> Callable[[float, float | None], None]:
        def answered(now_s: float, ends_s: float | None) -> None:
            self.submitting -= 1
            if ends_s is None:
                self.left += 1
                self.refused_s.append(now_s)
                in_work = self._in_work(now_s)
                wait_s = self.retry_after_s
                self.shared.learn(PaceEvent(now_s, "refused", now_s - sent_s, in_work, wait_s))
            else:
                self.taken_s.append(now_s)
                self.tasks.append(_Task(PendingTask("1K", sent_s), ends_s))
                in_work = self._in_work(now_s)
                answer = PaceEvent(now_s, "taken", now_s - sent_s, in_work, pressed=self.pressed)
                self.shared.learn(answer)

        return answered

    def _in_work(self, now_s: float) -> InWork:
        ended = chances(self.latencies, [task.awaited for task in self.tasks], now_s)
        deviation = float((ended * (1.0 - ended)).sum()) ** 0.5
        known = len(self.tasks) + self.shared.elsewhere
        return InWork(known, known - float(ended.sum()), deviation)

    def _ask(self, now_s: float, world: World) -> float:
        waiting = [task for task in self.tasks if not task.asked]
        if not waiting:
            return math.inf
        again_s = math.inf
        if not is_learned(self.latencies, "1K") and waiting[0] is self.tasks[0]:
            again_s = scout_due_s(waiting[0].awaited)
            if again_s <= now_s:
                self._read(now_s, waiting[:1], world)
                return now_s
        awaited = [task.awaited for task in waiting]
        ended = chances(self.latencies, awaited, now_s)
        chosen = [waiting[at] for at in select_reads(ended, pressed=self.pressed, batch=self.batch)]
        if self.batch and chosen:
            self._read(now_s, chosen[:BATCH], world)
        elif not self.batch:
            for task in chosen:
                self._read(now_s, [task], world)
        return min(again_s, now_s + pause_s(self.latencies, awaited, now_s))

    def _read(self, asked_s: float, tasks: Sequence[_Task], world: World) -> None:
        self.reads += 1
        for task in tasks:
            task.asked = True

        def answered(now_s: float, ended: list[bool]) -> None:
            for task, has_ended in zip(tasks, ended, strict=True):
                task.asked = False
                since_s, not_yet_s = task.awaited.since_s, task.awaited.not_yet_s
                if has_ended:
                    self.latencies = self.latencies.finished("1K", not_yet_s, now_s - since_s)
                    self.tasks.remove(task)
                    self.delivered += 1
                    if self.delivered == self.images:
                        self.finished_s = now_s
                else:
                    task.awaited = PendingTask("1K", since_s, asked_s - since_s)

        world.call(lambda at_s: [task.ends_s <= at_s for task in tasks], answered)


class World:
    """Virtual time: calls take a while, and runs continue when something is due."""

    def __init__(self, account: Account, runs: Sequence[Run]) -> None:
        self.account = account
        self.runs = runs
        self.now_s = 0.0
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._jitter = random.Random(account.seed + 2)
        for run in runs:
            run.retry_after_s = account.retry_after_s

    def call(self, ask: Callable[[float], _T], answered: Callable[[float, _T], None]) -> None:
        """Call the server after half a round trip, and return its answer after another."""

        def arrive() -> None:
            value = ask(self.now_s)
            self.at(self.now_s + self._half_a_trip_s(), lambda: answered(self.now_s, value))

        self.at(self.now_s + self._half_a_trip_s(), arrive)

    def go(self, until_s: float = 1000.0) -> None:
        """Let time pass until every run has all its images. Raises TimeoutError."""
        while any(math.isinf(run.finished_s) for run in self.runs):
            next_s = min(run.step(self.now_s, self) for run in self.runs)
            if self._events and self._events[0][0] <= next_s:
                self.now_s, _, happen = heapq.heappop(self._events)
                happen()
            else:
                self.now_s = max(next_s, self.now_s + 1e-4)
            if self.now_s > until_s:
                raise TimeoutError(f"not finished after {until_s:g} s")

    def at(self, at_s: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._order), happen))

    def _half_a_trip_s(self) -> float:
        return ROUND_TRIP_S * (0.5 + self._jitter.random()) / 2.0


def makespan(account: Account, *runs: Run) -> float:
    """Let the runs finish; returns the makespan as a multiple of the least possible."""
    world = World(account, runs)
    world.go()
    return world.now_s / account.bound_s(sum(run.images for run in runs))
