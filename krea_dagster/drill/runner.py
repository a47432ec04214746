"""Runs the workers of a drill: those that are killed, those that meet an episode, the last ones."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import anyio
import anyio.abc
import anyio.to_thread

from krea_dagster.drill.edges import TASK_EXISTS, Edge
from krea_dagster.drill.emulator_server import EmulatorServer
from krea_dagster.drill.fork_server_client import KILLED, ForkServerClient, WorkerProcess
from krea_dagster.drill.job import API_KEY, DrillPaths, WorkerJob
from krea_dagster.drill.plan import DrillPlan, Kill, plan_kills
from krea_dagster.drill.reconcile import (
    Reconciliation,
    ServerTask,
    body_of,
    reconcile,
    server_tasks,
)
from krea_dagster.drill.worker import STOPPED
from krea_dagster.drill.worlds import WorkerHost, WorldEpisode
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
#: The first and the last read of a wall clock at which it may be set.
_SET_AFTER_READS: Final = (3, 60)
#: How long the server delays a response until the worker that waits for it is killed.
_DELAYED_RESPONSE_S: Final = 0.5
_POLL_EVERY_S: Final = 0.01
#: Share of the rows that is kept for episodes, for kills that must be tried again, and for the
#: last workers.
_KEPT_BACK: Final = 0.25
_MOST_PASSES: Final = 12

#: States in which the engine has nothing more to do, under any policy.
_ENDED: Final = frozenset({State.STORED, State.FAILED, State.REFUSED, State.EXPIRED})


@dataclass(frozen=True)
class DrillProgress:
    """The progress of a drill: the current step, the kills made, and the images stored."""

    doing: str
    kills: int = 0
    stored: int = 0


@dataclass
class DrillCounts:
    """What happened to the workers of a drill.

    ``kills`` counts the kills by edge, ``random_kills`` those at random times. Workers that
    ``crashed`` ended with an error, workers that ``hung`` did not end; both are violations.
    ``launches`` counts worker processes. In some ``episodes`` the worker ``refused``: it ended with
    a clear error before it requested a purchase. In some it ``stopped`` with one later.
    ``overwritten`` are stored images that were written again during an episode, by request key.
    """

    kills: Counter[str] = field(default_factory=Counter)
    random_kills: int = 0
    crashed: list[int] = field(default_factory=list)
    hung: list[int] = field(default_factory=list)
    launches: int = 0
    episodes: int = 0
    refused: int = 0
    stopped: int = 0
    overwritten: list[str] = field(default_factory=list)

    @property
    def all_kills(self) -> int:
        """The number of kills, at edges and at random times."""
        return self.kills.total() + self.random_kills


class _EpisodeStep(Enum):
    """A step between the kills: an episode, or what it does some workers earlier."""

    EARLIER = "earlier"
    EPISODE = "episode"


class DrillRunner:
    """Runs one drill. ``fork_servers`` has one for each host of the plan's part."""

    def __init__(
        self,
        plan: DrillPlan,
        *,
        paths: DrillPaths,
        requests: Sequence[ImageRequest],
        emulator: EmulatorServer,
        fork_servers: Sequence[ForkServerClient],
        on_progress: Callable[[DrillProgress], None],
    ) -> None:
        self._plan = plan
        self._part = plan.part
        self._paths = paths
        self._requests = requests
        self._emulator = emulator
        self._fork_servers = fork_servers
        self._on_progress = on_progress
        self._random = random.Random(f"{plan.seed}:kills")  # noqa: S311 - nothing secret
        self.kills = plan_kills(plan.kills, plan.on_unknown, self._random, plan.edges)
        self._steps: deque[Kill | _EpisodeStep] = deque(_with_episodes(self.kills, plan.episodes))
        self._rows = 0
        self._first_rows = 0  # of those, the ones opened for a kill's first try
        default_s = 60.0 + plan.requests / 10
        self._hung_after_s = default_s if plan.hung_after_s is None else plan.hung_after_s
        self._ahead_s = [self._host(chain).ahead_s for chain in range(plan.workers)]
        self.counts = DrillCounts()

    def _host(self, chain: int) -> WorkerHost:
        return self._part.hosts[chain % len(self._part.hosts)]

    @property
    def _went_wrong(self) -> bool:
        return bool(self.counts.crashed or self.counts.hung)

    # -- killing ------------------------------------------------------------------------------

    async def kill_all(self) -> None:
        """Make the planned kills and episodes, in as many chains of workers as planned."""
        async with anyio.create_task_group() as group:
            for chain in range(self._plan.workers):
                group.start_soon(self._run_chain, chain)

    async def _run_chain(self, chain: int) -> None:
        while self._steps and not self._went_wrong:
            step = self._steps.popleft()
            if isinstance(step, Kill):
                step.tries += 1
                if not await self._kill(step, chain) and step.tries < _TRIES:
                    self._steps.append(step)
            elif self._part.episode is not None:
                await self._take_step(step, self._part.episode)
            await self._report("killing")

    async def _kill(self, kill: Kill, chain: int) -> bool:
        """Start a worker and have it killed; return False if it ended before."""
        self._open_rows(kill)
        if self._plan.workers == 1:
            await self._emulator.reset_faults(self._plan.rates)  # left over from earlier workers
        edge = kill.edge
        if edge is None:
            return await self._kill_at_random(kill, chain)
        passage = 1
        if not edge.first_only and kill.tries == 1:
            passage = self._random.randint(1, _LATEST_PASSAGE)
        resolutions: dict[str, str] = {}
        if edge.file_missing and not await self._delete_files(passage):
            return False
        if edge.resolves:
            resolutions = await self._resolve(passage)
            if len(resolutions) < passage:
                return False
        if edge.outside:
            return await self._kill_unanswered(edge, chain)
        if edge.faults:
            await self._emulator.script(self._random.choice(edge.faults), passage + kill.tries - 1)
        worker = await self._launch(chain, edge=edge.name, passage=passage, resolutions=resolutions)
        return await self._is_killed(worker, edge)

    async def _is_killed(self, worker: WorkerProcess, edge: Edge) -> bool:
        if await self._ended(worker) != KILLED:
            return False
        self.counts.kills[edge.name] += 1
        return True

    async def _kill_at_random(self, kill: Kill, chain: int) -> bool:
        worker = await self._launch(chain)
        after_s = self._random.uniform(0, _RANDOM_WITHIN_S / kill.tries)
        with anyio.move_on_after(after_s):
            await worker.ended.wait()
        await worker.kill()
        if await self._ended(worker) != KILLED:
            return False
        self.counts.random_kills += 1
        return True

    async def _kill_unanswered(self, edge: Edge, chain: int) -> bool:
        """Kill a worker whose purchase the server has, while the response is delayed."""
        await self._emulator.script(edge.faults[0], 1, _DELAYED_RESPONSE_S)
        worker = await self._launch(chain)
        await self._until(worker, self._emulator.all_struck)
        await worker.kill()
        return await self._is_killed(worker, edge)

    def _open_rows(self, kill: Kill) -> None:
        """Let the next worker see more rows, sometimes one and sometimes many, so it has work."""
        if kill.tries > 1:
            more = 1
        else:
            waiting = sum(isinstance(step, Kill) and step.tries == 0 for step in self._steps)
            left = round(len(self._requests) * (1 - _KEPT_BACK)) - self._first_rows
            share = max(0.0, left / (1 + waiting))
            drawn = round(self._random.expovariate(1.0) * share)
            more = max(1, min(drawn, round(4 * share), left - 1 - waiting))
            self._first_rows += more
        self._rows = min(len(self._requests), self._rows + more)

    async def _delete_files(self, count: int) -> bool:
        """Delete stored files; return False if there are not enough."""
        stored = [record for record in await self._records() if record.state is State.STORED]
        chosen = self._random.sample(stored, min(count, len(stored)))
        for record in chosen:
            if record.image is not None:
                (self._paths.storage / record.image.path).unlink(missing_ok=True)
        return len(chosen) == count

    async def _resolve(self, count: int) -> dict[str, str]:
        """Decide unknown outcomes as a person would who looks at the account.

        Only those without a task at the server: they were not charged.
        """
        key_of = {body_of(request): request.request_key for request in self._requests}
        tasks = server_tasks(await self._emulator.stats())
        bought = {key_of.get(task.body) for task in tasks}
        free = [
            record.request_key
            for record in await self._records()
            if record.state is State.UNKNOWN and record.request_key not in bought
        ]
        return dict.fromkeys(free[:count], "not-charged")

    # -- workers ------------------------------------------------------------------------------

    async def _launch(
        self, chain: int = 0, *, set_clock: bool = True, **fields: Any
    ) -> WorkerProcess:
        """Start a worker; ``fields`` are fields of its job. Its clock may be set while it runs."""
        self.counts.launches += 1
        for name, times, arg in self._part.scripts:
            await self._emulator.script(name, times, arg)
        if self._part.steps_s and set_clock and "ahead_s" not in fields:
            before_s = self._ahead_s[chain]
            self._ahead_s[chain] = self._random.choice((0.0, *self._part.steps_s))
            fields["ahead_s"] = before_s
            fields["step_s"] = self._ahead_s[chain] - before_s
            fields["step_after"] = self._random.randint(*_SET_AFTER_READS)
        job = WorkerJob(
            **{
                "number": self.counts.launches,
                "folder": str(self._paths.folder),
                "url": self._emulator.url,
                "rows": self._rows,
                "seed": self._plan.seed,
                "latency_s": LATENCY_S,
                "on_unknown": self._plan.on_unknown,
                "policy": {**_POLICY, "patience_s": self._plan.patience_s},
                "ahead_s": self._host(chain).ahead_s,
                **fields,
            }
        )
        return await self._fork_servers[chain % len(self._fork_servers)].start(job)

    async def _ended(self, worker: WorkerProcess, *, may_stop: bool = False) -> int:
        """Wait for a worker's end, and note the workers that crash or hang.

        With ``may_stop`` it may end with an error meant for people.
        """
        status: int | None = None
        with anyio.move_on_after(self._hung_after_s):
            status = await worker.wait()
        if status is None:
            self.counts.hung.append(worker.number)
            await worker.kill()
            await worker.wait()
            return 1
        if status not in (0, KILLED) and not (may_stop and status == STOPPED):
            self.counts.crashed.append(worker.number)
        return status

    # -- episodes -----------------------------------------------------------------------------

    async def _take_step(self, step: _EpisodeStep, episode: WorldEpisode) -> None:
        number = self.counts.episodes
        if step is _EpisodeStep.EPISODE:
            await self._run_episode(episode, number)
            self.counts.episodes += 1
        elif episode.earlier is not None:
            await anyio.to_thread.run_sync(episode.earlier, self._paths, number)

    async def _run_episode(self, episode: WorldEpisode, number: int) -> None:
        """Have one worker meet the episode, mend the world, and let others finish open rows."""
        await self._emulator.reset_faults({})
        if episode.amid_purchases:
            self._open_rows_for_episode()
            await self._ended(await self._launch(edge=TASK_EXISTS, passage=2))
        else:
            await self._finish_open_rows()
        stamps = await anyio.to_thread.run_sync(file_stamps, self._paths.storage)
        posts = await self._emulator.posts()
        if episode.opens:
            self._open_rows_for_episode()
        await self._emulator.reset_faults(episode.rates)
        await anyio.to_thread.run_sync(episode.enter, self._paths, number)
        if episode.midway is not None:
            await self._emulator.script("delay_create", len(self._requests), _DELAYED_RESPONSE_S)
        worker = await self._launch(
            edge=episode.killed_at, api_key=episode.api_key, ahead_s=episode.ahead_s
        )
        if episode.midway is not None:
            await self._until_bought(worker, posts)
            await anyio.to_thread.run_sync(episode.midway, self._paths, number)
        status = await self._ended(worker, may_stop=True)
        refused = status == STOPPED and await self._emulator.posts() == posts
        self.counts.refused += refused
        self.counts.stopped += status == STOPPED and not refused
        await anyio.to_thread.run_sync(partial(episode.leave, self._paths, number, refused=refused))
        await self._emulator.reset_faults(episode.mended_rates)
        await self._finish_open_rows()
        if not episode.amid_purchases:
            now = await anyio.to_thread.run_sync(file_stamps, self._paths.storage)
            self.counts.overwritten += [
                key for key, stamp in stamps.items() if now.get(key, stamp) != stamp
            ]
        await self._emulator.reset_faults(self._plan.rates)

    async def _finish_with_other_key(self) -> None:
        """Let an episode's other account fetch its own images, which no other account can."""
        episode = self._part.episode
        if episode is not None and episode.api_key != API_KEY:
            await self._emulator.reset_faults({})
            worker = await self._launch(api_key=episode.api_key, set_clock=False)
            await self._ended(worker, may_stop=True)

    async def _until_bought(self, worker: WorkerProcess, posts: int) -> None:
        """Wait until the server has had more than ``posts`` purchases, or the worker has ended."""

        async def has_bought() -> bool:
            return await self._emulator.posts() > posts

        await self._until(worker, has_bought)

    async def _until(self, worker: WorkerProcess, holds: Callable[[], Awaitable[bool]]) -> None:
        """Poll until a condition holds, or the worker has ended."""
        with anyio.move_on_after(self._hung_after_s):
            while not (worker.ended.is_set() or await holds()):
                with anyio.move_on_after(_POLL_EVERY_S):
                    await worker.ended.wait()

    async def _finish_open_rows(self) -> None:
        """Let workers with right clocks finish the rows that are open so far."""

        async def run_one(_number: int) -> None:
            await self._ended(await self._launch(set_clock=False))

        await self._until_settled(run_one)

    async def _until_settled(self, run_pass: Callable[[int], Awaitable[None]]) -> int:
        """Run passes until the rows' states do not change; return how many."""
        before: object = None
        for number in range(1, _MOST_PASSES + 1):
            await run_pass(number)
            now = await self._states()
            if now == before or _ENDED.issuperset(now) or self._went_wrong:
                return number
            before = now
        return _MOST_PASSES

    def _open_rows_for_episode(self) -> None:
        kept = len(self._requests) * _KEPT_BACK
        more = max(1, round(kept / 2 / self._plan.episodes))
        self._rows = min(len(self._requests), self._rows + more)

    # -- the end ------------------------------------------------------------------------------

    async def finish(self) -> int:
        """Let workers work that are not killed, until nothing changes; return the passes."""
        await self._finish_with_other_key()
        await self._emulator.reset_faults(self._plan.rates)
        self._rows = len(self._requests)
        for fork_server in self._fork_servers:  # so that the first worker does not work alone
            await fork_server.ready.wait()

        async def run_all(number: int) -> None:
            # In a part without kills, clocks are set here.
            set_clock = number == 1 and not self._part.kills
            async with anyio.create_task_group() as group:
                group.start_soon(self._keep_reporting)
                async with anyio.create_task_group() as workers:
                    for chain in range(self._plan.workers):
                        worker = await self._launch(chain, set_clock=set_clock)
                        workers.start_soon(self._ended, worker)
                        if not self._part.kills:  # the next worker meets its purchases
                            await self._until_bought(worker, posts=0)
                group.cancel_scope.cancel()

        return await self._until_settled(run_all)

    async def compare(self) -> Reconciliation:
        """Compare the server's records, the journal and the files, once all tasks have ended."""
        await self._report("comparing the records")
        stats = await self._final_stats()
        text = json.dumps(stats, indent=1)
        (self._paths.folder / "books.json").write_text(text, encoding="utf-8")
        files = await anyio.to_thread.run_sync(file_hashes, self._paths.storage)
        records = {record.request_key: record for record in await self._records()}
        return self._compare(stats, records, files)

    def _compare(
        self, stats: Mapping[str, Any], records: Mapping[str, Record], files: Mapping[str, str]
    ) -> Reconciliation:
        posts, tasks = stats["submit_posts"], server_tasks(stats)
        return reconcile(self._requests, posts, tasks, records, files, adopts=self._part.adopts)

    async def _final_stats(self) -> dict[str, Any]:
        deadline_s = time.monotonic() + 20 * LATENCY_S
        while True:
            stats = await self._emulator.stats()
            unfinished = [task for task in server_tasks(stats) if task.unfinished]
            if all(map(_never_ends, unfinished)) or time.monotonic() > deadline_s:
                return stats
            await anyio.sleep(LATENCY_S)

    # -- reading the journal ------------------------------------------------------------------

    async def _records(self) -> list[Record]:
        return await self._read(lambda journal: list(journal.all_records()))

    async def _states(self) -> Mapping[State, int]:
        return await self._read(lambda journal: journal.count_by_state())

    async def _read(self, read: Callable[[Journal], _T]) -> _T:
        """Open the journal, which an episode may have replaced, and read it."""

        def opened() -> _T:
            with closing(Journal(self._paths.journal_url)) as journal:
                return read(journal)

        return await anyio.to_thread.run_sync(opened)

    async def _report(self, doing: str) -> None:
        states = await self._states()
        progress = DrillProgress(doing, self.counts.all_kills, states.get(State.STORED, 0))
        self._on_progress(progress)

    async def _keep_reporting(self) -> None:
        while True:
            await self._report("finishing")
            await anyio.sleep(1.0)


def _with_episodes(kills: Sequence[Kill], episodes: int) -> list[Kill | _EpisodeStep]:
    """Spread the episodes among the kills, each with its earlier step before it."""
    steps: list[Kill | _EpisodeStep] = list(kills)
    for number in range(episodes, 0, -1):  # from the end, so that earlier places stay right
        end, start = (round(len(kills) * at / episodes) for at in (number, number - 1))
        steps.insert(end, _EpisodeStep.EPISODE)
        steps.insert((start + end) // 2, _EpisodeStep.EARLIER)
    return steps


def _never_ends(task: ServerTask) -> bool:
    return bool(task.faults & {"stuck", "unknown_final_status"})


def _images(root: Path) -> dict[str, Path]:
    return {path.stem: path for path in (root / "images").glob("??/*.*")}


def file_hashes(root: Path) -> dict[str, str]:
    """Return the sha256 of each published image, by request key."""
    return {
        key: hashlib.sha256(path.read_bytes()).hexdigest() for key, path in _images(root).items()
    }


def file_stamps(root: Path) -> dict[str, tuple[int, int]]:
    """Return each published image's inode and time of writing, by request key."""
    return {
        key: (path.stat().st_ino, path.stat().st_mtime_ns) for key, path in _images(root).items()
    }
