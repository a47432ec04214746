"""One run of the engine in a process of its own: ``python -m tests.crash.engine_worker JOB``.

JOB is a JSON object, see ``engine_processes.Job``. The report is one line of JSON on stdout.
"""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import sys
from contextlib import closing, suppress
from pathlib import Path

from krea_dagster.api import KreaClient
from krea_dagster.engine.budget import Caps
from krea_dagster.engine.images import ImageStore
from krea_dagster.engine.journal import Journal
from krea_dagster.engine.pace import Latencies
from krea_dagster.engine.policy import Policy
from krea_dagster.engine.runner import Runner, RunReport, Wanted
from krea_dagster.engine.storage import Storage
from krea_dagster.errors import JournalError
from tests.crash.engine_processes import Job, requests


async def work(job: Job, journal: Journal) -> RunReport:
    """Run once. SIGTERM ends the run as Dagster's terminate does: its tasks are cancelled."""
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
        caps=Caps(run_units=job.run_units, day_units=job.day_units),
        latencies=Latencies(recent={"1K": (0.2,), "2K": (0.2,)}),
    )
    return await runner.run(Wanted(one, job.partition) for one in requests(job))


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(job: Job) -> int:
    """Run once told to; 1 where not all was delivered, 3 where the journal failed."""
    _say("ready")
    sys.stdin.readline()
    if job.file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job.file_bytes, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with closing(Journal(job.journal)) as journal:
            report = asyncio.run(work(job, journal))
    except asyncio.CancelledError:
        _say(json.dumps({"stopped": True}))
        return 143
    except JournalError as error:
        _say(json.dumps({"journal_error": str(error)}))
        return 3
    _say(
        json.dumps(
            {
                "posts": report.posts,
                "new": report.new,
                "left": len(report.left),
                "delivered": report.progress.delivered,
                "reused": report.progress.reused,
                "caps_reached": list(report.caps_reached),
                "seconds": report.seconds,
            }
        )
    )
    return 0 if report.progress.delivered + report.progress.reused == report.progress.total else 1


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main(Job(**json.loads(Path(sys.argv[1]).read_text()))))
