"""Outages that pass are waited for: of the network, the API, a store and the journal."""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import ssl
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
import fsspec
import pytest
import trustme
from fsspec.implementations.memory import MemoryFileSystem
from sqlalchemy import make_url

from krea_dagster.api import KreaClient
from krea_dagster.engine.clock import SystemClock
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.run.report import Progress, RunReport
from krea_dagster.engine.states import AT_STAKE, State
from krea_dagster.engine.storage.images import ImageStore
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import JournalError, RunStopped, StorageUnavailable, TryLater
from tests.api.loopback_server import answers, serving
from tests.engine.harness import EngineHarness, make_requests, open_harness, to_requested
from tests.engine.run.gate import Gate, gate_to

pytestmark = pytest.mark.anyio

ROWS = 30


class Passing(SystemClock):
    """An outage that begins once some images are delivered, and ends after some pauses."""

    def __init__(self, begin: Callable[[], object], end: Callable[[], object]) -> None:
        self._begin, self._end = begin, end
        self._pauses: int | None = None

    def look(self, progress: Progress) -> None:
        if self._pauses is None and progress.delivered >= ROWS // 3:
            self._pauses = 0
            self._begin()

    async def sleep(self, seconds: float) -> None:
        await super().sleep(seconds)
        if self._pauses is not None and seconds < 1.0:
            self._pauses += 1
            if self._pauses == 5:
                self._end()


@pytest.fixture
def gate(engine: EngineHarness) -> Iterator[Gate]:
    """In front of the emulator."""
    with gate_to(port_of(engine)) as opened:
        yield opened


def port_of(engine: EngineHarness) -> int:
    port = urlsplit(engine.emulator.url).port
    assert port is not None
    return port


async def run_through(engine: EngineHarness, passing: Passing, **other: Any) -> RunReport:
    runner = engine.runner(
        clock=passing, on_progress=passing.look, outage_patience_s=60.0, max_in_flight=8
    )
    return await replace(runner, **other).run(to_requested(make_requests(ROWS)))


def through(gate: Gate) -> dict[str, Any]:
    url = f"http://127.0.0.1:{gate.port}"
    return {"connect": lambda: KreaClient("emulator", base_url=url, timeout_s=5.0)}


def all_delivered(engine: EngineHarness, report: RunReport) -> None:
    assert report.stopped is None
    assert report.progress == Progress(total=ROWS, delivered=ROWS, charged_units=ROWS * 4500)
    assert engine.states(make_requests(ROWS)) == ["stored"] * ROWS
    assert engine.assert_accounts_agree()["creates"] == ROWS


async def test_a_network_that_is_away_is_waited_for_and_no_row_loses_a_try(
    engine: EngineHarness, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "krea_dagster.engine.run.outages"):
        passing = Passing(gate.close, gate.open)
        all_delivered(engine, await run_through(engine, passing, **through(gate)))
    said = [record.message for record in caplog.records if "outages" in record.name]
    assert len(said) == 2, "one line when it goes away, and one when it is back"
    assert said[0].startswith("EvoLink's API is away. The run waits for at most 60 s")
    assert said[1].startswith("EvoLink's API is back after")


@pytest.mark.parametrize("answer", ["503", "502_html"])
async def test_a_gateway_that_answers_for_an_api_that_is_away_is_waited_out(
    engine: EngineHarness, answer: str
) -> None:
    names = [answer, f"read_{answer}", f"credits_{answer}", f"batch_{answer}"]

    def rate(share: float) -> None:
        for name in names:
            engine.emulator.world.set_rate(name, share)

    report = await run_through(engine, Passing(lambda: rate(1.0), lambda: rate(0.0)))
    all_delivered(engine, report)


async def test_a_run_that_begins_while_the_api_is_away_waits_for_it(
    engine: EngineHarness, gate: Gate
) -> None:
    passing = Passing(lambda: None, gate.open)
    gate.close()
    passing.look(Progress(total=ROWS, delivered=ROWS))
    all_delivered(engine, await run_through(engine, passing, **through(gate)))


async def test_tasks_that_could_not_be_read_have_their_patience_afterwards(tmp_path: Path) -> None:
    """Each was read before, and had not ended."""
    slow = {"latency_s": 0.4, "latency_jitter": 0.9}
    with open_harness(tmp_path, **slow) as engine, gate_to(port_of(engine)) as gate:
        passing = Passing(gate.close, gate.open)
        runner = engine.runner(clock=passing, on_progress=passing.look, outage_patience_s=60.0)
        policy = replace(runner.policy, patience_s=1.5, wait_scale=0.1)
        runner = replace(runner, policy=policy, max_in_flight=30, **through(gate))
        all_delivered(engine, await runner.run(to_requested(make_requests(ROWS))))


async def test_an_api_that_stays_away_ends_the_run_with_one_sentence_and_nothing_lost(
    engine: EngineHarness, gate: Gate
) -> None:
    passing = Passing(gate.close, lambda: None)
    runner = engine.runner(
        clock=passing, on_progress=passing.look, outage_patience_s=0.5, max_in_flight=8
    )
    report = await replace(runner, **through(gate)).run(to_requested(make_requests(ROWS)))
    assert isinstance(report.stopped, TryLater)
    assert "EvoLink's API was away for" in str(report.stopped)
    assert report.progress.left == ROWS - report.progress.delivered > 0
    assert sum(report.left_reasons.values()) == report.progress.left
    at_stake = [one for one in engine.journal.all_records() if one.state in AT_STAKE]
    assert report.at_stake_units == sum(one.committed_units for one in at_stake)
    gate.open()
    later = await engine.run(make_requests(ROWS), "run-2")
    assert later.progress.delivered + later.progress.reused == ROWS
    assert engine.assert_accounts_agree()["creates"] == ROWS


async def test_a_certificate_that_is_refused_is_not_waited_for(engine: EngineHarness) -> None:
    """It needs a person."""
    untrusted = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(untrusted)
    runner = engine.runner(outage_patience_s=60.0)
    async with serving(answers(200, {}), untrusted) as server:
        connect = partial(KreaClient, "emulator", base_url=server.url)
        report = await replace(runner, connect=connect).run(to_requested(make_requests(2)))
    assert type(report.stopped) is RunStopped, "later it would be the same"
    assert "the certificate of 127.0.0.1 was refused" in str(report.stopped)
    assert engine.states(make_requests(2)) == ["planned", "planned"]


class Shaky(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A store in memory that can be away."""

    protocol = "shaky"
    store: dict[str, Any] = {}  # noqa: RUF012 - as fsspec has it
    pseudo_dirs = [""]  # noqa: RUF012 - as above
    cachable = False
    away = False

    def _see(self) -> None:
        if Shaky.away:
            raise ConnectionError("no route to the store")

    def info(self, path: str, **options: Any) -> Any:
        self._see()
        return super().info(path, **options)

    def put_file(self, source: str, path: str, **options: Any) -> Any:
        self._see()
        return super().put_file(source, path, **options)


@pytest.fixture
def shaky(tmp_path: Path) -> Iterator[ImageStore]:
    fsspec.register_implementation("shaky", Shaky, clobber=True)
    Shaky.store.clear()
    Shaky.away = False
    yield ImageStore(Storage(f"shaky://{tmp_path.name}"))
    Shaky.away = False


def set_away(away: bool) -> None:
    Shaky.away = away


async def test_a_store_that_is_away_is_waited_for_and_no_file_is_fetched_again(
    engine: EngineHarness, shaky: ImageStore
) -> None:
    passing = Passing(lambda: set_away(True), lambda: set_away(False))
    all_delivered(engine, await run_through(engine, passing, images=shaky))
    assert engine.emulator.stats()["file_gets"] == ROWS, "what was downloaded is kept"


async def test_a_store_that_stays_away_ends_the_run_and_the_next_one_goes_on(
    engine: EngineHarness, shaky: ImageStore
) -> None:
    passing = Passing(lambda: set_away(True), lambda: None)
    runner = engine.runner(clock=passing, on_progress=passing.look, outage_patience_s=0.3)
    with pytest.raises(StorageUnavailable, match="does not answer: no route to the store"):
        await replace(runner, images=shaky).run(to_requested(make_requests(ROWS)))
    set_away(False)
    await engine.run(make_requests(ROWS), "run-2", images=shaky)
    assert engine.states(make_requests(ROWS)) == ["stored"] * ROWS
    assert engine.assert_accounts_agree()["creates"] == ROWS


async def test_a_folder_of_another_host_that_is_away_is_waited_for(
    engine: EngineHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS: the handles are stale until the server is back."""
    away = False

    def set_stale(stale: bool) -> None:
        nonlocal away
        away = stale

    def opened(*arguments: Any, **options: Any) -> int:
        if away and ".partial" in str(arguments[0]):
            raise OSError(errno.ESTALE, "Stale file handle")
        return os_open(*arguments, **options)

    os_open = os.open
    monkeypatch.setattr(os, "open", opened)
    passing = Passing(lambda: set_stale(True), lambda: set_stale(False))
    all_delivered(engine, await run_through(engine, passing))


async def test_a_journal_that_another_process_locks_is_waited_for(
    engine: EngineHarness, tmp_path: Path
) -> None:
    """Answers that came meanwhile are kept in memory, and written when it is free."""
    with (
        closing(Journal(engine.url, lock_timeout_s=0.05)) as journal,
        closing(sqlite3.connect(tmp_path / "journal.db", check_same_thread=False)) as other,
    ):
        passing = Passing(lambda: other.execute("BEGIN IMMEDIATE"), other.rollback)
        all_delivered(engine, await run_through(engine, passing, journal=journal))


async def test_a_database_server_that_is_away_is_waited_for(
    engine: EngineHarness, journal_url: str
) -> None:
    """Connections break, also between a commit and its answer, and are refused for a while."""
    if journal_url.startswith("sqlite"):
        pytest.skip("SQLite has no server")
    with gate_before(journal_url) as (gate, url), closing(Journal(url)) as journal:
        passing = Passing(gate.close, gate.open)
        report = await run_through(engine, passing, journal=journal)
        assert report.stopped is None
        assert report.progress.delivered == ROWS
        records = journal.records([request.request_key for request in make_requests(ROWS)])
        assert {record.state for record in records.values()} == {State.STORED}
        assert engine.emulator.stats()["creates"] == ROWS


@contextmanager
def gate_before(text: str) -> Iterator[tuple[Gate, str]]:
    """A gate in front of a PostgreSQL server, and the URL that leads through it."""
    url = make_url(text)
    folder, port = url.query.get("host"), url.port or 5432
    with gate_to(f"{folder}/.s.PGSQL.{port}" if folder else port) as gate:
        through = url.difference_update_query(["host"]).set(host="127.0.0.1", port=gate.port)
        yield gate, through.render_as_string(hide_password=False)


async def test_a_stopped_run_waits_for_no_dependency(engine: EngineHarness, tmp_path: Path) -> None:
    with (
        closing(Journal(engine.url, lock_timeout_s=0.05)) as journal,
        closing(sqlite3.connect(tmp_path / "journal.db", check_same_thread=False)) as other,
    ):
        passing = Passing(lambda: other.execute("BEGIN IMMEDIATE"), lambda: None)
        runner = engine.runner(clock=passing, on_progress=passing.look, journal=journal)
        runner = replace(runner, policy=replace(runner.policy, outage_patience_s=3600.0))
        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:
                group.start_soon(runner.run, to_requested(make_requests(ROWS)))
                while not other.in_transaction:  # noqa: ASYNC110 - it is the run that begins it
                    await anyio.sleep(0.01)
                group.cancel_scope.cancel()
        other.rollback()
    await engine.run(make_requests(ROWS), "run-2")
    assert engine.states(make_requests(ROWS)) == ["stored"] * ROWS
    assert engine.assert_accounts_agree()["creates"] == ROWS


async def test_a_journal_that_stays_locked_ends_the_run_and_the_next_one_goes_on(
    engine: EngineHarness, tmp_path: Path
) -> None:
    with (
        closing(Journal(engine.url, lock_timeout_s=0.05)) as journal,
        closing(sqlite3.connect(tmp_path / "journal.db", check_same_thread=False)) as other,
    ):
        passing = Passing(lambda: other.execute("BEGIN IMMEDIATE"), lambda: None)
        runner = engine.runner(clock=passing, on_progress=passing.look, outage_patience_s=0.3)
        with pytest.raises(JournalError, match="locked"):
            await replace(runner, journal=journal).run(to_requested(make_requests(ROWS)))
        other.rollback()
    await engine.run(make_requests(ROWS), "run-2")
    assert engine.states(make_requests(ROWS)) == ["stored"] * ROWS
    assert engine.assert_accounts_agree()["creates"] == ROWS
