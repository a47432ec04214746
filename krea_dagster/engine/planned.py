"""What a run has before it: which of the wanted requests are unfinished, and for how many rows.

The wanted requests come as a stream and may be many, so of each unfinished one only its key is
kept here; the rest is in the journal, and is read when its turn comes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from typing import Final

from krea_dagster.engine.journal import Journal
from krea_dagster.engine.progress import Progress
from krea_dagster.engine.record import Record
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
    them: what is paid before what is to be bought, and of that the oldest first, because links
    live for a day.
    """

    progress: Progress
    new: int = 0
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
    def enter(
        cls,
        wanted: Iterable[Wanted],
        journal: Journal,
        *,
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
        for part in _parts(wanted):
            pairs = [(item.request, item.partition_key) for item in part]
            planned.new += journal.plan(pairs, run_id=run_id, at=at, table_id=table_id)
            records = journal.records({item.request.request_key for item in part})
            for item in part:
                record = records[item.request.request_key]
                planned._count(item, record, is_unfinished=is_unfinished(record), paid=paid)
        first = {key: planned.unfinished.pop(key) for _, key in sorted(paid)}
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
            if paid_at is not None:
                paid.append((paid_at.timestamp(), key))


def _parts(wanted: Iterable[Wanted]) -> Iterator[list[Wanted]]:
    iterator = iter(wanted)
    while part := list(islice(iterator, _TOGETHER)):
        yield part
