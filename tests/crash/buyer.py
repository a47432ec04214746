"""Buys images in a separate process: ``python -m tests.crash.buyer URL FOLDER COUNT``."""

from __future__ import annotations

import asyncio
import sys

from krea_dagster.api import KreaClient
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.run.runner import Runner
from krea_dagster.engine.storage.images import ImageStore
from krea_dagster.engine.storage.storage import Storage
from tests.engine.harness import KNOWN_LATENCIES, QUICK, make_requests, to_requested


def main(url: str, folder: str, count: str) -> int:
    """Run once; the exit code is the number of requests that were not delivered."""
    runner = Runner(
        connect=lambda: KreaClient("emulator", base_url=url),
        journal=Journal(f"sqlite:///{folder}/journal.db"),
        images=ImageStore(Storage(folder)),
        run_id="bought-in-parallel",
        policy=QUICK,
        max_in_flight=3,
        latencies=KNOWN_LATENCIES,
    )
    report = asyncio.run(runner.run(to_requested(make_requests(int(count)))))
    return report.progress.left + report.progress.failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
