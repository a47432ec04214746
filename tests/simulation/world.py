"""The world around the runs: the server, the network, the journal's disk, the storage's disk.

The processes of a scenario share all of it: an outage is one for all of them.
"""

from __future__ import annotations

import asyncio
import contextvars
import errno
import hashlib
import json
import os
import random
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, BinaryIO, Final

import httpx
from sqlalchemy import Engine, event

from krea_dagster.emulator.app import EmulatorApp
from krea_dagster.emulator.callback_sender import CallbackSender
from krea_dagster.emulator.faults import ChosenFault, RequestKind
from krea_dagster.emulator.world import World
from krea_dagster.engine.journal.callback_log import CallbackLog
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import JournalError
from tests.simulation.images import AtOnce, CheapPictures
from tests.simulation.scenario import Server

API_KEY: Final = "sk-of-the-simulation-7Qz"
BASE_URL: Final = "http://127.0.0.1:9"
RECEIVER: Final = "https://receiver.test/"
EPOCH: Final = datetime(2026, 6, 10, 21, 30, tzinfo=timezone.utc)

#: One image at the published price of the more expensive quality, in units.
_MOST_UNITS: Final = 18_000
_RICH_UNITS: Final = 10_000_000


class CountingWorld(World):
    """The emulator's world, with a count of the faults that have occurred."""

    struck: Callable[[str], None] = lambda _: None

    def choose_fault(self, kind: RequestKind, prompt: str = "") -> ChosenFault | None:
        """Return the chosen fault, and count it."""
        chosen = super().choose_fault(kind, prompt)
        if chosen is not None:
            type(self).struck(chosen.fault.name)
        return chosen


class SimulatedWorld:
    """The world of one scenario."""

    def __init__(self, folder: Path, server: Server, seed: int) -> None:
        self.folder = folder
        self.server = server
        self.loop = asyncio.get_running_loop()
        self.chance = random.Random(f"house {seed}")
        self.counts: Counter[str] = Counter()
        self.away: dict[str, str] = {}
        self.trace = hashlib.sha256()
        self.lines: list[str] | None = None
        self.wishes: list[tuple[str, tuple[str, int]]] = []  # ("asked" or "ended", slot)
        self.broken: list[str] = []  # failures of the simulation's own tasks
        CountingWorld.struck = lambda name: self.count(f"fault {name}")
        self.emulated = CountingWorld(
            folder / "server",
            clock=self.now_s,
            seed=seed,
            latency_s=server.latency_s,
            latency_jitter=server.latency_jitter,
            max_concurrent=server.max_concurrent,
            rate=server.rate,
            idempotency=server.honours_keys,
            link_lifetime_s=server.link_lifetime_s,
            task_lifetime_s=server.task_lifetime_s,
        )
        paid = server.images_paid
        self.emulated.add_account(API_KEY, _RICH_UNITS if paid is None else paid * _MOST_UNITS)
        self.app = EmulatorApp(
            self.emulated, batch=server.has_batch, images=CheapPictures(), executor=AtOnce()
        )
        self.app.break_connection = lambda scope, how: scope["extensions"]["break"](how)
        self._caller = CallbackSender(self.emulated, BASE_URL, poster=Receiver(self), look_s=60.0)
        self.app.wake = self._caller.wake
        self._calling = self.spawn(self._caller.run())
        self._tasks: list[asyncio.Task[Any]] = []

    # -- time, order and the trace ------------------------------------------------------------

    def now_s(self) -> float:
        """Return the true time, in unix seconds."""
        return EPOCH.timestamp() + self.loop.time()

    def now(self) -> datetime:
        """Return the true time."""
        return EPOCH + timedelta(seconds=self.loop.time())

    def count(self, what: str, n: int = 1) -> None:
        """Count something that happened."""
        self.counts[what] += n
        self.note(what)

    def note(self, what: str) -> None:
        """Add a line to the trace, by which two plays of a scenario are compared."""
        line = f"{self.loop.time():.6f} {what}"
        self.trace.update(line.encode())
        if self.lines is not None:
            self.lines.append(line)

    def spawn(self, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start a task that does not belong to a process."""
        return contextvars.Context().run(self.loop.create_task, coro)

    def line_s(self) -> float:
        """Return how long one way over the network takes now."""
        return self.server.line_s * self.chance.choice((0.5, 1.0, 1.0, 1.0, 1.5, 5.0))

    def disk_s(self) -> float:
        """Return how long a call in a thread takes now."""
        return self.chance.choice((0.0, 0.001, 0.001, 0.002, 0.02))

    async def close(self) -> None:
        """Close the server."""
        self._caller.stop()
        await self._calling
        self.emulated.close()

    def mend(self) -> None:
        """End all faults and outages."""
        self.away.clear()
        self.emulated.forget_scripts()
        for name in list(self.emulated.rates()):
            self.emulated.set_rate(name, 0)
        self.emulated.max_concurrent = self.emulated.rate = None
        self.top_up()

    def top_up(self) -> None:
        """Give the account many credits."""
        with self.emulated.transaction():
            self.emulated._db.execute("UPDATE accounts SET granted = granted + ?", (_RICH_UNITS,))

    # -- disks --------------------------------------------------------------------------------

    def check_store(self, *, writes: bool) -> None:
        """Raise OSError if the storage's disk is away, or full for writes."""
        how = self.away.get("store")
        if how == "is gone":
            self.count("store is gone")
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        if how == "is full" and writes:
            self.count("store is full")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def check_journal(self, *, begins: bool = False, commits: bool = False) -> None:
        """Raise SQLite's error if the journal is away."""
        how = self.away.get("journal")
        if how is None:
            return
        # SQLite itself is never lost in this way; it simulates a database on another host.
        away = "database is locked, or does not answer"
        said = {
            "is locked": away if begins else "",
            "does not answer": "" if commits else away,
            "loses its answers": away if commits else "",
            "is full": "database or disk is full" if begins else "",
        }[how]
        if said:
            self.count(f"journal {how}")
            raise sqlite3.OperationalError(said)


#: The world whose journal is opened: all journals of a scenario are one file.
_PRESENT: Final[dict[str, SimulatedWorld]] = {}


@contextmanager
def present(world: SimulatedWorld) -> Any:
    """Let all connections to a journal meet the outages of this world."""
    _PRESENT["world"] = world
    try:
        yield
    finally:
        _PRESENT.clear()


class _Cursor(sqlite3.Cursor):
    def execute(self, sql: str, *arguments: Any) -> Any:
        """Execute, unless the journal is away."""
        if world := _PRESENT.get("world"):
            world.check_journal(begins=sql.startswith("BEGIN IMMEDIATE"))
        return super().execute(sql, *arguments)


class _Connection(sqlite3.Connection):
    def cursor(self, *_: Any) -> Any:
        """Return a cursor that notices when the journal is away."""
        return super().cursor(_Cursor)

    def commit(self) -> None:
        """Commit; the answer may be lost."""
        super().commit()
        if (world := _PRESENT.get("world")) and self.total_changes:
            world.check_journal(commits=True)


@event.listens_for(Engine, "do_connect")
def _connect(_dialect: Any, _record: Any, _arguments: Any, named: dict[str, Any]) -> None:
    named["factory"] = _Connection


#: What SQLAlchemy has compiled, by dialect: each journal would compile all statements again.
_COMPILED: Final[dict[str, Any]] = {}


def open_journal(world: SimulatedWorld) -> Journal:
    """Open the journal, as each process does."""
    journal = Journal(f"sqlite:///{world.folder / 'journal.db'}", lock_timeout_s=0.0)
    for engine in (journal.database._reading, journal.database._writing):
        engine.dialect = _COMPILED.setdefault("dialect", engine.dialect)
        engine._compiled_cache = _COMPILED.setdefault("cache", engine._compiled_cache)
    return journal


class DiskStorage(Storage):
    """The storage root as one process sees it: a folder of another host."""

    def __init__(self, root: str, check: Callable[..., None]) -> None:
        self._check = check
        super().__init__(root)

    def size_bytes(self, name: str) -> int | None:
        """The size of a file."""
        self._checked(writes=False)
        return super().size_bytes(name)

    def open(self, name: str) -> BinaryIO:
        """Open a file."""
        self._checked(writes=False)
        return super().open(name)

    def read(self, name: str) -> bytes:
        """Read a small file."""
        self._checked(writes=False)
        return super().read(name)

    def publish(self, temporary: Path, name: str) -> None:
        """Give a file its name."""
        self._checked(writes=True)
        super().publish(temporary, name)

    def create_temporary(self) -> tuple[Path, int]:
        """Open a new file."""
        self._checked(writes=True)
        return super().create_temporary()

    def names(self, folder: str) -> Iterator[str]:
        """The names of files."""
        self._check(writes=False)
        return super().names(folder)

    def _checked(self, *, writes: bool) -> None:
        try:
            self._check(writes=writes)
        except OSError as error:
            self.fail(error)


# -- callbacks --------------------------------------------------------------------------------


def callback_url(request_key: str) -> str:
    """Return the callback address of a request."""
    return f"{RECEIVER}{request_key}"


class Receiver:
    """Records callbacks."""

    def __init__(self, world: SimulatedWorld) -> None:
        self._world = world

    async def post(self, url: str, body: bytes) -> int:
        """Take a callback; return the status of the answer."""
        world = self._world
        await asyncio.sleep(world.line_s())
        if "receiver" in world.away:
            world.count("receiver is down")
            return 0
        world.count("callback")
        return remember(world, url.removeprefix(RECEIVER), json.loads(body)["id"])


def remember(world: SimulatedWorld, request_key: str, task_id: str | None) -> int:
    """Record a callback, as the receiver does."""
    try:
        log = CallbackLog.open(f"sqlite:///{world.folder / 'journal.db'}", now=world.now)
        try:
            return 200 if log.add([(request_key, task_id)]) else 404
        finally:
            log.close()
    except JournalError:
        return 503


# -- HTTP -------------------------------------------------------------------------------------


class SimulatedTransport(httpx.AsyncBaseTransport):
    """The network from one process to the server, in this process and on virtual time.

    ``enters`` is called before a request leaves, and ``leaves`` after its answer has come.
    """

    reports_unsent = True

    def __init__(
        self, world: SimulatedWorld, enters: Callable[[str], Any], leaves: Callable[[Any], None]
    ):
        self._world = world
        self._enters = enters
        self._leaves = leaves

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request, as httpx's own transport would."""
        world = self._world
        what = _kind(request)
        call = self._enters(what)
        part = "files" if what == "file" else "api"
        how = world.away.get(part)
        limits = request.extensions.get("timeout", {})
        if how == "refuses":
            world.count(f"{part} refuses")
            await asyncio.sleep(world.line_s())
            raise httpx.ConnectError("connection refused")
        if how == "is silent":
            world.count(f"{part} is silent")
            await asyncio.sleep(limits.get("connect") or 10.0)
            raise httpx.ConnectTimeout("no connection")
        content = b"".join([piece async for piece in request.stream])  # type: ignore[union-attr]
        await asyncio.sleep(world.line_s())
        if how == "answers 502":
            world.count(f"{part} answers 502")
            self._leaves(call)
            return httpx.Response(502, html="<html>Bad gateway</html>")
        exchange = _Exchange(world, request, content)
        if world.away.get(part) == "loses its answers":
            world.count(f"{part} loses its answers")
            exchange.answer.add_done_callback(
                lambda answer: answer.cancelled() or answer.exception()
            )
            await asyncio.sleep(limits.get("read") or 60.0)
            exchange.leave()
            raise httpx.ReadTimeout("no answer")
        try:
            status, headers = await _within(exchange.answer, limits.get("read"))
            await asyncio.sleep(world.line_s())
        except BaseException:
            exchange.leave()
            raise
        self._leaves(call)
        world.note(f"answered {what} {status}")
        return httpx.Response(status, headers=headers, stream=_Body(exchange))


async def _within(answer: asyncio.Future[Any], seconds: float | None) -> Any:
    done, _ = await asyncio.wait([answer], timeout=seconds)
    if not done:
        raise httpx.ReadTimeout("no answer")
    return answer.result()


def _kind(request: httpx.Request) -> str:
    path = request.url.path
    if path.startswith("/files/"):
        return "file"
    if path.endswith("/generations"):
        return "create"
    return "batch" if path.endswith("/batch") else "credits" if "credits" in path else "read"


_BREAKS: Final = {
    "close": httpx.RemoteProtocolError("server disconnected without sending a response"),
    "reset": httpx.ReadError("connection reset by peer"),
    "garbage": httpx.RemoteProtocolError("illegal status line"),
}


class _Exchange:
    """One request at the server: its answer, and the pieces of the answer's body."""

    def __init__(self, world: SimulatedWorld, request: httpx.Request, content: bytes) -> None:
        self.answer: asyncio.Future[tuple[int, Any]] = world.loop.create_future()
        self.pieces: list[bytes] = []
        self.ended = asyncio.Event()
        self.error: Exception | None = None
        self._content: bytes | None = content
        self._left = asyncio.Event()
        self._world = world
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": request.method,
            "scheme": request.url.scheme,
            "path": request.url.path,
            "raw_path": request.url.raw_path,
            "query_string": request.url.query,
            "headers": [(name.lower(), value) for name, value in request.headers.raw],
            "server": ("127.0.0.1", 9),
            "client": ("127.0.0.1", 1),
            "root_path": "",
            "extensions": {"break": self._break},
        }
        world.spawn(self._serve(scope))

    def leave(self) -> None:
        """Tell the server that the client has left."""
        self._left.set()

    async def _serve(self, scope: dict[str, Any]) -> None:
        try:
            await self._world.app(scope, self._receive, self._send)
        except Exception as error:  # noqa: BLE001 - the scenario ends with it
            self._world.broken.append(f"the emulator failed: {error!r}")
        self.ended.set()

    async def _receive(self) -> dict[str, Any]:
        if self._content is not None:
            content, self._content = self._content, None
            return {"type": "http.request", "body": content, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            if not self.answer.done():
                self.answer.set_result((message["status"], message["headers"]))
        else:
            self.pieces.append(message.get("body", b""))
            if not message.get("more_body"):
                self.ended.set()

    def _break(self, how: str) -> None:
        self.error = _BREAKS[how]
        if not self.answer.done():
            self.answer.set_exception(self.error)
            self.answer.exception()  # if the client has left
        self.ended.set()
        self._left.set()


class _Body(httpx.AsyncByteStream):
    def __init__(self, exchange: _Exchange) -> None:
        self._exchange = exchange

    async def __aiter__(self) -> AsyncIterator[bytes]:
        await self._exchange.ended.wait()
        for piece in self._exchange.pieces:
            yield piece
        if self._exchange.error is not None:
            raise self._exchange.error

    async def aclose(self) -> None:
        self._exchange.leave()
