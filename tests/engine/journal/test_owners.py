"""The holder of a request is found by its lock, not by clocks or process tables."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text, update

from krea_dagster.engine.journal.database import Database
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.owners import SILENCE_S, FileLocks, _held, new_owner
from krea_dagster.engine.journal.schema import owners, requests
from tests.engine.harness import NOW, JournalWriter, make_request, make_requests

#: Registers, claims, says so, and waits to be told to end.
_HOLDER = """
import sys
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.owners import new_owner
journal = Journal(sys.argv[1])
owner = new_owner("other")
journal.claims.register(owner)
journal.claims.claim([sys.argv[2]], owner.owner)
print(owner.owner, flush=True)
for line in sys.stdin:
    if line == "fork\\n":
        import os
        if os.fork() == 0:
            print("forked", flush=True)
            import time
            time.sleep(60)
"""


@contextmanager
def another_process(journal_url: str, *before: str) -> Iterator[tuple[Any, str]]:
    """A process that holds the request, and its owner."""
    key = make_request().request_key
    command = [*before, sys.executable, "-c", _HOLDER, journal_url, key]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def planned(journal: Journal) -> str:
    journal.plan([(make_request(), "p")], run_id="r", at=NOW)
    return make_request().request_key


def make_silent(journal_url: str, owner: str, silence: timedelta) -> None:
    """Move an owner's heartbeat into the past."""
    with closing(Database(journal_url)) as database:
        database.write(
            "age",
            lambda connection: connection.execute(
                update(owners)
                .where(owners.c.owner == owner)
                .values(
                    heartbeat_at=text(f"heartbeat_at - {int(silence.total_seconds() * 1_000_000)}")
                )
            ),
        )


def is_sqlite(journal_url: str) -> bool:
    return journal_url.startswith("sqlite")


def test_a_living_process_keeps_its_claims_without_heartbeats(
    journal: Journal, journal_url: str
) -> None:
    key, me = planned(journal), JournalWriter(journal).owner.owner
    with another_process(journal_url) as (_, owner):
        assert journal.claims.claim([key], me) == set()
        for silence in (timedelta(days=400), timedelta(days=-400)):
            make_silent(journal_url, owner, silence)
            assert journal.claims.claim([key], me) == set()


def test_the_claims_of_a_killed_process_become_free(journal: Journal, journal_url: str) -> None:
    key, me = planned(journal), JournalWriter(journal).owner.owner
    with another_process(journal_url) as (process, owner):
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # its parent has not noticed
        if not is_sqlite(journal_url):
            assert journal.claims.claim([key], me) == set()
            make_silent(journal_url, owner, timedelta(seconds=SILENCE_S + 1))
        assert journal.claims.claim([key], me) == {key}
        assert journal.claims.holders([key])[key].startswith("run run-by-hand (process ")


def test_a_forked_child_does_not_keep_the_claims_of_its_killed_parent(
    journal: Journal, journal_url: str
) -> None:
    if not is_sqlite(journal_url):
        pytest.skip("the session ends with its connection")
    key, me = planned(journal), JournalWriter(journal).owner.owner
    with another_process(journal_url) as (process, _):
        process.stdin.write("fork\n")
        process.stdin.flush()
        assert process.stdout.readline() == "forked\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert journal.claims.claim([key], me) == {key}


@pytest.mark.skipif(os.geteuid() != 0, reason="namespaces of its own need root")
def test_a_process_of_another_host_with_the_same_pid_keeps_its_claims(
    journal: Journal, journal_url: str
) -> None:
    key, me = planned(journal), JournalWriter(journal).owner.owner
    apart = ("unshare", "--uts", "--pid", "--fork", "--kill-child")
    with another_process(journal_url, *apart):
        assert journal.claims.claim([key], me) == set()


def test_a_run_that_ended_in_a_living_process_releases_its_claims(
    journal: Journal, journal_url: str
) -> None:
    """Even if its journal could not be written when it ended."""
    key = planned(journal)

    with closing(Journal(journal_url)) as other:
        owner = new_owner("ended")
        other.claims.register(owner)
        assert other.claims.claim([key], owner.owner) == {key}
        other.database.locks.give_back(owner.owner)
        if not is_sqlite(journal_url):
            make_silent(journal_url, owner.owner, timedelta(seconds=SILENCE_S + 1))
        assert journal.claims.claim([key], JournalWriter(journal).owner.owner) == {key}


def test_a_run_with_a_lock_or_a_heartbeat_is_alive(journal: Journal, journal_url: str) -> None:
    if is_sqlite(journal_url):
        pytest.skip("there the kernel's lock tells alone")
    key, me = planned(journal), JournalWriter(journal).owner.owner
    owner = new_owner("other")
    journal.claims.register(owner)
    journal.claims.claim([key], owner.owner)
    make_silent(journal_url, owner.owner, timedelta(hours=1))
    assert journal.claims.claim([key], me) == set()  # it has its lock
    journal.claims.heartbeat(owner.owner)
    journal.database.locks.give_back(owner.owner)
    assert journal.claims.claim([key], me) == set()  # it was heard of
    make_silent(journal_url, owner.owner, timedelta(seconds=SILENCE_S + 1))
    assert journal.claims.claim([key], me) == {key}


# -- where there is no lock file --------------------------------------------------------------


def test_a_removed_lock_file_is_created_again(tmp_path: Path) -> None:
    with closing(Journal(f"sqlite:///{tmp_path / 'journal.db'}")) as journal:
        writer = JournalWriter(journal)
        (file,) = (tmp_path / "journal.db-runs").iterdir()
        file.unlink()
        journal.claims.heartbeat(writer.owner.owner)
        assert file.exists()
        journal.claims.release(writer.owner.owner)
        assert not file.exists()


def test_an_owner_without_a_lock_file_is_dead_after_silence(
    tmp_path: Path,
) -> None:
    url = f"sqlite:///{tmp_path / 'journal.db'}"
    now_s = 1000.0
    with closing(Journal(url)) as journal, closing(Database(url)) as database:
        writer = JournalWriter(journal)
        locks = FileLocks(tmp_path / "nowhere", monotonic=lambda: now_s)
        owner = writer.owner.owner

        def dead() -> set[str]:
            with database.read() as connection:
                return locks.dead(connection)

        os.close(_held.pop(owner))  # as of another process
        assert dead() == set()
        now_s += SILENCE_S
        assert dead() == set()
        journal.claims._locks = (
            locks  # its next heartbeat finds no folder to lock in, and is written
        )
        (tmp_path / "nowhere").write_text("no folder")
        journal.claims.heartbeat(owner)
        assert dead() == set()
        now_s += SILENCE_S + 1
        assert dead() == {owner}


def test_the_rows_and_files_of_dead_owners_are_removed(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'journal.db'}"
    with closing(Journal(url)) as journal:
        key, me = planned(journal), JournalWriter(journal).owner.owner
        with another_process(url) as (process, owner):
            process.kill()
            process.wait()
            assert journal.claims.claim([key], me) == {key}
        assert [file.name for file in (tmp_path / "journal.db-runs").iterdir()] == [me]
        with closing(Database(url)) as database, database.read() as connection:
            assert set(connection.execute(owners.select()).scalars()) == {me}
        assert owner != me


def test_a_partly_released_dead_owner_stays_dead(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'journal.db'}"
    with closing(Journal(url)) as journal:
        planned(journal)
        journal.plan([(other, "p") for other in make_requests(2)], run_id="r", at=NOW)
        me = JournalWriter(journal).owner.owner
        with another_process(url) as (process, owner):
            database = Database(url)
            database.write(
                "give more to",
                lambda connection: connection.execute(update(requests).values(claimed_by=owner)),
            )
            database.close()
            process.kill()
            process.wait()
            for request in (make_request(), *make_requests(2)):
                assert journal.claims.claim([request.request_key], me) == {request.request_key}
