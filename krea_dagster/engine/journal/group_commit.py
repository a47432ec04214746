"""Group commit: changes of many requests are written in one transaction.

A durable commit costs an fsync. One per change limits a run to a few hundred changes a second; one
for all changes that arrived during the last commit is negligible.
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

#: Most changes per commit: enough to make the fsync negligible, few enough to answer quickly.
_MOST: Final = 256
#: If the last commit had at least ``_MANY`` changes, the next one waits ``_GATHER_S`` for more: a
#: commit costs as much as ten more changes, and an image takes seconds anyway.
_MANY: Final = 4
_GATHER_S: Final = 0.008

_Result = Record | JournalError | BuyingClosed | BaseException
_Job = tuple[Sequence[Change], Record | None, "asyncio.Future[Record]"]


class GroupCommit:
    """Writes changes durably, many at a time. Use as an async context manager.

    Leaving it writes all pending changes, even if the caller is cancelled.
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
        # The unfinished requests after their last change.
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

    async def append(self, *changes: Change, known: Record | None = None) -> Record:
        """Write changes of one request durably, in one commit, and return the new record.

        ``known`` is the present record, if the caller has it, so that it is not read again. They
        are also written if the caller is cancelled. Raises IllegalTransition, BuyingClosed or
        another JournalError, with the request unchanged.
        """
        if self._broken is not None:
            raise self._broken
        answer: asyncio.Future[Record] = asyncio.get_running_loop().create_future()
        self._jobs.append((changes, known, answer))
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
        for changes, record, _ in batch:
            if record is not None:
                self._known.setdefault(changes[0].request_key, record)
        every = [change for changes, _, _ in batch for change in changes]
        try:
            answers = await self._answers(every)
        except asyncio.CancelledError:
            for _, _, answer in batch:
                answer.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - passed on to the callers
            if len(batch) > 1 and not _of_the_database(error):
                # One change that the database refuses must not lose the task ids of the others.
                for job in batch:
                    await self._write([job])
                return
            answers = [error] * len(every)
        answered = zip(every, answers, strict=True)
        for changes, _, answer in batch:
            said = [next(answered)[1] for _ in changes]
            result = next((one for one in said if not isinstance(one, Record)), said[-1])
            if isinstance(result, Record) and result.state in AT_STAKE:
                self._known[result.request_key] = result
            else:
                self._known.pop(changes[0].request_key, None)
            _give(answer, result)

    async def _answers(self, changes: Sequence[Change]) -> Sequence[_Result]:
        keys = {change.request_key for change in changes}
        known = {key: self._known[key] for key in keys if key in self._known}
        tried = False

        def write() -> Sequence[_Result]:
            nonlocal tried
            repeated, tried = tried, True
            return self._append(changes, known=known, repeated=repeated)

        # A repetition after an outage: the first try may have been written.
        return await self._in_thread(write)


def _give(answer: asyncio.Future[Record], said: _Result) -> None:
    if answer.done():
        return  # the caller was cancelled
    if isinstance(said, Record):
        answer.set_result(said)
    else:
        answer.set_exception(said)


def _of_the_database(error: BaseException) -> bool:
    """Return whether the whole database fails (locked, full, gone), and not one change.

    Each try may wait a minute for a lock, so the changes are not tried one by one then. Errors are
    recognised by their names in PEP 249, because the journal hides the driver.
    """
    kinds = {kind.__name__ for kind in type(error.__cause__).__mro__}
    return isinstance(error, JournalError) and not kinds & {"IntegrityError", "DataError"}
