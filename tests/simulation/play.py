"""Plays a scenario: whole runs on virtual time, then calm runs, then the checks."""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Final

from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.policy import REJECTED
from krea_dagster.engine.resolution import HasTask, NotBought, Resolution
from krea_dagster.engine.states import State
from krea_dagster.errors import ConfigError
from tests.simulation import checks
from tests.simulation.loop import Stuck, VirtualLoop, ordered
from tests.simulation.process import Process
from tests.simulation.scenario import (
    HOUR_S,
    ClockStep,
    FaultRate,
    ForgedCallback,
    Kill,
    Outage,
    Run,
    Scenario,
    ScenarioEvent,
    ScriptedFault,
    Stop,
    TopUp,
)
from tests.simulation.world import SimulatedWorld, open_journal, present, remember

#: A run of this many virtual seconds counts as endless.
LIMIT_S: Final = 4 * HOUR_S
#: The calm runs start this long after the last run: slow tasks have ended by then.
_PAUSE_S: Final = 2 * HOUR_S
_MOST_CALM_RUNS: Final = 5


@dataclass
class ScenarioResult:
    """The result of a scenario. ``failures`` is empty if every check passed."""

    scenario: Scenario
    failures: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    digest: str = ""
    virtual_s: float = 0.0
    lines: list[str] = field(default_factory=list)


def play(
    scenario: Scenario, *, keep_lines: bool = False, parent: Path | None = None
) -> ScenarioResult:
    """Play a scenario in a folder below ``parent``, and check its result."""
    result = ScenarioResult(scenario)
    ordered()
    loop = VirtualLoop()
    folder = Path(tempfile.mkdtemp(prefix="krea-scenario-", dir=parent or memory()))
    before, tempfile.tempdir = tempfile.tempdir, str(folder / "tmp")
    logging.disable(logging.CRITICAL)
    unheard: list[str] = []
    loop.set_exception_handler(
        lambda _, context: unheard.append(f"{context['message']}: {context.get('exception')!r}")
    )
    try:
        (folder / "tmp").mkdir()
        (folder / "root").mkdir()
        (folder / "journal.db").write_bytes(_new_journal())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loop.run_until_complete(_play(scenario, folder, result, keep_lines=keep_lines))
    except Stuck as error:
        result.failures.append(str(error))
    finally:
        result.virtual_s = loop.time()
        _end(loop)
        tempfile.tempdir = before
        logging.disable(logging.NOTSET)
        shutil.rmtree(folder)
    return result


def memory() -> str | None:
    """Return a folder in memory, None if there is none."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - in a folder of its own


@lru_cache(maxsize=1)
def _new_journal() -> bytes:
    """Return an empty journal's file: making one takes longer than some scenarios."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "journal.db"
        Journal(f"sqlite:///{file}").close()
        return file.read_bytes()


def _end(loop: VirtualLoop) -> None:
    try:
        for _ in range(1000):
            left = [task for task in asyncio.all_tasks(loop) if not task.done()]
            if not left:
                break
            for task in left:
                task.cancel()
            loop.call_soon(loop.stop)
            loop.run_forever()
    except Stuck:
        pass
    loop.close()


async def _play(
    scenario: Scenario, folder: Path, result: ScenarioResult, *, keep_lines: bool
) -> None:
    world = SimulatedWorld(folder, scenario.server, scenario.seed)
    world.counts = result.counts
    world.lines = result.lines if keep_lines else None
    player = _Player(world, scenario, result)
    with present(world):
        if await player.scenario():
            await player.calm()
            result.failures += world.broken
            if not result.failures:
                checks.check_all(world, scenario, player.processes, result)
        result.failures += world.broken
        result.digest = world.trace.hexdigest()
        await world.close()


class _Player:
    def __init__(self, world: SimulatedWorld, scenario: Scenario, result: ScenarioResult) -> None:
        self.world = world
        self._scenario = scenario
        self._results = result
        self._numbered = {
            run.number: Process(
                world,
                run,
                scenario.rows,
                [k for k in scenario.events if isinstance(k, Kill) and k.run == run.number],
            )
            for run in scenario.runs
        }
        self.processes = list(self._numbered.values())
        self._began = {number: asyncio.Event() for number in self._numbered}
        self._ended = {number: asyncio.Event() for number in self._numbered}

    async def scenario(self) -> bool:
        """Play all events; return whether every run ended as it may."""
        others = [other for one in self._scenario.events if (other := self._happens(one))]
        background = [self.world.spawn(other) for other in others]
        runs = [self.world.spawn(self._run(run)) for run in self._scenario.runs]
        if runs:
            await asyncio.wait(runs)
        for task in background:
            task.cancel()
        if background:
            await asyncio.wait(background)
        for task in [*runs, *background]:
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error
        if all(process.ended == "done" for process in self.processes):
            self._results.failures += checks.not_waited_for(self._scenario, self._records())
        return not self._results.failures

    async def _run(self, run: Run) -> None:
        if run.after in self._ended:
            await self._ended[run.after].wait()
        await asyncio.sleep(run.at_s)
        process = self._numbered[run.number]
        living = process.start(process.carry)
        self._began[run.number].set()
        await self._end_of(living, process)
        self._ended[run.number].set()

    def _happens(self, one: ScenarioEvent) -> Coroutine[Any, Any, None] | None:
        """Return a coroutine that plays an event at its time, None for those of the runs."""
        match one:
            case ScriptedFault(at_s, fault, n, arg):
                return self._later(at_s, partial(self.world.emulated.script, fault, n, arg=arg))
            case FaultRate(fault, share):
                return self._later(0.0, partial(self.world.emulated.set_rate, fault, share))
            case Outage():
                return self._away(one)
            case TopUp(at_s):
                return self._later(at_s, self.world.top_up)
            case Stop(number, after_s):
                return self._within(number, after_s, Process.stop)
            case ClockStep(number, after_s, by_s):
                return self._within(number, after_s, partial(self._step, by_s))
            case ForgedCallback(at_s):
                return self._later(at_s, partial(self._forge, one))
        return None

    async def _later(self, at_s: float, what: Callable[[], object]) -> None:
        await asyncio.sleep(at_s)
        what()

    async def _within(self, number: int, after_s: float, what: Callable[[Process], object]) -> None:
        await self._began[number].wait()
        await asyncio.sleep(after_s)
        what(self._numbered[number])

    async def _end_of(self, living: asyncio.Task[None], process: Process) -> None:
        began_s = self.world.loop.time()
        await asyncio.wait([living], timeout=LIMIT_S)
        if not living.done():
            self._results.failures.append(
                f"{process.name} hangs: it has not ended {LIMIT_S / HOUR_S:g} hours after its "
                "beginning"
            )
            process.kill()
            await living
        self.world.counts["virtual run seconds"] += round(self.world.loop.time() - began_s)
        living.result()
        if problem := checks.wrong_end(process, self._scenario):
            self._results.failures.append(problem)

    async def _away(self, one: Outage) -> None:
        world = self.world
        await asyncio.sleep(one.at_s)
        world.away[one.what] = one.how
        world.count(f"away: {one.what} {one.how}")
        try:
            await asyncio.sleep(one.for_s)
        finally:
            world.away.pop(one.what, None)

    def _step(self, by_s: float, process: Process) -> None:
        self.world.count("clock set")
        process.clock.ahead += type(process.clock.ahead)(seconds=by_s)

    def _forge(self, call: ForgedCallback) -> None:
        """Send a forged callback that names a task of this account."""
        if not (call.about < len(self._scenario.rows) and call.names < len(self._scenario.rows)):
            return
        tasks = self.world.emulated.stats()["tasks"]
        prompt = self._scenario.rows[call.names].prompt
        named = [task["task_id"] for task in tasks if task["prompt"] == prompt]
        keys = {task["prompt"]: task["idempotency_key"] for task in tasks}
        key = keys.get(self._scenario.rows[call.about].prompt)
        if named and key:
            self.world.count("forged call")
            remember(self.world, key.split("-")[1], named[0])

    # -- the calm runs ------------------------------------------------------------------------

    async def calm(self) -> None:
        """Play runs without faults, with a person's decisions, until nothing changes."""
        world, scenario = self.world, self._scenario
        world.mend()
        world.note("calm")
        await asyncio.sleep(_PAUSE_S)
        everything = tuple(range(len(scenario.rows)))
        before: Any = None
        for number in range(1, _MOST_CALM_RUNS + 1):
            run = Run(100 + number, everything, on_unknown="replay", patience_s=300.0)
            process = Process(world, run, scenario.rows, ())
            self.processes.append(process)
            resolutions = self._decided() if number > 1 else {}
            if number > 1:
                self._decide_prices()
            ask_again = self._codes() if number > 1 else frozenset()
            living = process.start(
                partial(
                    process.carry, resolutions=resolutions, ask_again=ask_again, revive=number > 1
                )
            )
            await self._end_of(living, process)
            if process.ended != "done":
                self._results.failures.append(f"a calm run ended as {process.ended}")
                return
            records = list(self._records())
            standing = {record.request_key: (record.state, record.task_id) for record in records}
            if all(record.state is State.STORED for record in records) or standing == before:
                return
            # One that comes without results may need some more reads.
            before = standing if number > 1 and not scenario.has_fault("no_results") else None

    def _records(self) -> Any:
        journal = open_journal(self.world)
        try:
            return list(journal.all_records())
        finally:
            journal.close()

    def _decided(self) -> dict[str, Resolution]:
        """Return the decisions of a person who sees the account's list of tasks."""
        tasks = {}
        for task in self.world.emulated.stats()["tasks"]:
            if task["status"] not in ("failed", "cancelled"):
                tasks[task["idempotency_key"]] = task["task_id"]
        return {
            record.request_key: HasTask(tasks[record.idempotency_key])
            if record.idempotency_key in tasks
            else NotBought()
            for record in self._records()
            if record.state is State.UNKNOWN
        }

    def _decide_prices(self) -> None:
        """Accept or dismiss each doubtful price."""
        journal = open_journal(self.world)
        for quality in ("1K", "2K"):
            with suppress(ConfigError):  # there is none
                journal.prices.accept(quality, self.world.now())
        journal.close()

    def _codes(self) -> frozenset[str]:
        """Return the codes of all failures that a person may retry."""
        again = (State.FAILED, State.REFUSED, State.COMPLETED)
        return REJECTED | {
            record.error_code
            for record in self._records()
            if record.state in again and record.error_code
        }
