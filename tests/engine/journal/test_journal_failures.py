"""The journal in failure: a run stops with a clear error, and the next one buys nothing twice.

The emulator's accounts are the witness: what was posted, created, and bought twice.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from subprocess import DEVNULL
from typing import Any, Final

import anyio
import pytest
from sqlalchemy import Connection, insert

from krea_dagster.api import KreaClient
from krea_dagster.emulator import Emulator
from krea_dagster.engine.journal.database import Database
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.schema import stops
from krea_dagster.engine.run.report import RunReport
from krea_dagster.engine.run.runner import Runner
from krea_dagster.engine.states import State
from krea_dagster.engine.storage.images import ImageStore
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import JournalError, PurchasesNotWritten, StorageError
from krea_dagster.models import AccountCredits, ImageRequest, Submission
from tests.engine.harness import KNOWN_LATENCIES, NOW, QUICK, make_requests, to_requested

pytestmark = pytest.mark.anyio

ROWS: Final = 6

#: Some row that can be written.
STOP: Final = {"launch": "l", "at": NOW, "error_code": "c", "error_message": "m"}


class HookedClient(KreaClient):
    """The real client, with hooks at two moments of a run."""

    before_buying: Callable[[], None] = staticmethod(lambda: None)
    after_a_post: Callable[[], None] = staticmethod(lambda: None)

    async def credits(self) -> AccountCredits:
        answer = await super().credits()
        self.before_buying()
        return answer

    async def submit(
        self, request: ImageRequest, *, idempotency_key: str, callback_url: str | None = None
    ) -> Submission:
        answer = await super().submit(
            request, idempotency_key=idempotency_key, callback_url=callback_url
        )
        self.after_a_post()
        return answer


class JournalHarness:
    """A journal in its own folder, and runs over the same rows against one emulator."""

    def __init__(self, folder: Path, emulator: Emulator) -> None:
        self.emulator = emulator
        self.folder = folder / "journal"
        self.folder.mkdir()
        self.path = self.folder / "journal.db"
        self.requests = make_requests(ROWS)
        self.images = ImageStore(Storage(str(folder / "images")))

    def open(self) -> Journal:
        return Journal(f"sqlite:///{self.path}", lock_timeout_s=0.2)

    async def run(
        self, run_id: str, client: type[HookedClient] = HookedClient, **options: Any
    ) -> RunReport:
        with closing(self.open()) as journal:
            return await self.runner(journal, run_id, client, **options).run(
                to_requested(self.requests)
            )

    def runner(
        self,
        journal: Journal,
        run_id: str,
        client: type[HookedClient] = HookedClient,
        **options: Any,
    ) -> Runner:
        return Runner(
            connect=lambda: client("emulator", base_url=self.emulator.url, timeout_s=5.0),
            journal=journal,
            images=self.images,
            run_id=run_id,
            latencies=KNOWN_LATENCIES,
            **{"policy": QUICK, **options},
        )

    def files(self) -> list[str]:
        """The stored images."""
        return list(self.images.storage.names("images"))

    def task_ids(self) -> set[str]:
        """The tasks that the journal knows."""
        with closing(self.open()) as journal:
            return {charge.task_id for charge in journal.charges() if charge.task_id}

    def created(self) -> set[str]:
        """The tasks that the server has created."""
        return {task["task_id"] for task in self.emulator.stats()["tasks"]}

    async def assert_recovers(self, *, adopted: bool = False) -> None:
        """Run again without a failure: every row is delivered, and none was bought twice.

        ``adopted``: the journal has forgotten purchases, and adopts their files.
        """
        with anyio.fail_after(60):
            report = await self.run("run-after")
        assert report.left == {}
        stats = self.emulator.stats()
        assert stats["creates"] == len(self.requests)
        assert stats["bodies_bought_more_than_once"] == 0
        known = self.task_ids()
        assert known <= self.created() if adopted else known == self.created()
        with closing(self.open()) as journal:
            assert journal.count_by_state() == {State.STORED: len(self.requests)}


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[JournalHarness]:
    with Emulator(latency_s=0.01, latency_jitter=0.0, state=tmp_path / "emulator") as emulator:
        yield JournalHarness(tmp_path, emulator)


# -- the troubles: each yields once it is there, and ends with the block --------------------------


@contextmanager
def _file_system(folder: Path, size: str = "2m") -> Iterator[None]:
    """Mount a small file system at a folder, if this user may."""
    if (
        os.name != "posix"
        or os.getuid()
        or _mount("-t", "tmpfs", "-o", f"size={size}", "t", folder)
    ):
        pytest.skip("needs to mount a file system")
    try:
        yield
    finally:
        subprocess.run(["/bin/umount", "-l", folder], check=True)


def _mount(*options: str | Path) -> int:
    return subprocess.run(["/bin/mount", *options], check=False, stderr=DEVNULL).returncode


@contextmanager
def full(path: Path) -> Iterator[None]:
    filler = path.with_name("filler")
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(b"\0" * 4096):
            pass
    yield
    filler.unlink()


@contextmanager
def read_only(path: Path) -> Iterator[None]:
    assert _mount("-o", "remount,ro", path.parent) == 0
    yield
    assert _mount("-o", "remount,rw", path.parent) == 0


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("begin immediate")
        yield


@contextmanager
def removed(path: Path) -> Iterator[None]:
    aside = path.with_name("aside")
    path.rename(aside)
    yield
    aside.rename(path)


@contextmanager
def replaced(path: Path) -> Iterator[None]:
    """Including its log: an old log would prevent a new journal."""
    logs = [path.with_name(path.name + ending) for ending in ("-wal", "-shm")]
    kept = [log.rename(log.with_name(f"aside{log.name}")) for log in logs]
    with removed(path):
        Journal(f"sqlite:///{path}").close()
        yield
    for log, aside in zip(logs, kept, strict=True):
        aside.rename(log)


@contextmanager
def folder_removed(path: Path) -> Iterator[None]:
    aside = path.parent.with_name("aside")
    path.parent.rename(aside)
    yield
    aside.rename(path.parent)


@contextmanager
def emptied(path: Path) -> Iterator[None]:
    before = path.read_bytes()
    path.write_bytes(b"")
    yield
    path.write_bytes(before)


@contextmanager
def header_overwritten(path: Path) -> Iterator[None]:
    before = path.read_bytes()
    path.write_bytes(b"\xff" * 100 + before[100:])
    yield
    path.write_bytes(before)


@contextmanager
def cut(path: Path) -> Iterator[None]:
    before = path.read_bytes()
    path.write_bytes(before[: len(before) // 2])
    yield
    path.write_bytes(before)


Failure = Callable[[Path], Any]

#: The failure, words of the error, and words of the advice.
TROUBLES: Final[list[tuple[Failure, str, str]]] = [
    (full, "disk is full|disk I/O error|unable to open", "space|read and written"),
    (locked, "database is locked", "wait for it, or end it"),
    (removed, "unable to open", "The file is missing. Put it back"),
    # Between removal and replacement, a write finds no file.
    (replaced, "was replaced by another|file is missing", "Put it back"),
    (folder_removed, "unable to open", "The file is missing. Put it back"),
    (header_overwritten, "not a database", "Do not remove it.*Restore a backup"),
    (cut, "malformed", "Do not remove it.*Restore a backup"),
]
_NEED_A_MOUNT: Final = (full,)
every_failure = pytest.mark.parametrize(
    ("failure", "said", "advice"), TROUBLES, ids=[failure.__name__ for failure, _, _ in TROUBLES]
)


@pytest.fixture
def file_system(harness: JournalHarness, request: pytest.FixtureRequest) -> Iterator[None]:
    """A file system for the failures that need one."""
    if request.node.callspec.params["failure"] in _NEED_A_MOUNT:
        with _file_system(harness.folder):
            yield
    else:
        yield


# -- the moments ------------------------------------------------------------------------------


@every_failure
@pytest.mark.usefixtures("file_system")
async def test_nothing_is_posted_if_the_intent_cannot_be_written(
    harness: JournalHarness, failure: Failure, said: str, advice: str
) -> None:
    with closing(harness.open()):
        pass
    with FailureAtMoment(failure, harness) as failing:
        with pytest.raises(JournalError, match=f"(?s)({said}).*Nothing more is bought") as error:
            await harness.run("run-1", failing.client("before_buying"))
        assert failing.began
        assert re.search(advice, str(error.value))
        assert harness.emulator.stats()["submit_posts"] == 0
    await harness.assert_recovers()


async def test_a_journal_on_a_read_only_disk_ends_a_run_before_it_buys(
    harness: JournalHarness,
) -> None:
    """A disk cannot become read-only while a file is open for writing."""
    with _file_system(harness.folder):
        with closing(harness.open()):
            pass
        with (
            read_only(harness.path),
            pytest.raises(JournalError, match=r"(?s)(readonly|unable to open).*writ") as error,
        ):
            await harness.run("run-1")
        assert "Nothing more is bought" in str(error.value)
        assert harness.emulator.stats()["submit_posts"] == 0
        await harness.assert_recovers()


@every_failure
@pytest.mark.usefixtures("file_system")
async def test_an_unwritten_purchase_is_named_and_continued_by_the_next_run(
    harness: JournalHarness, failure: Failure, said: str, advice: str
) -> None:
    with FailureAtMoment(failure, harness) as failing:
        with pytest.raises(PurchasesNotWritten, match=f"(?s)({said}).*Nothing more is") as error:
            await harness.run("run-1", failing.client("after_a_post"))
        created = {task["task_id"]: task for task in harness.emulator.stats()["tasks"]}
    named = {purchase.task_id: purchase for purchase in error.value.purchases}
    assert named.keys() == created.keys() - harness.task_ids() != set()
    for task_id, purchase in named.items():
        assert purchase.idempotency_key == created[task_id]["idempotency_key"]
        assert purchase.credits == 0.45
        assert f"task {task_id} (0.45 credits) of request {purchase.request_key}" in str(
            error.value
        )
    await harness.assert_recovers()


async def test_an_unwritten_purchase_is_continued_without_a_person(
    harness: JournalHarness,
) -> None:
    hold = replace(QUICK, on_unknown="hold")
    with FailureAtMoment(locked, harness) as failing, pytest.raises(PurchasesNotWritten) as error:
        await harness.run("run-1", failing.client("after_a_post"), policy=hold)
    named = {purchase.request_key: purchase.task_id for purchase in error.value.purchases}
    report = await harness.run("run-2", policy=hold)
    assert len(report.recovered) == len(named) > 0
    assert all("is in the journal now" in said for said in report.recovered)
    assert not set(report.left) & set(named)
    assert harness.emulator.stats()["replays"] == 0
    await harness.assert_recovers()


async def test_a_run_stopped_during_a_journal_failure_names_its_purchases(
    harness: JournalHarness,
) -> None:
    runs: list[asyncio.Task[RunReport]] = []

    @contextmanager
    def locked_and_stopped(path: Path) -> Iterator[None]:
        with locked(path):
            runs[0].cancel()
            yield

    with FailureAtMoment(locked_and_stopped, harness) as failing:
        runs.append(asyncio.ensure_future(harness.run("run-1", failing.client("after_a_post"))))
        with pytest.raises(PurchasesNotWritten) as error:
            await runs[0]
    created = {task["task_id"] for task in harness.emulator.stats()["tasks"]}
    assert {purchase.task_id for purchase in error.value.purchases} == created != set()
    await harness.assert_recovers()


def test_a_journal_that_is_removed_within_a_transaction_is_noticed_at_its_end(
    harness: JournalHarness,
) -> None:
    """The commit succeeds, in a file that is unreachable."""

    def write_and_lose(database: Database) -> None:
        def write(connection: Connection) -> None:
            connection.execute(insert(stops).values(STOP))
            harness.path.unlink()

        database.write("write to", write)

    with closing(Database(f"sqlite:///{harness.path}")) as database:
        with pytest.raises(JournalError, match="removed or replaced during a write"):
            write_and_lose(database)
        with pytest.raises(JournalError, match=r"The file is missing. Put it back"):
            database.check_integrity()


async def test_a_storage_root_that_is_full_ends_the_run_and_loses_no_image(
    harness: JournalHarness,
) -> None:
    folder = Path(harness.images.storage.locate(""))
    folder.mkdir()  # noqa: ASYNC240 - on this machine
    with _file_system(folder, "300k"), pytest.raises(StorageError, match="No space left") as error:
        await harness.run("run-1")
    assert "Nothing more is bought" in str(error.value)
    assert harness.task_ids() == harness.created() != set()
    await harness.assert_recovers()


async def test_the_next_run_of_the_same_process_continues_at_once(harness: JournalHarness) -> None:
    """A run that could not release its claims does not keep them."""
    with FailureAtMoment(locked, harness) as failing, pytest.raises(JournalError):
        await harness.run("run-1", failing.client("after_a_post"))
    with closing(harness.open()) as journal:
        assert any(record.claimed_by for record in journal.all_records())
    await harness.assert_recovers()


class FailureAtMoment:
    """A failure that begins at a moment of a run, and ends with the block."""

    def __init__(self, failure: Failure, harness: JournalHarness) -> None:
        self._failure = failure(harness.path)
        self.began = False

    def client(self, moment: str) -> type[HookedClient]:
        return type("Told", (HookedClient,), {moment: staticmethod(self._begin)})

    def _begin(self) -> None:
        if not self.began:
            self.began = True
            self._failure.__enter__()

    def __enter__(self) -> FailureAtMoment:
        return self

    def __exit__(self, *error: object) -> None:
        if self.began:
            self._failure.__exit__(None, None, None)


# -- a journal that was lost, or went back in time ------------------------------------------------


async def test_a_lost_journal_is_rebuilt_from_the_files(harness: JournalHarness) -> None:
    """They have their requests' names, so nothing is bought; the payer is unknown."""
    await harness.run("run-1")
    before = {name: harness.images.storage.modified_at(name) for name in harness.files()}
    harness.path.unlink()
    report = await harness.run("run-2")
    assert (report.new, report.posts, report.progress.delivered) == (ROWS, 0, ROWS)
    assert harness.emulator.stats()["creates"] == ROWS
    assert {name: harness.images.storage.modified_at(name) for name in harness.files()} == before
    with closing(harness.open()) as journal:
        assert journal.count_by_state() == {State.STORED: ROWS}
        assert journal.charges() == []


async def test_a_lost_journal_and_lost_files_are_rebuilt_from_the_server(
    harness: JournalHarness,
) -> None:
    """The same rows have the same Idempotency-Keys; what is replayed is not charged again."""
    await harness.run("run-1")
    harness.path.unlink()
    for name in harness.files():
        harness.images.storage.remove(name)
    report = await harness.run("run-2")
    assert report.new == report.posts == ROWS
    assert harness.emulator.stats()["replays"] == ROWS
    with closing(harness.open()) as journal:
        assert {charge.replayed for charge in journal.charges()} == {True}
        assert sum(charge.charged_units or 0 for charge in journal.charges()) == 0
        assert journal.commitment("run:run-2").committed_units == 0
    await harness.assert_recovers()


async def test_a_journal_whose_write_ahead_log_was_removed_buys_nothing_twice(
    harness: JournalHarness,
) -> None:
    """Everything written since the last checkpoint is lost."""
    with closing(harness.open()) as journal:
        journal.plan([(r, "p") for r in harness.requests[:1]], run_id="r", at=NOW)
    with closing(sqlite3.connect(harness.path)) as reader:
        reader.execute("begin")
        reader.execute("select * from requests").fetchall()
        await harness.run("run-1")  # the reader keeps the log from being taken into the file
        shutil.copy(harness.path, harness.path.with_name("kept"))
    assert harness.path.with_name("kept").read_bytes() != harness.path.read_bytes()
    harness.path.unlink()
    harness.path.with_name("kept").rename(harness.path)
    with closing(harness.open()) as journal:
        assert journal.count_by_state() == {State.PLANNED: 1}
    await harness.assert_recovers(adopted=True)


async def test_a_damaged_write_ahead_log_buys_nothing_twice(harness: JournalHarness) -> None:
    with closing(harness.open()):
        pass
    with closing(sqlite3.connect(harness.path)) as reader:
        reader.execute("begin")
        reader.execute("select * from requests").fetchall()
        await harness.run("run-1")
        log = bytearray(harness.path.with_name("journal.db-wal").read_bytes())
        shutil.copy(harness.path, harness.path.with_name("kept"))
    harness.path.unlink()
    harness.path.with_name("kept").rename(harness.path)
    log[len(log) // 2 :] = b"\x55" * (len(log) - len(log) // 2)
    harness.path.with_name("journal.db-wal").write_bytes(log)
    await harness.assert_recovers(adopted=True)


# -- damage -----------------------------------------------------------------------------------


async def test_damage_in_any_page_buys_nothing_twice(harness: JournalHarness) -> None:
    """Damage that a run does not notice must not cost anything either."""
    await harness.run("run-1")
    whole = harness.path.read_bytes()
    harness.requests = make_requests(ROWS + 1)
    noticed = 0
    pages = range(4096, len(whole), 4096)
    for start in pages:
        harness.path.write_bytes(whole[:start] + b"\xa5" * 4096 + whole[start + 4096 :])
        try:
            await harness.run("run-2")
        except JournalError as error:
            assert "Nothing more is bought" in str(error)  # noqa: PT017 - or it went well
            noticed += 1
        assert harness.emulator.stats()["creates"] <= ROWS + 1
    assert noticed > 0.9 * len(pages)
    harness.path.write_bytes(whole)
    await harness.assert_recovers()


async def test_damage_in_an_unread_page_is_found_before_buying(
    harness: JournalHarness,
) -> None:
    with closing(harness.open()):
        pass
    with closing(sqlite3.connect(harness.path)) as other:
        page = other.execute(
            "select rootpage from sqlite_master where name = 'account_readings'"
        ).fetchone()[0]
    data = bytearray(harness.path.read_bytes())
    data[(page - 1) * 4096 : page * 4096] = b"\xa5" * 4096
    harness.path.write_bytes(data)
    with pytest.raises(JournalError, match="Do not remove it"):
        await harness.run("run-1")
    assert harness.emulator.stats()["requests"] == {}


# -- what is found where a journal should be ------------------------------------------------------


def _is_refused(path: Path, said: str) -> None:
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(JournalError, match=said):
        Journal(f"sqlite:///{path}", lock_timeout_s=0.2)
    assert (path.read_bytes() if path.is_file() else None) == before


def test_an_empty_file_is_not_a_new_journal(harness: JournalHarness) -> None:
    harness.path.write_bytes(b"")
    _is_refused(harness.path, "is an empty file")


def test_a_journal_that_was_emptied_is_refused(harness: JournalHarness) -> None:
    with closing(harness.open()):
        pass
    with emptied(harness.path):
        _is_refused(harness.path, "is an empty file")
    with closing(harness.open()):
        pass


def test_a_write_ahead_log_without_its_journal_is_an_error(harness: JournalHarness) -> None:
    """SQLite would merge the old log into the new file."""
    harness.path.with_name("journal.db-wal").write_bytes(b"x" * 100)
    _is_refused(harness.path, "its write-ahead log journal.db-wal is there. Put it back")
    assert not harness.path.exists()


def test_a_folder_is_not_a_journal(harness: JournalHarness) -> None:
    harness.path.mkdir()
    _is_refused(harness.path, "unable to open database file.*Check the path")


def test_a_new_journal_is_created_atomically(harness: JournalHarness) -> None:
    with closing(harness.open()):
        pass
    assert [file.name for file in harness.folder.iterdir()] == ["journal.db"]
