"""A series of wishes: another picture of a row is asked for, killed, and asked for again."""

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
from krea_dagster.drill.reconcile import Reckoning, reckon, server_tasks
from krea_dagster.drill.runner import Series
from krea_dagster.drill.worker import STOPPED
from krea_dagster.engine.record import Record
from krea_dagster.engine.states import Event

#: Where a wish is killed: before the journal has its picture. Later it is fulfilled, and
#: the same command is another wish.
_EDGES: Final = frozenset(
    {
        edges.BEFORE_PLANNED,
        edges.AFTER_PLANNED,
        edges.BEFORE_CLAIM,
        edges.AFTER_CLAIM,
        edges.before(Event.SUBMITTING),
        edges.after(Event.SUBMITTING),
        edges.BEFORE_POST,
        edges.TASK_EXISTS,
        edges.before(Event.ACCEPTED),
        edges.after(Event.ACCEPTED),
        edges.BEFORE_READ,
        edges.AFTER_READ,
        edges.before(Event.COMPLETED),
        edges.after(Event.COMPLETED),
        edges.BEFORE_DOWNLOAD,
        edges.DURING_DOWNLOAD,
        edges.AFTER_DOWNLOAD,
        edges.BEFORE_RENAME,
        edges.AFTER_RENAME,
        edges.before(Event.STORED),
    }
)
#: Share of the wishes that are killed a second time.
_TWICE: Final = 0.3


class Wishes(Series):
    """A drill of wishes under way. Rows have no seed of their own, so each attempt draws one."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        names = [f"row-{number}" for number in range(len(self._requests))]
        prompts = [request.prompt for request in self._requests]
        self._prompts = dict(zip(names, prompts, strict=True))
        table = {"prompt_id": names, "prompt": prompts, "size": ["1:2"] * len(names)}
        pq.write_table(pa.table(table), self._place.prompts)
        chosen = [edge for edge in edges.EDGES if edge.name in _EDGES]
        self._random.shuffle(chosen)
        self.plan = [Kill(chosen[number % len(chosen)]) for number in range(self._settings.kills)]
        self._wishes: Counter[str] = Counter()

    async def kill_all(self) -> None:
        """Buy all rows once, and then make each wish until its command ends by itself."""
        await self._command()
        for kill in list(self.plan):
            if self._went_wrong:
                return
            row = self._random.choice(list(self._prompts))
            self._wishes[self._prompts[row]] += 1
            status = await self._command(row, kill)
            if status == KILLED and self._random.random() < _TWICE:
                again = Kill(self._random.choice(self.plan).edge)
                self.plan.append(again)
                status = await self._command(row, again)
            if status == KILLED:
                status = await self._command(row)
            if status == STOPPED:  # it says that the wish is under way: then plainly on with it
                self.refused += 1
                await self._command()
            await self._tell("wishing")

    async def _command(self, row: str | None = None, kill: Kill | None = None) -> int:
        """Run the command, and return its status. A wish may be refused, anything else may not."""
        edge = "" if kill is None or kill.edge is None else kill.edge.name
        worker = await self._launch(again=[] if row is None else [row], edge=edge)
        status = await self._ended(worker, may_stop=row is not None)
        if status == KILLED:
            self.kills[edge] += 1
        return status

    async def finish(self) -> int:
        """Run the command once more without a wish."""
        if not self._went_wrong:
            await self._command()
        return 1

    def _compared(
        self, books: Mapping[str, Any], records: Mapping[str, Record], files: Mapping[str, str]
    ) -> Reckoning:
        """Compare what the journal holds; beyond a picture for each wish is bought twice."""
        requests = [record.request for record in records.values()]
        tasks = server_tasks(books)
        found = reckon(requests, books["submit_posts"], tasks, records, files)
        bought = Counter(task.body[0] for task in tasks if task.counts)
        wanted = {name: 1 + self._wishes[prompt] for name, prompt in self._prompts.items()}
        surplus = [
            name
            for name, prompt in self._prompts.items()
            for _ in range(bought[prompt] - wanted[name])
        ]
        return replace(found, bought_twice=[*found.bought_twice, *surplus])
