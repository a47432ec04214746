"""One drill: buy with workers that are killed, let the last ones finish, and compare.

``--storm`` is the same without kills and with every server fault at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread

from krea_dagster.drill.edges import edges_under
from krea_dagster.drill.emulator_server import run_emulator
from krea_dagster.drill.fork_server_client import fork_server
from krea_dagster.drill.job import DrillPaths, write_requests
from krea_dagster.drill.plan import DrillPlan, requests_of
from krea_dagster.drill.reconcile import Reconciliation
from krea_dagster.drill.regenerations import RegenerationRunner
from krea_dagster.drill.runner import LATENCY_S, DrillCounts, DrillProgress, DrillRunner
from krea_dagster.drill.worlds import on_host
from krea_dagster.engine.journal.journal import Journal


@dataclass(frozen=True)
class DrillResult:
    """The result of a drill.

    ``kills_missed`` counts the kills that were planned and not made, because every worker had
    ended before. Edges ``never_reached`` were planned; edges ``not_planned`` were left out, because
    there were too few kills. ``passes`` counts the rounds of workers at the end that were not
    killed.
    """

    plan: DrillPlan
    counts: DrillCounts
    reconciliation: Reconciliation
    kills_missed: int
    never_reached: Sequence[str]
    not_planned: Sequence[str]
    passes: int
    seconds: float

    @property
    def violations(self) -> list[str]:
        """What must not happen but did, in words; empty if the drill passed."""
        plan, counts = self.plan, self.counts
        found = self.reconciliation.violations(
            plan.on_unknown, unknown_is_right=plan.part.unknown_is_right
        )
        if counts.overwritten:
            found.append(f"{len(counts.overwritten)} stored images overwritten")
        if counts.crashed:
            found.append(f"{len(counts.crashed)} workers ended with an error")
        if counts.hung:
            found.append(f"{len(counts.hung)} workers did not end")
        return found


async def drill(
    plan: DrillPlan, folder: Path, on_progress: Callable[[DrillProgress], None] = lambda _: None
) -> DrillResult:
    """Run a drill in an empty folder, which then holds the journal, images, records and logs.

    Raises KreaError if a process of the drill does not start.
    """
    started_s = time.monotonic()
    on_progress(DrillProgress("starting the emulator"))
    part, paths = plan.part, DrillPaths(folder)
    requests = requests_of(plan)
    write_requests(folder, requests)
    async with AsyncExitStack() as stack:
        stack.enter_context(part.disk(paths))
        fork_servers = [  # first, because their imports take a while
            await stack.enter_async_context(
                fork_server(folder, on_host(host.name, plan.command) if host.name else plan.command)
            )
            for host in part.hosts
        ]
        emulator = await stack.enter_async_context(
            run_emulator(
                folder,
                honours_key=plan.honours_key,
                latency_s=LATENCY_S,
                seed=plan.seed,
                rates=plan.rates,
            )
        )
        await anyio.to_thread.run_sync(lambda: Journal(paths.journal_url).close())
        runner = (RegenerationRunner if part.regenerates else DrillRunner)(
            plan,
            paths=paths,
            requests=requests,
            emulator=emulator,
            fork_servers=fork_servers,
            on_progress=on_progress,
        )
        await runner.kill_all()
        passes = await runner.finish()
        reconciliation = await runner.compare()
    counts = runner.counts
    planned = {kill.edge.name for kill in runner.kills if kill.edge is not None}
    return DrillResult(
        plan=plan,
        counts=counts,
        reconciliation=reconciliation,
        kills_missed=len(runner.kills) - counts.all_kills,
        never_reached=sorted(planned - set(counts.kills)),
        not_planned=[
            edge.name for edge in edges_under(plan.on_unknown) if edge.name not in planned
        ],
        passes=passes,
        seconds=time.monotonic() - started_s,
    )
