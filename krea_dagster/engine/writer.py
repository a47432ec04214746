"""Group commit: one thread that writes whatever has gathered in one transaction.

A durable commit costs an fsync. Paid once per change it bounds a run to some hundred changes
a second; paid once for all that gathered while the last one was under way, it vanishes.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import TracebackType

from krea_dagster.engine.budget import Caps
from krea_dagster.engine.changes import Change
from krea_dagster.engine.journal import NO_CAPS, Journal
from krea_dagster.engine.record import Record
from krea_dagster.errors import JournalError

#: Changes per commit: enough that the fsync vanishes, few enough that nobody waits long.
_MOST = 256

_Job = tuple[Change, "Future[Record]"]


class GroupCommit:
    """Writes changes durably, many at a time. Use as a context manager.

    Leaving it writes all that was given before, and joins the thread.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        owner: str,
        run_id: str,
        caps: Caps = NO_CAPS,
        launch: str = "",
    ) -> None:
        self._journal = journal
        self._owner = owner
        self._run_id = run_id
        self._caps = caps
        self._launch = launch
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
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

    async def append(self, change: Change) -> Record:
        """Write one change; returns the record as it stands once it is durable.

        A caller that is cancelled leaves, and the change is written all the same. Raises
        IllegalTransition, BuyingClosed or JournalError, with nothing changed for this request.
        """
        answer: Future[Record] = Future()
        self._jobs.put((change, answer))
        waiting = asyncio.wrap_future(answer)
        # asyncio would complain of an error that nobody is there to take any more.
        waiting.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(waiting)

    def _work(self) -> None:
        while True:
            batch, last = self._gather()
            if batch:
                self._write(batch)
            if last:
                return

    def _gather(self) -> tuple[Sequence[_Job], bool]:
        batch: list[_Job] = []
        next_job: Callable[[], _Job | None] = self._jobs.get
        while len(batch) < _MOST:
            try:
                job = next_job()
            except queue.Empty:
                break
            if job is None:
                return batch, True
            batch.append(job)
            next_job = self._jobs.get_nowait
        return batch, False

    def _write(self, batch: Sequence[_Job]) -> None:
        changes = [change for change, _ in batch]
        try:
            answers = self._journal.append(
                changes,
                owner=self._owner,
                run_id=self._run_id,
                caps=self._caps,
                launch=self._launch,
            )
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it, whatever it is
            if len(batch) > 1 and not _of_the_database(error):
                # One change that the database refuses must not take the others' ids with it.
                for job in batch:
                    self._write([job])
                return
            for _, future in batch:
                future.set_exception(error)
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            if isinstance(answer, Record):
                future.set_result(answer)
            else:
                future.set_exception(answer)


def _of_the_database(error: BaseException) -> bool:
    """Whether the database as a whole fails (locked, full, gone), and not one change.

    Each try may wait a minute for a lock, so the rest of a batch is not tried one by one then.
    By the names that PEP 249 gives, because the journal hides the rest.
    """
    kinds = {kind.__name__ for kind in type(error.__cause__).__mro__}
    return isinstance(error, JournalError) and not kinds & {"IntegrityError", "DataError"}
