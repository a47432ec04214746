"""Runs through outages of real length, by hand: ``python -m tests.engine.run.outage_trials``.

300 rows each: the API refuses connections for 100 s, the storage root is away for 30 s, and
PostgreSQL for 15 s (where KREA_TEST_POSTGRES_URL names one).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec

from krea_dagster.api import KreaClient
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.run.report import Progress
from krea_dagster.engine.storage.images import ImageStore
from krea_dagster.engine.storage.storage import Storage
from tests.engine.harness import EngineHarness, make_requests, open_harness, to_requested
from tests.engine.run.gate import gate_to
from tests.engine.run.test_outages import Shaky, gate_before, set_away

ROWS = 300


def port_of(url: str) -> int:
    return urlsplit(url).port or 5432


@contextmanager
def opened() -> Iterator[EngineHarness]:
    with (
        tempfile.TemporaryDirectory() as folder,
        open_harness(Path(folder), latency_s=1.0) as engine,
    ):
        yield engine


def run(
    name: str,
    engine: EngineHarness,
    begin: Callable[[], object],
    end: Callable[[], object],
    lasts_s: float,
    **other: Any,
) -> None:
    """One run whose outage begins once a third of the images is there."""
    began = threading.Event()

    def look(progress: Progress) -> None:
        if progress.delivered >= ROWS // 3 and not began.is_set():
            began.set()
            begin()
            threading.Timer(lasts_s, end).start()

    runner = engine.runner(on_progress=look, outage_patience_s=300.0, wait_scale=1.0)
    runner = replace(runner, max_per_s=20.0, **other)
    started_s = time.monotonic()
    report = asyncio.run(runner.run(to_requested(make_requests(ROWS))))
    states = Counter(record.state.value for record in runner.journal.all_records())
    stats = engine.emulator.stats()
    print(
        f"{name}: away {lasts_s:g} s, run {time.monotonic() - started_s:.0f} s, "
        f"{report.progress}, stopped {report.stopped}, states {dict(states)}, "
        f"{stats['submit_posts']} POSTs, {stats['creates']} created, "
        f"{stats['bodies_bought_more_than_once']} bought twice",
        flush=True,
    )
    assert report.progress.delivered == ROWS
    assert stats["creates"] == ROWS
    assert not stats["bodies_bought_more_than_once"]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--scale", type=float, default=1.0, help="of the outages' lengths")
    scale = options.parse_args().scale
    with opened() as engine, gate_to(port_of(engine.emulator.url)) as gate:
        url = f"http://127.0.0.1:{gate.port}"
        client = {"connect": lambda: KreaClient("emulator", base_url=url)}
        run("API", engine, gate.close, gate.open, 100.0 * scale, **client)
    with opened() as engine:
        fsspec.register_implementation("shaky", Shaky, clobber=True)
        images = ImageStore(Storage("shaky://trial"))
        begin, end = (lambda: set_away(True)), (lambda: set_away(False))
        run("store", engine, begin, end, 30.0 * scale, images=images)
    if text := os.environ.get("KREA_TEST_POSTGRES_URL"):
        with ExitStack() as stack:
            engine = stack.enter_context(opened())
            gate, through = stack.enter_context(gate_before(text))
            journal = stack.enter_context(closing(Journal(through)))
            run("PostgreSQL", engine, gate.close, gate.open, 15.0 * scale, journal=journal)


if __name__ == "__main__":
    main()
