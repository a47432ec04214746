"""What a run has before it: which of the wanted requests are unfinished, and for how many rows.

The wanted requests come as a stream and may be many, so of each unfinished one only its key is
kept here; the rest is in the journal, and is read when its turn comes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from itertools import islice
from typing import Final

from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.record import Record
from krea_dagster.engine.run.progress import Progress
from krea_dagster.engine.states import AT_STAKE, State
from krea_dagster.engine.threads import InThread
from krea_dagster.models import ImageRequest

#: Requests that are entered into the journal and looked up together.
_TOGETHER: Final = 2000


@dataclass(frozen=True)
class Wanted:
    """A request that some rows want; ``rows`` counts them.

    ``scopes`` are the budgets' scopes of its first row (``budget.column_scope``), beside those of
    its run, day, month and partition. ``callback_url`` is where the row has its task's end told.
    """

    request: ImageRequest
    partition_key: str
    rows: int = 1
    scopes: tuple[str, ...] = ()
    callback_url: str | None = None


@dataclass
class Planned:
    """The requests of a run. ``new`` counts those that the journal had never seen.

    ``unfinished`` gives, by request key, the partition that wants it, in the order to carry
    them: what is paid, or may be, before what is to be bought, and of that the oldest first,
    because links live for a day. ``paid_count`` of them come first so, and ``qualities`` are those
    of the others, and ``kept_codes`` why these were deferred before, None for those that were not.
    ``at_stake`` is what the unfinished may have cost, in units, by request key.
    """

    progress: Progress
    new: int = 0
    paid_count: int = 0
    qualities: set[str] = field(default_factory=set)
    kept_codes: set[str | None] = field(default_factory=set)
    at_stake: dict[str, int] = field(default_factory=dict)
    unfinished: dict[str, str] = field(default_factory=dict)
    _rows: dict[str, int] = field(default_factory=dict)
    _scopes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _callback_urls: dict[str, str] = field(default_factory=dict)

    def rows(self, request_key: str) -> int:
        """How many rows want a request."""
        return self._rows.get(request_key, 1)

    def scopes(self, request_key: str) -> tuple[str, ...]:
        """What a purchase of a request counts for, beside its run, day, month and partition."""
        return self._scopes.get(request_key, ())

    def callback_url(self, request_key: str) -> str | None:
        """Where the row of a request has its task's end told, if it says so."""
        return self._callback_urls.get(request_key)

    @classmethod
    async def enter(
        cls,
        wanted: Iterable[Wanted],
        journal: Journal,
        *,
        in_thread: InThread,
        run_id: str,
        at: datetime,
        table_id: str = "",
        is_unfinished: Callable[[Record], bool],
        reused_rows: int = 0,
    ) -> Planned:
        """Enter what is wanted into the journal, and find what is unfinished of it.

        ``reused_rows`` are rows whose images are known to be there, and not among ``wanted``.
        Raises JournalError.
        """
        planned = cls(Progress(total=reused_rows, reused=reused_rows))
        paid: list[tuple[float, str]] = []
        parts = _parts(wanted)
        enter = partial(journal.plan, run_id=run_id, at=at, table_id=table_id)
        while part := await in_thread(next, parts, []):
            pairs = [(item.request, item.partition_key) for item in part]
            planned.new += await in_thread(enter, pairs)
            keys = [item.request.request_key for item in part]
            records = await in_thread(journal.records, keys)
            unfinished = await in_thread(_chosen, is_unfinished, records)
            for item in part:
                record = records[item.request.request_key]
                is_open = item.request.request_key in unfinished
                planned._count(item, record, is_unfinished=is_open, paid=paid)
        first = {key: planned.unfinished.pop(key) for _, key in sorted(paid)}
        planned.paid_count = len(first)
        planned.unfinished = {**first, **planned.unfinished}
        return planned

    def _count(
        self,
        item: Wanted,
        record: Record,
        *,
        is_unfinished: bool,
        paid: list[tuple[float, str]],
    ) -> None:
        key = item.request.request_key
        self.progress = self.progress.wanted(item.rows)
        if not is_unfinished:
            self.progress = self.progress.found_finished(record, item.rows)
        elif key in self.unfinished:
            self._rows[key] = self.rows(key) + item.rows
        else:
            self.unfinished[key] = sys.intern(item.partition_key)
            if item.rows > 1:
                self._rows[key] = item.rows
            if item.scopes:
                self._scopes[key] = item.scopes
            if item.callback_url is not None:
                self._callback_urls[key] = item.callback_url
            paid_at = record.completed_at or record.submitted_at or record.sent_at
            if record.state in AT_STAKE and record.committed_units:
                self.at_stake[key] = record.committed_units
            if paid_at is not None:
                paid.append((paid_at.timestamp(), key))
            else:
                self.qualities.add(item.request.quality)
                deferred = record.state is State.DEFERRED
                self.kept_codes.add(record.error_code if deferred else None)


def _chosen(is_unfinished: Callable[[Record], bool], records: Mapping[str, Record]) -> set[str]:
    return {key for key, record in records.items() if is_unfinished(record)}


def _parts(wanted: Iterable[Wanted]) -> Iterator[list[Wanted]]:
    iterator = iter(wanted)
    while part := list(islice(iterator, _TOGETHER)):
        yield part
