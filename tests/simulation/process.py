"""One process of a scenario: a run with its own clock, journal and client, which may be killed."""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import random
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Final, TypeVar

import anyio

from krea_dagster.api import KreaClient
from krea_dagster.api.resolver import refuse_lookup
from krea_dagster.engine.budget import Caps
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.policy import REJECTED, Policy
from krea_dagster.engine.record import Record
from krea_dagster.engine.resolution import Resolution
from krea_dagster.engine.run.options import RunRoot
from krea_dagster.engine.run.report import RunReport
from krea_dagster.engine.run.requested_image import RequestedImage
from krea_dagster.engine.run.runner import Runner
from krea_dagster.engine.states import State
from krea_dagster.engine.storage.images import ImageStore
from krea_dagster.prompts.requests import PlannedImage
from tests.prompts.reference import PromptRow, plan_images
from tests.simulation.loop import ON_TASK
from tests.simulation.scenario import Kill, Row, Run
from tests.simulation.world import (
    API_KEY,
    BASE_URL,
    DiskStorage,
    SimulatedTransport,
    SimulatedWorld,
    callback_url,
    open_journal,
)

_T = TypeVar("_T")

TABLE: Final = "0" * 32

#: States in which a request has ended, so that another image may be requested.
_SETTLED: Final = frozenset({State.STORED, State.FAILED, State.REFUSED, State.EXPIRED})


class Killed(BaseException):
    """The process is gone: nothing more happens in it."""


class HostClock:
    """The clocks of a host, which may be wrong and may be set."""

    def __init__(self, world: SimulatedWorld, ahead_s: float) -> None:
        self._world = world
        self.ahead = timedelta(seconds=ahead_s)

    def now(self) -> datetime:
        """Return the time by this host's clock."""
        return self._world.now() + self.ahead

    def monotonic(self) -> float:
        """Return seconds from some fixed point."""
        return self._world.loop.time() + 1000.0

    async def sleep(self, seconds: float) -> None:
        """Pause."""
        await anyio.sleep(seconds)


class Process:
    """A run, from the opening of its journal to its end. Use it once.

    ``ended`` is "done", "killed", "stopped", or the error.
    """

    def __init__(
        self, world: SimulatedWorld, run: Run, rows: tuple[Row, ...], kills: Iterable[Kill]
    ) -> None:
        self.world = world
        self.run = run
        self.name = f"run-{run.number}"
        self.clock = HostClock(world, run.ahead_s)
        self.report: RunReport | None = None
        self.error: BaseException | None = None
        self.ended = ""
        self.dead = False
        self.carries = False
        self._rows = rows
        self._kills = {kill.call: kill.when for kill in kills}
        self._calls = 0
        self._tasks: list[asyncio.Task[Any]] = []
        self._journal: Journal | None = None
        self._main: asyncio.Task[None] | None = None

    # -- being a process ----------------------------------------------------------------------

    def start(self, work: Callable[[], Any]) -> asyncio.Task[None]:
        """Start it; the task ends when the process has ended in any way."""
        return self.world.spawn(self._live(work))

    async def _live(self, work: Callable[[], Any]) -> None:
        world = self.world
        world.count("process started")
        inside = contextvars.Context()
        inside.run(ON_TASK.set, self._tasks.append)
        self._main = inside.run(world.loop.create_task, work())
        await asyncio.wait([self._main])
        if self.dead:
            self.ended = "killed"
            await self._reap()
        elif self._main.cancelled():
            self.ended = "stopped"
        elif (error := self._main.exception()) is not None:
            self.error = error
            self.ended = f"{type(error).__name__}: {error}"
        else:
            self.ended = "done"
        if not self.dead and self._journal is not None:
            self._journal.close()
        left = [task for task in self._tasks if not task.done()]
        if left:
            world.broken.append(f"{self.name} ended and left {len(left)} tasks at work")
            await self._reap()
        world.note(f"{self.name} ended: {self.ended[:200]}")

    def stop(self) -> None:
        """Tell the run to stop, as Dagster does."""
        if self._main is not None and not self._main.done():
            self.world.count("run told to stop")
            self._main.cancel()

    def kill(self) -> None:
        """End the process as the kernel does: its locks are free, and nothing is written."""
        if self.dead or (self._main is not None and self._main.done()):
            return
        self.dead = True
        if self._journal is not None:
            self._journal.close()
        self.world.spawn(self._reap())

    async def _reap(self) -> None:
        for _ in range(10_000):
            alive = [task for task in self._tasks if not task.done()]
            if not alive:
                return
            for task in alive:
                task.cancel()
            await asyncio.sleep(0)
        self.world.broken.append(f"{self.name} could not be killed")

    def _enter(self, what: str) -> tuple[int, str]:
        """Count a call of the world, and be killed before it if the scenario says so."""
        if self.dead:
            raise Killed
        self._calls += 1
        call = self._calls
        self.world.note(f"{self.name} {call} {what}")
        if self._kills.get(call) == "before":
            self.world.count(f"killed before {what}")
            self.kill()
            raise Killed
        return call, what

    def _leave(self, entered: tuple[int, str]) -> None:
        """Be killed after a call if the scenario says so, or if it was killed meanwhile."""
        call, what = entered
        if self._kills.get(call) == "after" and not self.dead:
            self.world.count(f"killed after {what}")
            self.kill()
        if self.dead:
            raise Killed

    async def in_thread(  # noqa: C901 - a thread has many ends
        self, call: Callable[..., _T], /, *arguments: Any
    ) -> _T:
        """Make a call like a thread: it goes on if its caller is cancelled."""
        entered = self._enter(_name_of(call))
        answer: asyncio.Future[_T] = self.world.loop.create_future()

        def make() -> None:
            if self.dead:
                answer.cancel()
                return
            try:
                result = call(*arguments)
                self._leave(entered)
            except BaseException as error:  # noqa: BLE001 - the caller gets it
                self.world.loop.call_later(self.world.disk_s(), _raise_in, answer, error)
            else:
                self.world.loop.call_later(self.world.disk_s(), _return_in, answer, result)

        self.world.loop.call_later(self.world.disk_s(), make)
        stopped: asyncio.CancelledError | None = None
        while not answer.done():
            try:
                await asyncio.wait([answer])
            except asyncio.CancelledError as error:
                if self.dead:
                    raise
                stopped = error
        if self.dead:
            raise Killed
        if stopped is not None:
            if not answer.cancelled():
                answer.exception()
            raise stopped
        return answer.result()

    def _check_store(self, *, writes: bool) -> None:
        if self.dead:
            raise Killed
        self.world.check_store(writes=writes)

    # -- being a run --------------------------------------------------------------------------

    async def carry(
        self,
        *,
        resolutions: Mapping[str, Resolution] | None = None,
        ask_again: frozenset[str] = frozenset(),
        revive: bool = False,
    ) -> None:
        """Do what the command does: open the journal, plan the rows, run them, close the slots."""
        run, journal = self.run, await self.in_thread(self._open)
        storage = DiskStorage(str(self.world.folder / "root"), self._check_store)
        root_id = await self.in_thread(self._begin, journal, storage)
        api_key = hashlib.sha256(API_KEY.encode()).hexdigest()[:16]
        policy = Policy(
            on_unknown=run.on_unknown,
            patience_s=run.patience_s,
            wait=run.wait,
            retry_codes=ask_again,
            revive=revive or run.kind == "salvage",
            account_keys=frozenset({api_key}),
        )
        if run.kind == "salvage":
            wanted = await self.in_thread(self._paid, journal)
        else:
            await self._wish(journal)
            planned = await self.in_thread(self.planned, journal)
            wanted = _wanted(planned)
        caps = Caps() if run.cap_images is None else Caps(run_units=run.cap_images * 4500)
        runner = Runner(
            connect=self._connect,
            journal=journal,
            images=ImageStore(storage, in_thread=self.in_thread),
            run_id=self.name,
            root=RunRoot(root_id),
            table_id=TABLE,
            api_key=api_key,
            policy=policy,
            max_in_flight=run.max_in_flight,
            max_per_s=run.max_per_s,
            caps=caps,
            buying=run.kind == "run",
            resolutions=resolutions or {},
            callback_url_of=callback_url if run.called else None,
            clock=self.clock,
            randomness=random.Random(self.name),
            in_thread=self.in_thread,
        )
        self.carries = True
        self.report = await runner.run(wanted)
        self.carries = False
        if run.kind == "run":
            await self._end_wishes(journal)

    def _open(self) -> Journal:
        self._journal = open_journal(self.world)
        return self._journal

    def _begin(self, journal: Journal, storage: DiskStorage) -> str:
        return journal.roots.begin(storage, journal.roots.check(storage))

    def planned(self, journal: Journal) -> list[PlannedImage]:
        """Return the images that the run's rows request, at their attempts."""
        attempts = journal.attempts(TABLE).current()
        return list(plan_images(_prompt_rows(self._rows, self.run.rows), attempts))

    def _slots(self) -> list[tuple[str, int]]:
        return [(_id(number), 0) for number in self.run.again if self._rows[number].seed is None]

    async def _wish(self, journal: Journal) -> None:
        """Request other images, as ``--again`` does."""
        slots = self._slots()
        if not slots:
            return
        standing = await self.in_thread(self._standing, journal)

        def ask() -> None:
            journal.attempts(TABLE).raise_attempts(
                slots,
                raised_by=self.name,
                at=self.clock.now(),
                settled=lambda slot, attempt: _is_settled(standing.get((*slot, attempt))),
            )
            self.world.wishes += [("asked", slot) for slot in slots]

        await self.in_thread(ask)

    async def _end_wishes(self, journal: Journal) -> None:
        standing = await self.in_thread(self._standing, journal)
        done = [slot for slot, record in standing.items() if _is_settled(record)]

        def end() -> None:
            log = journal.attempts(TABLE)
            open_ = log.open_slots()
            log.close_slots([one for one in done if one[:2] in open_], at=self.clock.now())
            self.world.wishes += [("ended", one[:2]) for one in done]

        await self.in_thread(end)

    def _standing(self, journal: Journal) -> dict[tuple[str, int, int], Record | None]:
        images = self.planned(journal)
        records = journal.records({image.request.request_key for image in images})
        return {
            (image.prompt_id, image.sample, image.request.attempt): records.get(
                image.request.request_key
            )
            for image in images
        }

    def _paid(self, journal: Journal) -> list[RequestedImage]:
        paid = [
            record
            for record in journal.unattended()
            if record.state in (State.SUBMITTED, State.COMPLETED)
            and not (record.state is State.COMPLETED and record.error_code in REJECTED)
        ]
        return [
            RequestedImage(record.request, record.partition_key)
            for record in [*paid, *journal.expired_since(self.clock.now() - timedelta(days=7))]
        ]

    @asynccontextmanager
    async def _connect(self) -> AsyncIterator[KreaClient]:
        client = KreaClient(
            API_KEY,
            base_url=BASE_URL,
            transport=SimulatedTransport(self.world, self._enter, self._leave),
            resolve=refuse_lookup,
            now=self.clock.now,
            monotonic=self.clock.monotonic,
        )
        async with client:
            yield client


def _is_settled(record: Record | None) -> bool:
    if record is None:
        return False
    rejected = record.state is State.COMPLETED and record.error_code in REJECTED
    return record.state in _SETTLED or rejected


def _id(number: int) -> str:
    return f"p{number}"


def _prompt_rows(rows: tuple[Row, ...], chosen: Iterable[int]) -> list[PromptRow]:
    return [
        PromptRow(
            row=number + 1,
            prompt_id=_id(number),
            prompt=rows[number].prompt,
            size="1:2",
            quality=rows[number].quality,
            seed=rows[number].seed,
            nsfw_check=False,
            num_images=1,
            partition_key="part-a" if number % 2 else "part-b",
        )
        for number in chosen
    ]


def _wanted(images: Iterable[PlannedImage]) -> list[RequestedImage]:
    found: dict[str, RequestedImage] = {}
    for image in images:
        key = image.request.request_key
        one = found.get(key)
        found[key] = (
            RequestedImage(image.request, image.partition_key)
            if one is None
            else replace(one, rows=one.rows + 1)
        )
    return list(found.values())


def _name_of(call: Any) -> str:
    while hasattr(call, "func"):
        call = call.func
    return str(getattr(call, "__name__", type(call).__name__))


def _raise_in(answer: asyncio.Future[Any], error: BaseException) -> None:
    if not answer.done():
        answer.set_exception(error)
        answer.exception()


def _return_in(answer: asyncio.Future[Any], result: Any) -> None:
    if not answer.done():
        answer.set_result(result)
