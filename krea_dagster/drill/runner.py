"""A series of workers: those that are killed, those that meet something odd, and the last ones."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import anyio
import anyio.abc
import anyio.to_thread

from krea_dagster.drill.edges import TASK_EXISTS, Edge
from krea_dagster.drill.emulator_server import Server
from krea_dagster.drill.fork_server_client import KILLED, Worker, Workers
from krea_dagster.drill.job import API_KEY, Job, Place
from krea_dagster.drill.plan import Kill, Plan, plan_kills
from krea_dagster.drill.reconcile import Reckoning, ServerTask, body_of, reckon, server_tasks
from krea_dagster.drill.worker import STOPPED
from krea_dagster.drill.worlds import Episode, Host
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.record import Record
from krea_dagster.engine.states import State
from krea_dagster.models import ImageRequest

_T = TypeVar("_T")

#: Seconds that the emulator's tasks take.
LATENCY_S: Final = 0.1

#: Waits of minutes in production are waits of milliseconds in the drill.
_POLICY: Final[Mapping[str, Any]] = {"wait_scale": 0.001, "gone_after_s": 0.2}
#: The latest time of a random kill, after the start of its worker.
_RANDOM_WITHIN_S: Final = 0.6
#: How often a planned kill is tried before it counts as never reached.
_TRIES: Final = 8
#: The latest passage of an edge at which a worker is killed.
_LATEST_PASSAGE: Final = 4
#: Looks at a wall clock, the first and the last, at which it may be set.
_SET_AFTER_LOOKS: Final = (3, 60)
#: How long the server keeps an answer back until the one whom it is for is killed.
_KEPT_ANSWER_S: Final = 0.5
_LOOK_EVERY_S: Final = 0.01
#: Share of the rows that is kept for episodes, for kills that must be tried again, and for the
#: last worker.
_KEPT_BACK: Final = 0.25
_MOST_PASSES: Final = 12

#: States in which the engine has nothing more to do, whatever the policy.
_ENDED: Final = frozenset({State.STORED, State.FAILED, State.REFUSED, State.EXPIRED})


@dataclass(frozen=True)
class Progress:
    """How far a drill is: what it does, kills done, and images stored."""

    doing: str
    kills: int = 0
    stored: int = 0


class _Step(Enum):
    """A step of the series that is no kill: what an episode does some workers before, and it."""

    EARLIER = "earlier"
    EPISODE = "episode"


class Series:
    """One drill under way. ``workers`` are the fork servers, one for each host of the part."""

    def __init__(
        self,
        plan: Plan,
        *,
        place: Place,
        requests: Sequence[ImageRequest],
        server: Server,
        workers: Sequence[Workers],
        on_progress: Callable[[Progress], None],
    ) -> None:
        self._settings = plan
        self._part = plan.part
        self._place = place
        self._requests = requests
        self._server = server
        self._workers = workers
        self._on_progress = on_progress
        self._random = random.Random(f"{plan.seed}:kills")  # noqa: S311 - nothing secret
        self.plan = plan_kills(plan.kills, plan.on_unknown, self._random, plan.edges)
        self._to_do: deque[Kill | _Step] = deque(_with_episodes(self.plan, plan.episodes))
        self._rows = 0
        self._first_rows = 0  # of those, the ones opened for a kill's first try
        self._hung_after_s = 60.0 + plan.requests / 10 if plan.life_s is None else plan.life_s
        self._ahead_s = [self._host(chain).ahead_s for chain in range(plan.workers)]
        self.kills: Counter[str] = Counter()
        self.random_kills = 0
        self.crashed: list[int] = []
        self.hung: list[int] = []
        self.launches = 0
        self.episodes = 0
        self.refused = 0
        self.stopped = 0
        self.overwritten: list[str] = []

    def _host(self, chain: int) -> Host:
        return self._part.hosts[chain % len(self._part.hosts)]

    @property
    def _went_wrong(self) -> bool:
        return bool(self.crashed or self.hung)

    # -- killing ------------------------------------------------------------------------------

    async def kill_all(self) -> None:
        """Make the planned kills, with so many workers at a time, and the episodes among them."""
        async with anyio.create_task_group() as group:
            for chain in range(self._settings.workers):
                group.start_soon(self._one_after_another, chain)

    async def _one_after_another(self, chain: int) -> None:
        while self._to_do and not self._went_wrong:
            step = self._to_do.popleft()
            if isinstance(step, Kill):
                step.tries += 1
                if not await self._make(step, chain) and step.tries < _TRIES:
                    self._to_do.append(step)
            elif self._part.episode is not None:
                await self._take(step, self._part.episode)
            await self._tell("killing")

    async def _make(self, kill: Kill, chain: int) -> bool:
        """Start a worker and have it killed; False where it ended before."""
        self._open_rows(kill)
        if self._settings.workers == 1:
            await self._server.calm(self._settings.rates)  # what an earlier worker left over
        edge = kill.edge
        if edge is None:
            return await self._kill_at_random(kill, chain)
        passage = 1
        if not edge.first_only and kill.tries == 1:
            passage = self._random.randint(1, _LATEST_PASSAGE)
        resolutions: dict[str, str] = {}
        if edge.file_missing and not await self._lose_files(passage):
            return False
        if edge.resolves:
            resolutions = await self._decide(passage)
            if len(resolutions) < passage:
                return False
        if edge.outside:
            return await self._kill_unanswered(edge, chain)
        if edge.faults:
            await self._server.script(self._random.choice(edge.faults), passage + kill.tries - 1)
        worker = await self._launch(chain, edge=edge.name, passage=passage, resolutions=resolutions)
        return await self._is_killed(worker, edge)

    async def _is_killed(self, worker: Worker, edge: Edge) -> bool:
        if await self._ended(worker) != KILLED:
            return False
        self.kills[edge.name] += 1
        return True

    async def _kill_at_random(self, kill: Kill, chain: int) -> bool:
        worker = await self._launch(chain)
        after_s = self._random.uniform(0, _RANDOM_WITHIN_S / kill.tries)
        with anyio.move_on_after(after_s):
            await worker.ended.wait()
        await worker.kill()
        if await self._ended(worker) != KILLED:
            return False
        self.random_kills += 1
        return True

    async def _kill_unanswered(self, edge: Edge, chain: int) -> bool:
        """Kill a worker whose purchase the server has, while its answer is kept back."""
        await self._server.script(edge.faults[0], 1, _KEPT_ANSWER_S)
        worker = await self._launch(chain)
        await self._until(worker, self._server.has_struck)
        await worker.kill()
        return await self._is_killed(worker, edge)

    def _open_rows(self, kill: Kill) -> None:
        """Let the next worker see some more rows, now one and now many, so that it has work."""
        if kill.tries > 1:
            more = 1
        else:
            kills = [one for one in self._to_do if isinstance(one, Kill)]
            still = 1 + sum(one.tries == 0 for one in kills)
            left = round(len(self._requests) * (1 - _KEPT_BACK)) - self._first_rows
            share = max(0.0, left / still)
            drawn = round(self._random.expovariate(1.0) * share)
            more = max(1, min(drawn, round(4 * share), left - still))
            self._first_rows += more
        self._rows = min(len(self._requests), self._rows + more)

    async def _lose_files(self, count: int) -> bool:
        """Delete stored files, as if a disk had been cleaned up."""
        stored = [record for record in await self._records() if record.state is State.STORED]
        chosen = self._random.sample(stored, min(count, len(stored)))
        for record in chosen:
            if record.image is not None:
                (self._place.storage / record.image.path).unlink(missing_ok=True)
        return len(chosen) == count

    async def _decide(self, count: int) -> dict[str, str]:
        """Decide unknown outcomes as a person would who looks at the account.

        Only those of which the account has no task: they were not charged.
        """
        asked = {body_of(request): request.request_key for request in self._requests}
        tasks = server_tasks(await self._server.books())
        bought = {asked.get(task.body) for task in tasks}
        free = [
            record.request_key
            for record in await self._records()
            if record.state is State.UNKNOWN and record.request_key not in bought
        ]
        return dict.fromkeys(free[:count], "not-charged")

    # -- workers ------------------------------------------------------------------------------

    async def _launch(self, chain: int = 0, *, setting: bool = True, **wanted: Any) -> Worker:
        """Start a worker; ``wanted`` are fields of its job. Its clock may be set in mid-run."""
        self.launches += 1
        for name, times, arg in self._part.scripts:
            await self._server.script(name, times, arg)
        if self._part.steps_s and setting and "ahead_s" not in wanted:
            before_s = self._ahead_s[chain]
            self._ahead_s[chain] = self._random.choice((0.0, *self._part.steps_s))
            wanted["ahead_s"] = before_s
            wanted["step_s"] = self._ahead_s[chain] - before_s
            wanted["step_after"] = self._random.randint(*_SET_AFTER_LOOKS)
        job = Job(
            **{
                "number": self.launches,
                "folder": str(self._place.folder),
                "url": self._server.url,
                "rows": self._rows,
                "seed": self._settings.seed,
                "latency_s": LATENCY_S,
                "on_unknown": self._settings.on_unknown,
                "policy": {**_POLICY, "patience_s": self._settings.patience_s},
                "ahead_s": self._host(chain).ahead_s,
                **wanted,
            }
        )
        return await self._workers[chain % len(self._workers)].start(job)

    async def _ended(self, worker: Worker, *, may_stop: bool = False) -> int:
        """Wait for a worker's end; notes those that end with an error, and those that do not.

        One that ``may_stop`` may end with an error for the person who reads it.
        """
        status: int | None = None
        with anyio.move_on_after(self._hung_after_s):
            status = await worker.wait()
        if status is None:
            self.hung.append(worker.number)
            await worker.kill()
            await worker.wait()
            return 1
        if status not in (0, KILLED) and not (may_stop and status == STOPPED):
            self.crashed.append(worker.number)
        return status

    # -- episodes -----------------------------------------------------------------------------

    async def _take(self, step: _Step, episode: Episode) -> None:
        number = self.episodes
        if step is _Step.EPISODE:
            await self._meet(episode, number)
            self.episodes += 1
        elif episode.earlier is not None:
            await anyio.to_thread.run_sync(episode.earlier, self._place, number)

    async def _meet(self, episode: Episode, number: int) -> None:
        """Have one worker meet the episode, mend the world, and let others finish what is open."""
        await self._server.calm({})
        if episode.amid_purchases:
            self._open_for_episode()
            await self._ended(await self._launch(edge=TASK_EXISTS, passage=2))
        else:
            await self._finish_what_is_open()
        images = await anyio.to_thread.run_sync(file_stamps, self._place.storage)
        posts = await self._server.posts()
        if episode.opens:
            self._open_for_episode()
        await self._server.calm(episode.rates)
        await anyio.to_thread.run_sync(episode.enter, self._place, number)
        if episode.midway is not None:
            await self._server.script("delay_create", len(self._requests), _KEPT_ANSWER_S)
        worker = await self._launch(
            edge=episode.killed_at, api_key=episode.api_key, ahead_s=episode.ahead_s
        )
        if episode.midway is not None:
            await self._until_bought(worker, posts)
            await anyio.to_thread.run_sync(episode.midway, self._place, number)
        status = await self._ended(worker, may_stop=True)
        refused = status == STOPPED and await self._server.posts() == posts
        self.refused += refused
        self.stopped += status == STOPPED and not refused
        await anyio.to_thread.run_sync(partial(episode.leave, self._place, number, refused=refused))
        await self._server.calm(episode.mended_rates)
        await self._finish_what_is_open()
        if not episode.amid_purchases:
            now = await anyio.to_thread.run_sync(file_stamps, self._place.storage)
            self.overwritten += [
                key for key, stamp in images.items() if now.get(key, stamp) != stamp
            ]
        await self._server.calm(self._settings.rates)

    async def _finish_with_other_keys(self) -> None:
        """Let the account of an episode fetch once more what is its own, and nobody else can."""
        episode = self._part.episode
        if episode is not None and episode.api_key != API_KEY:
            await self._server.calm({})
            worker = await self._launch(api_key=episode.api_key, setting=False)
            await self._ended(worker, may_stop=True)

    async def _until_bought(self, worker: Worker, posts: int) -> None:
        """Wait until the server has had more purchases than so many, or the worker has ended."""

        async def has_bought() -> bool:
            return await self._server.posts() > posts

        await self._until(worker, has_bought)

    async def _until(self, worker: Worker, is_so: Callable[[], Awaitable[bool]]) -> None:
        """Ask the server until something is so, or the worker has ended."""
        with anyio.move_on_after(self._hung_after_s):
            while not (worker.ended.is_set() or await is_so()):
                with anyio.move_on_after(_LOOK_EVERY_S):
                    await worker.ended.wait()

    async def _finish_what_is_open(self) -> None:
        """Let workers work, with right clocks, until nothing of the rows so far changes."""
        before: object = None
        for _ in range(_MOST_PASSES):
            await self._ended(await self._launch(setting=False))
            now = await self._states()
            if now == before or _ENDED.issuperset(now) or self._went_wrong:
                return
            before = now

    def _open_for_episode(self) -> None:
        kept = len(self._requests) * _KEPT_BACK
        more = max(1, round(kept / 2 / self._settings.episodes))
        self._rows = min(len(self._requests), self._rows + more)

    # -- the end ------------------------------------------------------------------------------

    async def finish(self) -> int:
        """Let workers work that are not killed, until nothing changes; returns how often."""
        await self._finish_with_other_keys()
        await self._server.calm(self._settings.rates)
        self._rows = len(self._requests)
        for workers in self._workers:  # so that the first does not work alone
            await workers.ready.wait()
        before: object = None
        for number in range(1, _MOST_PASSES + 1):
            # Where nobody is killed this is where clocks are set.
            setting = number == 1 and not self._part.kills
            async with anyio.create_task_group() as group:
                group.start_soon(self._tell_now_and_then)
                async with anyio.create_task_group() as lives:
                    for chain in range(self._settings.workers):
                        worker = await self._launch(chain, setting=setting)
                        lives.start_soon(self._ended, worker)
                        if not self._part.kills:  # the next worker comes upon its purchases
                            await self._until_bought(worker, posts=0)
                group.cancel_scope.cancel()
            now = await self._states()
            if now == before or _ENDED.issuperset(now) or self._went_wrong:
                return number
            before = now
        return _MOST_PASSES

    async def reckon(self) -> Reckoning:
        """Compare, once the server's tasks have ended that ever will."""
        await self._tell("comparing the books")
        books = await self._settled_books()
        text = json.dumps(books, indent=1)
        (self._place.folder / "books.json").write_text(text, encoding="utf-8")
        files = await anyio.to_thread.run_sync(file_hashes, self._place.storage)
        records = {record.request_key: record for record in await self._records()}
        return self._compared(books, records, files)

    def _compared(
        self, books: Mapping[str, Any], records: Mapping[str, Record], files: Mapping[str, str]
    ) -> Reckoning:
        posts, tasks = books["submit_posts"], server_tasks(books)
        return reckon(self._requests, posts, tasks, records, files, adopts=self._part.adopts)

    async def _settled_books(self) -> dict[str, Any]:
        deadline_s = time.monotonic() + 20 * LATENCY_S
        while True:
            books = await self._server.books()
            open_tasks = [task for task in server_tasks(books) if task.unfinished]
            if all(_never_ends(task) for task in open_tasks) or time.monotonic() > deadline_s:
                return books
            await anyio.sleep(LATENCY_S)

    # -- looking ------------------------------------------------------------------------------

    async def _records(self) -> list[Record]:
        return await self._read(lambda journal: list(journal.all_records()))

    async def _states(self) -> Mapping[State, int]:
        return await self._read(lambda journal: journal.count_by_state())

    async def _read(self, read: Callable[[Journal], _T]) -> _T:
        """Read in the journal, which may be another one each time."""

        def opened() -> _T:
            with closing(Journal(self._place.journal_url)) as journal:
                return read(journal)

        return await anyio.to_thread.run_sync(opened)

    async def _tell(self, doing: str) -> None:
        states = await self._states()
        kills = sum(self.kills.values()) + self.random_kills
        self._on_progress(Progress(doing, kills, states.get(State.STORED, 0)))

    async def _tell_now_and_then(self) -> None:
        while True:
            await self._tell("finishing")
            await anyio.sleep(1.0)


def _with_episodes(kills: Sequence[Kill], episodes: int) -> list[Kill | _Step]:
    """The kills, with the episodes spread among them, and what each does earlier before it."""
    steps: list[Kill | _Step] = list(kills)
    for number in range(episodes, 0, -1):  # from the end, so that the earlier places stay right
        end, start = (round(len(kills) * at / episodes) for at in (number, number - 1))
        steps.insert(end, _Step.EPISODE)
        steps.insert((start + end) // 2, _Step.EARLIER)
    return steps


def _never_ends(task: ServerTask) -> bool:
    return bool(task.faults & {"stuck", "unknown_final_status"})


def file_hashes(root: Path) -> dict[str, str]:
    """The sha256 of each published image, by request key."""
    return {
        path.stem: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (root / "images").glob("??/*.*")
    }


def file_stamps(root: Path) -> dict[str, tuple[int, int]]:
    """Which file each published image is and when it was written, by request key."""
    return {
        path.stem: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in (root / "images").glob("??/*.*")
    }
