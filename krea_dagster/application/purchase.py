"""Runs the engine: buys what is missing, or only collects what is already paid for."""

from __future__ import annotations

import asyncio
import contextvars
import getpass
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any, TypeVar

from krea_dagster.application.backend import Backend, belongs_to, paid_and_open
from krea_dagster.application.runner import open_runner
from krea_dagster.engine.journal.attribution_log import Buyer
from krea_dagster.engine.record import Record
from krea_dagster.engine.resolution import Resolution
from krea_dagster.engine.run.report import Progress, RunReport
from krea_dagster.engine.run.requested_image import RequestedImage
from krea_dagster.prompts import PromptTable

_T = TypeVar("_T")


def buy(
    backend: Backend,
    wanted: Iterable[RequestedImage],
    *,
    run_id: str,
    table: PromptTable | None = None,
    reused_rows: int = 0,
    launch: str = "",
    retry_errors: Iterable[str] = (),
    resolutions: Mapping[str, Resolution] | None = None,
    wait: bool = True,
    buyer: Buyer | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> RunReport:
    """Buy, fetch and verify what is missing, and return when nothing more can be done.

    Args:
        wanted: The requests, read as a stream.
        run_id: Is written with every purchase.
        table: The prompt table that requests them.
        reused_rows: Number of images that are known to be stored and not among ``wanted``.
        launch: Names the runs that stop together when the account stops one of them.
        retry_errors: Error codes whose rows are bought again.
        resolutions: A person's decisions about unknown outcomes, by request key.
        wait: Otherwise the run submits, fetches what earlier runs submitted and has probably
            ended, and returns; a later run collects the rest.
        buyer: Who buys, written once for the run; this machine's user by default.
        on_progress: Is called on the event loop whenever something changed.

    Returns:
        What became of the requests. What EvoLink refuses or loses is in the report and in the
        journal, not an exception.

    Raises:
        ConfigError: for a wrong setting, before anything is bought.
        JournalError: if the journal cannot be written.
    """
    with open_runner(backend, run_id, on_progress, table) as runner:
        who = buyer or Buyer(user=local_user())
        runner.journal.attributions.enter_buyer(run_id, runner.table_id, who)
        buying = replace(
            runner,
            policy=replace(runner.policy, retry_codes=frozenset(retry_errors), wait=wait),
            launch=launch,
            resolutions=resolutions or {},
        )
        return _run(buying.run(wanted, reused_rows=reused_rows))


def local_user() -> str | None:
    """Return the name of the user of this machine; None where there is none, as in a container."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return None


def collect(
    backend: Backend,
    *,
    run_id: str,
    tables: Sequence[PromptTable] | None = None,
    only: Callable[[Record], bool] = lambda _: True,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> tuple[RunReport, dict[str, Record]]:
    """Poll and fetch what is paid for and not stored; buys nothing.

    The oldest first, because links live for a day. What was given up as lost within the last week
    is polled once more. Of all this it takes what ``only`` selects, and of other tables than
    ``tables`` what no run has collected for 12 hours. Returns the report, and the record of each
    request that it took, by request key. Raises as ``buy`` does.
    """
    with open_runner(backend, run_id, on_progress) as runner:
        table_ids = backend.table_ids(runner.journal, tables)
        since = datetime.now(timezone.utc) - timedelta(seconds=runner.policy.lost_for_s)
        known = [*paid_and_open(runner.journal), *runner.journal.expired_since(since)]
        paid = [record for record in known if belongs_to(table_ids, record) and only(record)]
        wanted = [RequestedImage(record.request, record.partition_key) for record in paid]
        policy = replace(runner.policy, revive=True)
        report = _run(replace(runner, buying=False, policy=policy).run(wanted))
        return report, runner.journal.records([record.request_key for record in paid])


def _run(main: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine to its end in a thread, and cancel it when this thread is interrupted.

    Dagster ends a run by raising in the main thread. Within an event loop that would separate a
    POST from its answer; here it becomes a cancellation, on which the engine writes what it knows.
    It also works where this thread has an event loop (a notebook).
    """
    under_way: Future[tuple[asyncio.AbstractEventLoop, asyncio.Future[_T]]] = Future()

    async def stoppable() -> _T:
        task = asyncio.ensure_future(main)
        under_way.set_result((asyncio.get_running_loop(), task))
        return await task

    with ThreadPoolExecutor(max_workers=1) as pool:
        ended = pool.submit(contextvars.copy_context().run, asyncio.run, stoppable())
        try:
            return ended.result()
        except BaseException:
            loop, task = under_way.result()
            with suppress(RuntimeError):  # the loop is closed: the run has ended
                loop.call_soon_threadsafe(task.cancel)
            raise
