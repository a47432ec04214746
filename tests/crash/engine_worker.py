"""One run of the engine in a separate process, forked from one that has imported it."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
from contextlib import closing
from multiprocessing.connection import Connection
from typing import Any

from krea_dagster.api import KreaClient
from krea_dagster.engine.budget import Budget, Caps
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.policy import Policy
from krea_dagster.engine.run.latency import Latencies
from krea_dagster.engine.run.report import RunReport
from krea_dagster.engine.run.runner import Runner
from krea_dagster.engine.storage.images import ImageStore
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import JournalError
from tests.crash.process_harness import Job, wanted


def work(job: Job, connection: Connection) -> None:
    """Run once, after ``go``; send the report, and exit with 0 if all was delivered.

    Otherwise with 1, with 3 if the journal failed, and with 143 if SIGTERM ended it.
    """
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        os.environ.pop(name, None)
        os.environ.pop(name.upper(), None)
    connection.recv()
    if job.file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job.file_bytes, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    code, report = _ended(job)
    connection.send(report)
    sys.exit(code)


def _ended(job: Job) -> tuple[int, dict[str, Any]]:
    try:
        with closing(Journal(job.journal)) as journal:
            report = asyncio.run(_run(job, journal))
    except asyncio.CancelledError:
        return 143, {"stopped": True}
    except JournalError as error:
        return 3, {"journal_error": str(error)}
    progress = report.progress
    return int(progress.delivered + progress.reused < progress.total), {
        "posts": report.posts,
        "new": report.new,
        "left": len(report.left),
        "delivered": progress.delivered,
        "reused": progress.reused,
        "caps_reached": list(report.caps_reached),
        "seconds": round(report.seconds, 1),
    }


async def _run(job: Job, journal: Journal) -> RunReport:
    """SIGTERM ends the run as Dagster's terminate does: its tasks are cancelled."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    runner = Runner(
        connect=lambda: KreaClient("emulator", base_url=job.emulator, max_connections=32),
        journal=journal,
        images=ImageStore(Storage(job.storage), decoders=1),
        run_id=job.run_id,
        policy=Policy(wait_scale=0.02, patience_s=60.0, gone_after_s=5.0),
        max_in_flight=job.max_in_flight,
        caps=Caps(job.run_units, job.day_units, tuple(map(Budget.parse, job.budgets))),
        latencies=Latencies.known({"1K": 0.2, "2K": 0.2}),
    )
    return await runner.run(wanted(job))
