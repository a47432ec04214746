"""A worker is production's own engine: its settings, its checks, its way to the server."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from krea_dagster.api.transport import AiohttpTransport
from krea_dagster.application.runner import connect
from krea_dagster.drill import edges
from krea_dagster.drill.instrumented import (
    InstrumentedClient,
    InstrumentedTransport,
    WorkerContext,
    instrumented_krea,
)
from krea_dagster.drill.job import API_KEY, WorkerJob, read_requests, write_requests
from krea_dagster.drill.plan import DrillPlan, requests_of
from krea_dagster.drill.worker import work
from krea_dagster.emulator import Emulator
from krea_dagster.errors import ConfigError


class Passed(InstrumentedClient):
    """Notes the edges that are passed, of which none kills."""

    seen: list[str]

    def __init__(self, context: WorkerContext, *arguments: object, **settings: object) -> None:
        object.__setattr__(context.switch, "passing", Passed.seen.append)
        super().__init__(context, *arguments, **settings)  # type: ignore[arg-type]  # as given


def job(folder: Path, url: str) -> WorkerJob:
    return WorkerJob(1, str(folder), url, rows=2, seed=0, latency_s=0.05)


def test_it_sends_by_the_transport_that_production_uses(tmp_path: Path) -> None:
    async def way() -> object:
        krea = instrumented_krea(
            WorkerContext.of(job(tmp_path, "http://127.0.0.1:1")), InstrumentedClient
        )
        async with connect(krea) as client:
            assert isinstance(client._transport, InstrumentedTransport)
            assert client._transport.reports_unsent
            return client._transport.inner

    assert isinstance(asyncio.run(way()), AiohttpTransport)


def test_it_passes_the_edges_of_an_exchange_in_their_order(tmp_path: Path) -> None:
    Passed.seen = []
    write_requests(tmp_path, requests_of(DrillPlan(requests=1)))
    with Emulator(api_key=API_KEY, latency_s=0.05, state=tmp_path / "emulator") as emulator:
        work(job(tmp_path, emulator.url), Passed)
        assert emulator.stats()["creates"] == len(read_requests(tmp_path)) == 1
    of_exchange = (edges.BEFORE_POST, edges.TASK_EXISTS, edges.BEFORE_READ, edges.AFTER_READ)
    first_of_each = dict.fromkeys(edge for edge in Passed.seen if edge in of_exchange)
    assert tuple(first_of_each) == of_exchange


def test_it_is_checked_before_anything_is_bought_as_a_run_is(tmp_path: Path) -> None:
    write_requests(tmp_path, requests_of(DrillPlan(requests=1)))
    images = tmp_path / "krea" / "images" / "ab"
    images.mkdir(parents=True)
    (images / "abcd.png").touch()
    with Emulator(api_key=API_KEY, state=tmp_path / "emulator") as emulator:
        with pytest.raises(ConfigError, match="the journal that bought them is missing"):
            work(job(tmp_path, emulator.url))
        assert emulator.stats()["submit_posts"] == 0
