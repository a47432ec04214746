"""Two hosts that share their rows and a PostgreSQL journal, one clock five minutes ahead.

Each is a process with its own host name and process namespace. KREA_TWO_HOSTS_ROWS=500 sets the
number of rows.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import anyio
import pytest

from krea_dagster.drill.worlds import on_host
from krea_dagster.emulator import Emulator
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.states import State
from tests.engine.harness import wait_until
from tests.services.two_hosts_worker import Work

ROWS: Final = int(os.environ.get("KREA_TWO_HOSTS_ROWS", "120"))
AHEAD_S: Final = 300.0

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces of their own need root")


class Hosts:
    """Two hosts, and the server that they buy from."""

    def __init__(self, folder: Path, journal_url: str, emulator: Emulator) -> None:
        self.emulator = emulator
        self.journal_url = journal_url
        self.work = Work(journal_url, emulator.url, str(folder / "root"), "", ROWS)
        self._running: dict[str, subprocess.Popen[str]] = {}

    def start(self, host: str, work: Work) -> None:
        """Start a host's worker; the second one's clock is ahead."""
        ahead_s = AHEAD_S if host == "host-b" else 0.0
        given = replace(work, run_id=f"{host}-{len(self._running)}", ahead_s=ahead_s)
        command = [sys.executable, "-m", "tests.services.two_hosts_worker", given.as_text()]
        self._running[host] = subprocess.Popen(
            on_host(host, command),
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            cwd=Path(__file__).parents[2],
        )

    def kill(self, host: str) -> None:
        """Kill a host's worker."""
        process = self._running[host]
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

    def created(self) -> int:
        return int(self.emulator.stats(tasks=False)["creates"])

    async def ended(self, within_s: float) -> list[dict[str, object]]:
        """Wait for both, and return their reports."""
        found = []
        with anyio.fail_after(within_s):
            for process in self._running.values():
                out, _ = await anyio.to_thread.run_sync(process.communicate)
                found.append(json.loads(out.strip().splitlines()[-1]))
        return found

    def states(self) -> dict[State, int]:
        with closing(Journal(self.journal_url)) as journal:
            return journal.count_by_state()


@contextmanager
def hosts(folder: Path, journal_url: str, *, honours_keys: bool) -> Iterator[Hosts]:
    if journal_url.startswith("sqlite"):
        pytest.skip("two machines share a server's journal")
    with Emulator(
        state=folder / "emulator", latency_s=0.2, latency_jitter=0.3, idempotency=honours_keys
    ) as emulator:
        emulator.world.set_rate("delay_create", 1.0, arg=0.3)
        yield Hosts(folder, journal_url, emulator)


async def each_killed_once(both: Hosts, work: Work) -> list[dict[str, object]]:
    both.start("host-a", work)
    both.start("host-b", work)
    await wait_until(lambda: both.created() >= ROWS // 4, within_s=120)
    both.kill("host-a")
    both.start("host-a", work)
    await wait_until(lambda: both.created() >= ROWS // 2, within_s=120)
    both.kill("host-b")
    both.start("host-b", work)
    return await both.ended(within_s=300)


@pytest.mark.anyio
async def test_a_living_host_is_not_taken_over_for_any_clock(
    tmp_path: Path, journal_url: str
) -> None:
    with hosts(tmp_path, journal_url, honours_keys=False) as both:
        both.start("host-a", both.work)
        both.start("host-b", both.work)
        reports = await both.ended(within_s=300)
        assert [report["left"] for report in reports] == [[], []]
        books = both.emulator.stats()
        assert (books["creates"], books["bodies_bought_more_than_once"]) == (ROWS, 0)
        assert both.states() == {State.STORED: ROWS}


@pytest.mark.anyio
async def test_two_hosts_killed_once_each_buy_every_row_once(
    tmp_path: Path, journal_url: str
) -> None:
    with hosts(tmp_path, journal_url, honours_keys=True) as both:
        reports = await each_killed_once(both, both.work)
        assert [report["left"] for report in reports] == [[], []]
        books = both.emulator.stats()
        assert (books["creates"], books["bodies_bought_more_than_once"]) == (ROWS, 0)
        assert both.states() == {State.STORED: ROWS}


@pytest.mark.anyio
async def test_under_hold_two_killed_hosts_buy_nothing_twice_and_list_unknown_rows(
    tmp_path: Path, journal_url: str
) -> None:
    with hosts(tmp_path, journal_url, honours_keys=False) as both:
        await each_killed_once(both, replace(both.work, on_unknown="hold"))
        books = both.emulator.stats()
        assert books["bodies_bought_more_than_once"] == 0
        states = both.states()
        unknown = states.get(State.UNKNOWN, 0)
        assert states.get(State.STORED, 0) + unknown == ROWS
        with closing(Journal(both.journal_url)) as journal:
            listed = [one for one in journal.unsettled() if one.state is State.UNKNOWN]
        assert len(listed) == unknown
        print(f"{ROWS} rows: {books['creates']} created, none twice, {unknown} unknown and listed")
