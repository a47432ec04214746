"""Group commit: all changes that have gathered are written in one transaction.

A durable commit costs an fsync. Paid once per change it bounds a run to some hundred changes
a second; paid once for all that gathered while the last one was under way, it vanishes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Final

from krea_dagster.engine.budget import Caps
from krea_dagster.engine.journal.changes import Change
from krea_dagster.engine.journal.journal import NO_CAPS, Journal
from krea_dagster.engine.record import Record
from krea_dagster.engine.states import AT_STAKE
from krea_dagster.engine.threads import InThread, in_thread
from krea_dagster.errors import BuyingClosed, JournalError

#: Changes per commit: enough that the fsync vanishes, few enough that nobody waits long.
_MOST: Final = 256
#: While changes come by so many at a time, the first one waits so long for others: a commit costs
#: as much as ten more changes in it, and beside an image's seconds the wait is nothing.
_MANY: Final = 4
_GATHER_S: Final = 0.008

_Answer = Record | JournalError | BuyingClosed | BaseException
_Job = tuple[Change, Record | None, "asyncio.Future[Record]"]


class GroupCommit:
    """Writes changes durably, many at a time. Use as an async context manager.

    Leaving it writes all that was given before, also where the caller is cancelled.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        owner: str,
        run_id: str,
        caps: Caps = NO_CAPS,
        launch: str = "",
        root_id: str = "",
        in_thread: InThread = in_thread,
    ) -> None:
        self._append = partial(
            journal.append,
            owner=owner,
            run_id=run_id,
            caps=caps,
            launch=launch,
            root_id=root_id,
        )
        self._in_thread = in_thread
        self._jobs: list[_Job] = []
        self._batch: Sequence[_Job] = ()
        self._broken: Exception | None = None
        self._arrived = asyncio.Event()
        self._closing = False
        self._working: asyncio.Task[None] | None = None
        # The requests under way as the last change left them.
        self._known: dict[str, Record] = {}

    async def __aenter__(self) -> GroupCommit:
        self._working = asyncio.create_task(self._work())
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closing = True
        self._arrived.set()
        stopped: asyncio.CancelledError | None = None
        while self._working is not None and not self._working.done():
            try:
                await asyncio.wait([self._working])
            except asyncio.CancelledError as error:
                stopped = error
        if stopped is not None:
            raise stopped

    async def append(self, change: Change, known: Record | None = None) -> Record:
        """Write one change; returns the record as it stands once it is durable.

        ``known`` is the record that the change is made of, where the caller has it: then it is
        not read again. A caller that is cancelled leaves, and the change is written all the
        same. Raises IllegalTransition, BuyingClosed or JournalError, with nothing changed for
        this request.
        """
        if self._broken is not None:
            raise self._broken
        answer: asyncio.Future[Record] = asyncio.get_running_loop().create_future()
        self._jobs.append((change, known, answer))
        self._arrived.set()
        return await answer

    async def _work(self) -> None:
        try:
            await self._write_all()
        except Exception as error:  # noqa: BLE001 - a bug must not leave callers waiting for ever
            self._broken = error
            for _, _, answer in (*self._batch, *self._jobs):
                _give(answer, error)

    async def _write_all(self) -> None:
        many = False
        while self._jobs or not self._closing:
            await self._arrived.wait()
            self._arrived.clear()
            while self._jobs:
                if many and not self._closing:
                    await asyncio.sleep(_GATHER_S)
                self._batch, self._jobs = self._jobs[:_MOST], self._jobs[_MOST:]
                await self._write(self._batch)
                many = len(self._batch) >= _MANY

    async def _write(self, batch: Sequence[_Job]) -> None:
        changes = [change for change, _, _ in batch]
        for change, record, _ in batch:
            if record is not None:
                self._known.setdefault(change.request_key, record)
        try:
            answers = await self._answers(changes)
        except asyncio.CancelledError:
            for _, _, answer in batch:
                answer.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - the caller gets it, of any kind
            if len(batch) > 1 and not _of_the_database(error):
                # One change that the database refuses must not take the others' ids with it.
                for job in batch:
                    await self._write([job])
                return
            answers = [error] * len(batch)
        for (change, _, answer), said in zip(batch, answers, strict=True):
            if isinstance(said, Record) and said.state in AT_STAKE:
                self._known[change.request_key] = said
            else:
                self._known.pop(change.request_key, None)
            _give(answer, said)

    async def _answers(self, changes: Sequence[Change]) -> Sequence[_Answer]:
        keys = {change.request_key for change in changes}
        known = {key: self._known[key] for key in keys if key in self._known}
        tried = False

        def write() -> Sequence[_Answer]:
            nonlocal tried
            repeated, tried = tried, True
            return self._append(changes, known=known, repeated=repeated)

        # Repeated where the database was away: nobody knows then whether it was written.
        return await self._in_thread(write)


def _give(answer: asyncio.Future[Record], said: _Answer) -> None:
    if answer.done():
        return  # its caller was cancelled
    if isinstance(said, Record):
        answer.set_result(said)
    else:
        answer.set_exception(said)


def _of_the_database(error: BaseException) -> bool:
    """Whether the database as a whole fails (locked, full, gone), and not one change.

    Each try may wait a minute for a lock, so the rest of a batch is not tried one by one then.
    By the names that PEP 249 gives, because the journal hides the rest.
    """
    kinds = {kind.__name__ for kind in type(error.__cause__).__mro__}
    return isinstance(error, JournalError) and not kinds & {"IntegrityError", "DataError"}
