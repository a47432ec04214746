"""The drill: buy with workers that are killed, let a last one finish, and compare the books.

The storm is the same without kills and with every fault of the server at once.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.abc
import anyio.to_thread

from krea_dagster.drill.edges import Edge, edges_under
from krea_dagster.drill.job import Job, journal_url, storage_root, write_requests
from krea_dagster.drill.reckoning import Reckoning, ServerTask, body_of, reckon, server_tasks
from krea_dagster.drill.server import Server, emulator
from krea_dagster.drill.workers import COMMAND, KILLED, Worker, Workers, fork_server
from krea_dagster.engine.journal import Journal
from krea_dagster.engine.policy import OnUnknown
from krea_dagster.engine.record import Record
from krea_dagster.engine.states import State
from krea_dagster.models import ImageRequest
from krea_dagster.prompts.requests import request_key

#: Faults that strike at a small rate while workers are killed.
KILL_FAULTS: Final = (
    "drop_before_create",
    "drop_after_create",
    "reset_after_create",
    "garbage_after_create",
    "500",
    "500_after_create",
    "502_html",
    "502_html_after_create",
    "no_id",
    "html_200",
    "429_no_retry_after",
    "no_results",
    "read_drop",
    "read_500",
    "batch_drop",
    "batch_502_html",
    "file_drop",
    "truncated",
    "file_html_200",
)
#: Faults of the storm: all at once.
STORM_FAULTS: Final = (
    "drop_before_create",
    "drop_after_create",
    "429",
    "429_no_retry_after",
    "500",
    "500_after_create",
    "502_html",
    "502_html_after_create",
    "stuck",
    "no_results",
    "unknown_status",
    "unknown_final_status",
    "fail",
    "unknown_error_code",
    "read_drop",
    "read_429",
    "read_500",
    "read_502_html",
    "batch_drop",
    "batch_500",
    "batch_502_html",
    "truncated",
    "file_html_200",
    "black",
    "wrong_dimensions",
)

#: Waits of minutes in production are waits of milliseconds in the drill.
_POLICY: Final[Mapping[str, Any]] = {"wait_scale": 0.001, "gone_after_s": 0.2}
#: Seconds that the emulator's tasks take.
_LATENCY_S: Final = 0.1
#: The latest time of a random kill, after the start of its worker.
_RANDOM_WITHIN_S: Final = 0.6
#: How often a planned kill is tried before it counts as never reached.
_TRIES: Final = 8
#: Share of the kills that are at edges; the others are at random times.
_AT_EDGES: Final = 0.75
#: The latest passage of an edge at which a worker is killed.
_LATEST_PASSAGE: Final = 4
#: Share of the rows that is kept for kills that must be tried again, and for the last worker.
_KEPT_BACK: Final = 0.25
_MOST_PASSES: Final = 12
_SUBJECTS: Final = ("a lighthouse", "a heron", "a tram", "a greenhouse", "a market", "a glacier")
_LIGHTS: Final = ("at dawn", "in fog", "under neon", "at noon", "by candlelight", "in the rain")

#: States in which the engine has nothing more to do, whatever the policy.
_ENDED: Final = frozenset({State.STORED, State.FAILED, State.REFUSED, State.EXPIRED})


@dataclass(frozen=True)
class Plan:
    """What a drill does.

    ``honours_key``: whether the server honours the Idempotency-Key. ``rates`` are faults of
    the server by name, from 0 to 1, all at once. ``workers`` work at the same time on the same
    rows. ``patience_s`` is how long a worker waits for a task before it detaches from it.
    ``command`` starts the fork server.
    """

    requests: int = 200
    kills: int = 60
    workers: int = 1
    on_unknown: OnUnknown = "replay"
    honours_key: bool = True
    rates: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    patience_s: float = 4.0
    command: Sequence[str] = COMMAND


@dataclass(frozen=True)
class Progress:
    """How far a drill is: what it does, kills done, and images stored."""

    doing: str
    kills: int = 0
    stored: int = 0


@dataclass(frozen=True)
class Outcome:
    """How a drill ended.

    ``kills`` counts the kills by edge, ``random_kills`` those at random times, and
    ``kills_missed`` those that were planned and not made, because every worker ended before.
    ``never_reached`` were planned and not reached, ``not_planned`` were left out because there
    were too few kills. ``crashed`` are workers that ended by themselves with an error and
    ``hung`` those that did not end; both are faults. ``launches`` counts worker processes,
    ``passes`` those rounds of them at the end that were not killed.
    """

    reckoning: Reckoning
    kills: Mapping[str, int]
    random_kills: int
    kills_missed: int
    never_reached: Sequence[str]
    not_planned: Sequence[str]
    crashed: Sequence[int]
    hung: Sequence[int]
    launches: int
    passes: int
    seconds: float
    policy: OnUnknown

    @property
    def faults(self) -> list[str]:
        """What must not be, in words; empty where the drill is passed."""
        found = self.reckoning.faults(self.policy)
        if self.crashed:
            found.append(f"{len(self.crashed)} workers ended with an error")
        if self.hung:
            found.append(f"{len(self.hung)} workers did not end")
        return found


def requests_of(plan: Plan) -> list[ImageRequest]:
    """The drill's requests: the same for the same seed and number."""
    drawn = random.Random(plan.seed)  # noqa: S311 - nothing secret
    requests = []
    for number in range(plan.requests):
        prompt = f"{drawn.choice(_SUBJECTS)} {drawn.choice(_LIGHTS)}, drill {plan.seed}/{number}"
        what = {"prompt": prompt, "size": "1:2", "quality": "1K", "seed": number + 1}
        key = request_key(
            prompt=prompt, size="1:2", quality="1K", seed=number + 1, nsfw_check=False
        )
        requests.append(ImageRequest(request_key=key, nsfw_check=False, attempt=0, **what))  # type: ignore[arg-type]  # the values' types are mixed
    return requests


@dataclass
class Kill:
    """A kill that is to be made: at an edge, or at a random time (None)."""

    edge: Edge | None
    tries: int = 0


def plan_kills(count: int, policy: OnUnknown, drawn: random.Random) -> list[Kill]:
    """So many kills: three of four at edges, each edge once before any is twice."""
    at_edges = round(count * _AT_EDGES)
    chosen: list[Edge] = []
    while len(chosen) < at_edges:
        cycle = list(edges_under(policy))
        drawn.shuffle(cycle)
        chosen += cycle[: at_edges - len(chosen)]
    kills = [Kill(edge) for edge in chosen] + [Kill(None) for _ in range(count - at_edges)]
    drawn.shuffle(kills)
    return kills


async def drill(
    plan: Plan, folder: Path, on_progress: Callable[[Progress], None] = lambda _: None
) -> Outcome:
    """Run a drill in an empty folder, which holds the journal, the images and the books after.

    Raises KreaError where a process of the drill does not start.
    """
    started_s = time.monotonic()
    on_progress(Progress("starting the emulator"))
    requests = requests_of(plan)
    write_requests(folder, requests)
    journal = await anyio.to_thread.run_sync(Journal, journal_url(folder))
    async with (
        fork_server(folder, plan.command) as workers,  # first: it imports meanwhile
        emulator(
            folder,
            honours_key=plan.honours_key,
            latency_s=_LATENCY_S,
            seed=plan.seed,
            rates=plan.rates,
        ) as server,
    ):
        try:
            running = _Drill(
                plan,
                folder=folder,
                requests=requests,
                journal=journal,
                server=server,
                workers=workers,
                on_progress=on_progress,
            )
            await running.kill_all()
            passes = await running.finish()
            reckoning = await running.reckon()
        finally:
            journal.close()
    planned = {kill.edge.name for kill in running.plan if kill.edge is not None}
    return Outcome(
        reckoning=reckoning,
        kills=dict(running.kills),
        random_kills=running.random_kills,
        kills_missed=plan.kills - sum(running.kills.values()) - running.random_kills,
        never_reached=sorted(planned - set(running.kills)),
        not_planned=[
            edge.name for edge in edges_under(plan.on_unknown) if edge.name not in planned
        ],
        crashed=running.crashed,
        hung=running.hung,
        launches=running.launches,
        passes=passes,
        seconds=time.monotonic() - started_s,
        policy=plan.on_unknown,
    )


class _Drill:
    """One drill under way."""

    def __init__(
        self,
        plan: Plan,
        *,
        folder: Path,
        requests: Sequence[ImageRequest],
        journal: Journal,
        server: Server,
        workers: Workers,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self._settings = plan
        self._folder = folder
        self._requests = requests
        self._journal = journal
        self._server = server
        self._workers = workers
        self._on_progress = on_progress
        self._random = random.Random(f"{plan.seed}:kills")  # noqa: S311 - nothing secret
        self.plan = plan_kills(plan.kills, plan.on_unknown, self._random)
        self._to_do = deque(self.plan)
        self._rows = 0
        self._first_rows = 0  # of those, the ones opened for a kill's first try
        self._hung_after_s = 60.0 + plan.requests
        self.kills: Counter[str] = Counter()
        self.random_kills = 0
        self.crashed: list[int] = []
        self.hung: list[int] = []
        self.launches = 0

    # -- killing ------------------------------------------------------------------------------

    async def kill_all(self) -> None:
        """Make the planned kills, with so many workers at a time."""
        async with anyio.create_task_group() as group:
            for _ in range(self._settings.workers):
                group.start_soon(self._kill_one_after_another)

    async def _kill_one_after_another(self) -> None:
        while self._to_do and not self.crashed and not self.hung:
            kill = self._to_do.popleft()
            kill.tries += 1
            if not await self._make(kill) and kill.tries < _TRIES:
                self._to_do.append(kill)
            await self._tell("killing")

    async def _make(self, kill: Kill) -> bool:
        """Start a worker and have it killed; False where it ended before."""
        self._open_rows(kill)
        if kill.edge is None:
            return await self._kill_at_random(kill)
        edge = kill.edge
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
        if edge.faults:
            if self._settings.workers == 1:
                await self._server.calm(self._settings.rates)  # what an earlier worker left over
            await self._server.script(self._random.choice(edge.faults), passage + kill.tries - 1)
        worker = await self._launch(edge=edge.name, passage=passage, resolutions=resolutions)
        if await self._ended(worker) != KILLED:
            return False
        self.kills[edge.name] += 1
        return True

    async def _kill_at_random(self, kill: Kill) -> bool:
        worker = await self._launch()
        after_s = self._random.uniform(0, _RANDOM_WITHIN_S / kill.tries)
        with anyio.move_on_after(after_s):
            await worker.ended.wait()
        await self._workers.kill(worker)
        if await self._ended(worker) != KILLED:
            return False
        self.random_kills += 1
        return True

    def _open_rows(self, kill: Kill) -> None:
        """Let the next worker see some more rows, now one and now many, so that it has work."""
        if kill.tries > 1:
            more = 1
        else:
            still = 1 + sum(one.tries == 0 for one in self._to_do)
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
                (storage_root(self._folder) / record.image.path).unlink(missing_ok=True)
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

    async def _launch(
        self, *, edge: str = "", passage: int = 1, resolutions: Mapping[str, str] | None = None
    ) -> Worker:
        self.launches += 1
        job = Job(
            number=self.launches,
            folder=str(self._folder),
            url=self._server.url,
            rows=self._rows,
            seed=self._settings.seed,
            latency_s=_LATENCY_S,
            edge=edge,
            passage=passage,
            policy={
                **_POLICY,
                "on_unknown": self._settings.on_unknown,
                "patience_s": self._settings.patience_s,
            },
            resolutions=resolutions or {},
        )
        return await self._workers.start(job)

    async def _ended(self, worker: Worker) -> int:
        """Wait for a worker's end; notes those that end with an error, and those that do not."""
        status: int | None = None
        with anyio.move_on_after(self._hung_after_s):
            status = await self._workers.wait(worker)
        if status is None:
            self.hung.append(worker.number)
            await self._workers.kill(worker)
            await self._workers.wait(worker)
            return 1
        if status not in (0, KILLED):
            self.crashed.append(worker.number)
        return status

    # -- the end ------------------------------------------------------------------------------

    async def finish(self) -> int:
        """Let workers work that are not killed, until nothing changes; returns how often."""
        await self._server.calm(self._settings.rates)
        self._rows = len(self._requests)
        before: object = None
        for number in range(1, _MOST_PASSES + 1):
            async with anyio.create_task_group() as group:
                group.start_soon(self._tell_now_and_then)
                async with anyio.create_task_group() as lives:
                    for _ in range(self._settings.workers):
                        lives.start_soon(self._live)
                group.cancel_scope.cancel()
            now = Counter(record.state for record in await self._records())
            if now == before or _ENDED.issuperset(now) or self.crashed or self.hung:
                return number
            before = now
        return _MOST_PASSES

    async def _live(self) -> None:
        await self._ended(await self._launch())

    async def reckon(self) -> Reckoning:
        """Compare, once the server's tasks have ended that ever will."""
        await self._tell("comparing the books")
        books = await self._settled_books()
        (self._folder / "books.json").write_text(json.dumps(books, indent=1), encoding="utf-8")
        files = await anyio.to_thread.run_sync(file_hashes, storage_root(self._folder))
        records = {record.request_key: record for record in await self._records()}
        return reckon(self._requests, books["submit_posts"], server_tasks(books), records, files)

    async def _settled_books(self) -> dict[str, Any]:
        deadline_s = time.monotonic() + 20 * _LATENCY_S
        while True:
            books = await self._server.books()
            open_tasks = [task for task in server_tasks(books) if task.unfinished]
            if all(_never_ends(task) for task in open_tasks) or time.monotonic() > deadline_s:
                return books
            await anyio.sleep(_LATENCY_S)

    # -- looking ------------------------------------------------------------------------------

    async def _records(self) -> list[Record]:
        return await anyio.to_thread.run_sync(lambda: list(self._journal.all_records()))

    async def _tell(self, doing: str) -> None:
        states = await anyio.to_thread.run_sync(self._journal.count_by_state)
        kills = sum(self.kills.values()) + self.random_kills
        self._on_progress(Progress(doing, kills, states.get(State.STORED, 0)))

    async def _tell_now_and_then(self) -> None:
        while True:
            await self._tell("finishing")
            await anyio.sleep(1.0)


def _never_ends(task: ServerTask) -> bool:
    return bool(task.faults & {"stuck", "unknown_final_status"})


def file_hashes(root: Path) -> dict[str, str]:
    """The sha256 of each published image, by request key."""
    return {
        path.stem: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (root / "images").glob("??/*.*")
    }
