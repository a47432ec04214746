"""A drill of ``materialize --again``: new images are requested, killed and requested again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from krea_dagster.drill import edges
from krea_dagster.drill.fork_server_client import KILLED
from krea_dagster.drill.plan import Kill
from krea_dagster.drill.reconcile import Reconciliation, reconcile, server_tasks
from krea_dagster.drill.runner import DrillRunner
from krea_dagster.drill.worker import STOPPED
from krea_dagster.engine.record import Record
from krea_dagster.engine.states import Event

#: Where a command is not killed: its image is stored, so it has done its work, and the same
#: command requests another image.
_TOO_LATE: Final = (edges.after(Event.STORED), edges.BEFORE_RELEASE, edges.AFTER_RELEASE)
#: Share of the commands that are killed a second time.
_TWICE: Final = 0.3


class RegenerationRunner(DrillRunner):
    """Runs ``materialize --again``. The rows have no seed, so each attempt draws one."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        names = [f"row-{number}" for number in range(len(self._requests))]
        prompts = [request.prompt for request in self._requests]
        self._prompts = dict(zip(names, prompts, strict=True))
        table = {"prompt_id": names, "prompt": prompts, "size": ["1:2"] * len(names)}
        pq.write_table(pa.table(table), self._paths.prompts)
        chosen = [
            edge
            for edge in edges.EDGES
            if not (edge.faults or edge.file_missing or edge.resolves or edge.name in _TOO_LATE)
        ]
        self._random.shuffle(chosen)
        self.kills = [Kill(chosen[number % len(chosen)]) for number in range(self._plan.kills)]
        self._requested: Counter[str] = Counter()

    async def kill_all(self) -> None:
        """Buy all rows once, and then repeat each command until it ends without a kill."""
        await self._command()
        for kill in list(self.kills):
            if self._went_wrong:
                return
            row = self._random.choice(list(self._prompts))
            self._requested[self._prompts[row]] += 1
            status = await self._command(row, kill)
            if status == KILLED and self._random.random() < _TWICE:
                second = Kill(self._random.choice(self.kills).edge)
                self.kills.append(second)
                status = await self._command(row, second)
            if status == KILLED:
                status = await self._command(row)
            if status == STOPPED:  # the new image is under way: plain `materialize` finishes it
                self.counts.refused += 1
                await self._command()
            await self._report("regenerating")

    async def _command(self, row: str | None = None, kill: Kill | None = None) -> int:
        """Run the command, and return its status. It may refuse only with ``--again``."""
        edge = "" if kill is None or kill.edge is None else kill.edge.name
        worker = await self._launch(again=[] if row is None else [row], edge=edge)
        status = await self._ended(worker, may_stop=row is not None)
        if status == KILLED:
            self.counts.kills[edge] += 1
        return status

    async def finish(self) -> int:
        """Run the command once more, without ``--again``."""
        if not self._went_wrong:
            await self._command()
        return 1

    def _compare(
        self, stats: Mapping[str, Any], records: Mapping[str, Record], files: Mapping[str, str]
    ) -> Reconciliation:
        """Compare what the journal holds. More than one image per command is bought twice."""
        requests = [record.request for record in records.values()]
        tasks = server_tasks(stats)
        found = reconcile(requests, stats["submit_posts"], tasks, records, files)
        bought = Counter(task.body[0] for task in tasks if task.counts)
        surplus = [
            name
            for name, prompt in self._prompts.items()
            for _ in range(bought[prompt] - 1 - self._requested[prompt])
        ]
        return replace(found, bought_twice=[*found.bought_twice, *surplus])
