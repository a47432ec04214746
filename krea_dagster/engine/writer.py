"""Group commit: one thread that writes whatever has gathered in one transaction.

A durable commit costs an fsync. Paid once per change it bounds a run to some hundred changes
a second; paid once for all that gathered while the last one was under way, it vanishes.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType

from krea_dagster.engine.budget import Caps
from krea_dagster.engine.changes import Change
from krea_dagster.engine.journal import NO_CAPS, Journal
from krea_dagster.engine.record import Record
from krea_dagster.engine.states import AT_STAKE
from krea_dagster.errors import BuyingClosed, JournalError

#: Changes per commit: enough that the fsync vanishes, few enough that nobody waits long.
_MOST = 256
#: While changes come by so many at a time, the first one waits so long for others: a commit costs
#: as much as ten more changes in it, and beside an image's seconds the wait is nothing.
_MANY = 4
_GATHER_S = 0.008

_Answer = Record | JournalError | BuyingClosed | BaseException
_Job = tuple[Change, Record | None, "asyncio.Future[Record]"]


class GroupCommit:
    """Writes changes durably, many at a time. Use as a context manager, in one event loop.

    Leaving it writes all that was given before, and joins the thread. ``pause`` is what its
    thread waits with, in seconds.
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
        pause: Callable[[float], object] = time.sleep,
    ) -> None:
        self._journal = journal
        self._pause = pause
        self._owner = owner
        self._run_id = run_id
        self._caps = caps
        self._launch = launch
        self._root_id = root_id
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        # The requests under way as the last change left them: the thread's own.
        self._known: dict[str, Record] = {}
        self._thread = threading.Thread(target=self._work, name="krea-journal", daemon=True)

    def __enter__(self) -> GroupCommit:
        self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._jobs.put(None)
        self._thread.join()

    async def append(self, change: Change, known: Record | None = None) -> Record:
        """Write one change; returns the record as it stands once it is durable.

        ``known`` is the record that the change is made of, where the caller has it: then it is
        not read again. A caller that is cancelled leaves, and the change is written all the
        same. Raises IllegalTransition, BuyingClosed or JournalError, with nothing changed for
        this request.
        """
        answer: asyncio.Future[Record] = asyncio.get_running_loop().create_future()
        self._jobs.put((change, known, answer))
        return await answer

    def _work(self) -> None:
        busy = False
        while True:
            batch, last = self._gather(busy)
            if batch:
                self._write(batch)
            if last:
                return
            busy = len(batch) >= _MANY

    def _gather(self, busy: bool) -> tuple[Sequence[_Job], bool]:
        """What has gathered, and whether it is the last; ``busy``: the last time they were many."""
        batch: list[_Job] = []
        while len(batch) < _MOST:
            try:
                job = self._jobs.get_nowait() if batch else self._jobs.get()
            except queue.Empty:
                break
            if job is None:
                return batch, True
            if busy and not batch:
                self._pause(_GATHER_S)
            batch.append(job)
        return batch, False

    def _write(self, batch: Sequence[_Job]) -> None:
        known = self._known
        for change, record, _ in batch:
            if record is not None:
                known.setdefault(change.request_key, record)
        try:
            answers: Sequence[_Answer] = self._journal.append(
                [change for change, _, _ in batch],
                owner=self._owner,
                run_id=self._run_id,
                caps=self._caps,
                launch=self._launch,
                root_id=self._root_id,
                known={
                    c.request_key: known[c.request_key]
                    for c, _, _ in batch
                    if c.request_key in known
                },
            )
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it, whatever it is
            if len(batch) > 1 and not _of_the_database(error):
                # One change that the database refuses must not take the others' ids with it.
                for job in batch:
                    self._write([job])
                return
            answers = [error] * len(batch)
        for (change, _, _), answer in zip(batch, answers, strict=True):
            if isinstance(answer, Record) and answer.state in AT_STAKE:
                known[change.request_key] = answer
            else:
                known.pop(change.request_key, None)
        _hand_over([future for _, _, future in batch], answers)


def _hand_over(waiting: Sequence[asyncio.Future[Record]], answers: Sequence[_Answer]) -> None:
    """Wake all that wait with one call into their event loop."""

    def wake() -> None:
        for future, answer in zip(waiting, answers, strict=True):
            if future.done():
                continue  # its caller was cancelled
            if isinstance(answer, Record):
                future.set_result(answer)
            else:
                future.set_exception(answer)

    with suppress(RuntimeError):  # the loop is closed, so nobody waits any more
        waiting[0].get_loop().call_soon_threadsafe(wake)


def _of_the_database(error: BaseException) -> bool:
    """Whether the database as a whole fails (locked, full, gone), and not one change.

    Each try may wait a minute for a lock, so the rest of a batch is not tried one by one then.
    By the names that PEP 249 gives, because the journal hides the rest.
    """
    kinds = {kind.__name__ for kind in type(error.__cause__).__mro__}
    return isinstance(error, JournalError) and not kinds & {"IntegrityError", "DataError"}
