"""The requests of a run: which are unfinished, and what became of them.

The requests come as a stream and may be many, so only the key of each unfinished one is kept here.
The rest is in the journal, and is read when its turn comes.
"""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Final

from krea_dagster.engine.policy import RetryState
from krea_dagster.engine.record import Record
from krea_dagster.engine.run.options import RunOptions
from krea_dagster.engine.run.report import Progress, count_of
from krea_dagster.engine.run.requested_image import BoughtFor, RequestedImage
from krea_dagster.engine.run.work_item import WorkItem
from krea_dagster.engine.states import AT_STAKE, State
from krea_dagster.engine.threads import InThread

#: Requests that are entered into the journal and read together.
_BATCH: Final = 2000

#: Requests that are left and named with their reason, and different reasons that are counted.
_LEFT_NAMED: Final = 1000
_OTHER_REASONS: Final = "other reasons"


@dataclass
class WorkList:
    """The requests of a run, and what became of them.

    ``new`` counts the requests that the journal had never seen. ``backlog`` holds the keys of
    unfinished requests that are not claimed yet: first the ``paid_backlog`` ones that are paid, or
    may be, the oldest first, because links live for a day; then those to buy. ``qualities`` are
    those of the requests to buy, ``deferral_codes`` why these were deferred before, None if one was
    not. ``left``, ``left_reasons`` and ``at_stake_units`` are those of the RunReport.
    """

    progress: Progress
    new: int = 0
    backlog: deque[str] = field(default_factory=deque)
    paid_backlog: int = 0
    qualities: set[str] = field(default_factory=set)
    deferral_codes: set[str | None] = field(default_factory=set)
    left: dict[str, str] = field(default_factory=dict)
    left_reasons: Counter[str] = field(default_factory=Counter)
    at_stake_units: int = 0
    _partitions: dict[str, str] = field(default_factory=dict)
    _rows: dict[str, int] = field(default_factory=dict)
    _scopes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _callback_urls: dict[str, str] = field(default_factory=dict)
    _bought_for: dict[str, str] = field(default_factory=dict)
    _at_stake: dict[str, int] = field(default_factory=dict)

    @classmethod
    async def enter(
        cls,
        requested: Iterable[RequestedImage],
        options: RunOptions,
        in_thread: InThread,
        is_unfinished: Callable[[Record], bool],
        reused_rows: int,
    ) -> WorkList:
        """Enter requests into the journal, and find which of them are unfinished.

        ``reused_rows`` are rows whose images are known to be stored, and not among ``requested``.
        Raises JournalError.
        """
        work = cls(Progress(total=reused_rows, reused=reused_rows))
        paid: list[tuple[float, str]] = []
        batches = _batches(requested)
        journal = options.journal
        enter = partial(
            journal.plan, run_id=options.run_id, at=options.clock.now(), table_id=options.table_id
        )
        entered: set[str] = set()
        while batch := await in_thread(next, batches, []):
            if attributes := {one.attributes for one in batch if one.attributes} - entered:
                await in_thread(journal.attributions.enter, sorted(attributes))
                entered = attributes
            work.new += await in_thread(enter, [(one.request, one.partition_key) for one in batch])
            keys = [one.request.request_key for one in batch]
            records = await in_thread(journal.records, keys)
            open_keys = await in_thread(_unfinished, is_unfinished, records)
            for one, key in zip(batch, keys, strict=True):
                work._add(one, records[key], is_open=key in open_keys, paid=paid)
        work.paid_backlog = len(paid)
        paid_keys = [key for _, key in sorted(paid)]
        work.backlog.extend(dict.fromkeys([*paid_keys, *work._partitions]))
        return work

    def _add(
        self, one: RequestedImage, record: Record, *, is_open: bool, paid: list[tuple[float, str]]
    ) -> None:
        key = record.request_key
        self.progress = self.progress.plus(total=one.rows)
        if not is_open:
            stored = record.state is State.STORED
            count = "reused" if stored else count_of(record.state)
            self.progress = self.progress.plus(**{count: one.rows})
            return
        if key in self._partitions:
            self._rows[key] = self.rows(key) + one.rows
            return
        self._partitions[key] = sys.intern(one.partition_key)
        if one.rows > 1:
            self._rows[key] = one.rows
        if one.scopes:
            self._scopes[key] = one.scopes
        if one.callback_url is not None:
            self._callback_urls[key] = one.callback_url
        if one.row is not None:
            self._bought_for[key] = one.row.packed()
        if record.state in AT_STAKE and record.committed_units:
            self._at_stake[key] = record.committed_units
        if paid_at := record.completed_at or record.submitted_at or record.sent_at:
            paid.append((paid_at.timestamp(), key))
            return
        self.qualities.add(record.request.quality)
        deferred = record.state is State.DEFERRED
        self.deferral_codes.add(record.error_code if deferred else None)

    def rows(self, request_key: str) -> int:
        """Return how many rows share a request."""
        return self._rows.get(request_key, 1)

    def item(self, record: Record, retry: RetryState) -> WorkItem:
        """Return a request as it is carried by a run."""
        key = record.request_key
        return WorkItem(
            record,
            self._partitions[key],
            retry,
            self._scopes.get(key, ()),
            self._callback_urls.get(key),
            None if key not in self._bought_for else BoughtFor.unpacked(self._bought_for[key]),
        )

    @property
    def unfinished(self) -> int:
        """How many requests were unfinished when the run began."""
        return len(self._partitions)

    @property
    def backlog_to_buy(self) -> int:
        """How many requests of the backlog are to be bought."""
        return len(self.backlog) - self.paid_backlog

    def take(self, most: int) -> list[str]:
        """Take the next keys from the backlog."""
        keys = [self.backlog.popleft() for _ in range(min(most, len(self.backlog)))]
        self.paid_backlog = max(0, self.paid_backlog - len(keys))
        return keys

    def take_to_buy(self) -> list[str]:
        """Take all keys from the backlog that are to be bought."""
        return [self.backlog.pop() for _ in range(self.backlog_to_buy)]

    def finish(self, record: Record, reason: str) -> None:
        """Count a request that the run has ended with; ``reason`` is why it is left, if it is."""
        if reason:
            self._note_left(record.request_key, reason)
            self.at_stake_units += record.committed_units if record.state in AT_STAKE else 0
        count = count_of(record.state, left=bool(reason))
        self.progress = self.progress.plus(**{count: self.rows(record.request_key)})

    def leave_unread(self, keys: Iterable[str], reason: str) -> None:
        """Leave requests of the backlog to a later run."""
        for key in keys:
            self.progress = self.progress.plus(left=self.rows(key))
            self.at_stake_units += self._at_stake.get(key, 0)
            self._note_left(key, reason)

    def _note_left(self, key: str, reason: str) -> None:
        """Count a reason. Texts that name their own task are bounded, to keep memory small."""
        if len(self.left) < _LEFT_NAMED:
            self.left[key] = reason
        known = reason in self.left_reasons or len(self.left_reasons) < _LEFT_NAMED
        self.left_reasons[reason if known else _OTHER_REASONS] += 1


def _unfinished(is_unfinished: Callable[[Record], bool], records: Mapping[str, Record]) -> set[str]:
    return {key for key, record in records.items() if is_unfinished(record)}


def _batches(requested: Iterable[RequestedImage]) -> Iterator[list[RequestedImage]]:
    iterator = iter(requested)
    while batch := list(islice(iterator, _BATCH)):
        yield batch
