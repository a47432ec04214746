"""The drill: buy with workers that are killed, let a last one finish, and compare the books.

The storm is the same without kills and with every fault of the server at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread

from krea_dagster.drill.edges import edges_under
from krea_dagster.drill.emulator_server import emulator
from krea_dagster.drill.fork_server_client import fork_server
from krea_dagster.drill.job import Place, write_requests
from krea_dagster.drill.plan import Plan, requests_of
from krea_dagster.drill.reconcile import Reckoning
from krea_dagster.drill.regenerations import Wishes
from krea_dagster.drill.runner import LATENCY_S, Progress, Series
from krea_dagster.drill.worlds import on_host
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.policy import OnUnknown


@dataclass(frozen=True)
class Outcome:
    """How a drill ended.

    ``kills`` counts the kills by edge, ``random_kills`` those at random times, and
    ``kills_missed`` those that were planned and not made, because every worker ended before.
    ``never_reached`` were planned and not reached, ``not_planned`` were left out because there
    were too few kills. ``crashed`` are workers that ended by themselves with an error and
    ``hung`` those that did not end; both are faults. ``launches`` counts worker processes,
    ``passes`` those rounds of them at the end that were not killed.

    Of the ``episodes``, the odd worker ``refused`` in some: it ended with a clear error before it
    asked for a purchase. In some it ``stopped`` with one later. ``overwritten`` are stored images
    that were written again during one, by request key.
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
    unknown_is_right: bool = False
    episodes: int = 0
    refused: int = 0
    stopped: int = 0
    overwritten: Sequence[str] = ()

    @property
    def faults(self) -> list[str]:
        """What must not be, in words; empty where the drill is passed."""
        found = self.reckoning.faults(self.policy, unknown_is_right=self.unknown_is_right)
        if self.overwritten:
            found.append(f"{len(self.overwritten)} stored images overwritten")
        if self.crashed:
            found.append(f"{len(self.crashed)} workers ended with an error")
        if self.hung:
            found.append(f"{len(self.hung)} workers did not end")
        return found


async def drill(
    plan: Plan, folder: Path, on_progress: Callable[[Progress], None] = lambda _: None
) -> Outcome:
    """Run a drill in an empty folder, which holds the journal, the images and the books after.

    Raises KreaError where a process of the drill does not start.
    """
    started_s = time.monotonic()
    on_progress(Progress("starting the emulator"))
    part, place = plan.part, Place(folder)
    requests = requests_of(plan)
    write_requests(folder, requests)
    async with AsyncExitStack() as stack:
        stack.enter_context(part.ground(place))
        workers = [  # first: they import meanwhile
            await stack.enter_async_context(
                fork_server(folder, on_host(host.name, plan.command) if host.name else plan.command)
            )
            for host in part.hosts
        ]
        server = await stack.enter_async_context(
            emulator(
                folder,
                honours_key=plan.honours_key,
                latency_s=LATENCY_S,
                seed=plan.seed,
                rates=plan.rates,
            )
        )
        await anyio.to_thread.run_sync(lambda: Journal(place.journal_url).close())
        running = (Wishes if part.wishes else Series)(
            plan,
            place=place,
            requests=requests,
            server=server,
            workers=workers,
            on_progress=on_progress,
        )
        await running.kill_all()
        passes = await running.finish()
        reckoning = await running.reckon()
    planned = {kill.edge.name for kill in running.plan if kill.edge is not None}
    return Outcome(
        reckoning=reckoning,
        kills=dict(running.kills),
        random_kills=running.random_kills,
        kills_missed=len(running.plan) - sum(running.kills.values()) - running.random_kills,
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
        unknown_is_right=part.unknown_is_right,
        episodes=running.episodes,
        refused=running.refused,
        stopped=running.stopped,
        overwritten=running.overwritten,
    )
