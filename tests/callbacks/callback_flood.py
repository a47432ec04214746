"""A flood of wrong callbacks of every kind, over real connections, to a real receiver.

``python -m tests.callbacks.callback_flood --calls 100000`` prints the results: the memory of
the receiver's process on the way, the answers, and the duration of a good call during the flood.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from krea_dagster.callbacks import CallbackUrls
from krea_dagster.engine.journal.callback_log import CallbackLog
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.schema import metadata
from krea_dagster.models import ImageRequest

SECRET = "f3a1" * 16
URLS = CallbackUrls("https://hooks.example.com", SECRET)
KEYS = [f"{number:064x}" for number in range(200)]
TASK_ID = "task-unified-1800000000-abcdefgh"

#: Each way to be wrong, and what is answered to it.
EXPECTED = {
    "forged": 204,
    "replayed": 204,
    "malformed": 204,
    "oversized": 413,
    "oversized without a length": 413,
    "wrong proof": 404,
    "wrong deployment": 404,
    "unknown request": 404,
    "not a path": 404,
}


def make_journal(folder: Path) -> Path:
    """Create a journal that knows ``KEYS``."""
    file = folder / "journal.db"
    journal = Journal(f"sqlite:///{file}")
    journal.plan(
        [
            (ImageRequest(key, "a fox", "1:1", "1K", 7, nsfw_check=False, attempt=0), "p")
            for key in KEYS
        ],
        run_id="run",
        at=datetime(2026, 5, 1, tzinfo=timezone.utc),
    )
    journal.close()
    return file


def state_of(file: Path) -> dict[str, list[tuple[object, ...]]]:
    """Return all tables of the journal except that of the calls."""
    journal = Journal(f"sqlite:///{file}")
    with contextlib.closing(journal), journal.database.read() as connection:
        return {
            name: sorted(map(tuple, connection.execute(table.select())), key=str)
            for name, table in metadata.tables.items()
            if name != "callbacks"
        }


@dataclass
class Running:
    """The receiver's process and its address."""

    process: psutil.Process
    url: str
    stderr: Path

    @property
    def rss_mib(self) -> float:
        return float(self.process.memory_info().rss) / 2**20


@contextlib.contextmanager
def serving(folder: Path, *options: str, port: int = 0) -> Iterator[Running]:
    """Run the command on a free port, or this one, on the journal in ``folder``."""
    serve = [sys.executable, "-m", "krea_dagster.callbacks", "serve", "--port", str(port)]
    command = [*serve, *options]
    environment = {**os.environ, "KREA_STORAGE": str(folder), "KREA_CALLBACK_SECRET": SECRET}
    errors = folder / "stderr.txt"
    with (
        errors.open("w") as stderr,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, env=environment, text=True
        ) as process,
    ):
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert url, errors.read_text()
            yield Running(psutil.Process(process.pid), url, errors)
        finally:
            process.terminate()
            process.wait(10)


@dataclass
class Outcome:
    """The results of a flood: ``rss_mib`` by the number of calls, ``good_ms`` of each good call."""

    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    rss_mib: dict[int, float] = field(default_factory=dict)
    good_ms: list[float] = field(default_factory=list)
    took_s: float = 0.0


def _wrong(kind: str, chance: random.Random) -> tuple[str, bytes, dict[str, str]]:
    """Return a path, a body and headers that are wrong in one way."""
    key = chance.choice(KEYS)
    path = urlsplit(URLS.url(key)).path
    said = {"id": TASK_ID, "status": "completed", "results": ["https://files.example.com/a.png"]}
    body = json.dumps(said).encode()
    if kind == "forged":
        lies: dict[str, Any] = {
            "id": f"task-unified-{chance.randrange(10**10):010d}-{chance.randrange(10**8):08d}",
            "status": chance.choice(["failed", "cancelled", "completed"]),
            "usage": {"credits_used": -1e9},
        }
        body = json.dumps(lies).encode()
    elif kind == "malformed":
        body = chance.choice([b"", b"{", b"\xff" * 100, b"[" * 5000, chance.randbytes(2000)])
    elif kind.startswith("oversized"):
        body = b"a" * (64 * 1024 + 1)
    elif kind == "wrong proof":
        path = path[:-32] + chance.randbytes(16).hex()
    elif kind == "wrong deployment":
        path = f"/{chance.randbytes(16).hex()}{path[33:]}"
    elif kind == "unknown request":
        path = urlsplit(URLS.url(chance.randbytes(32).hex())).path
    elif kind == "not a path":
        path = "/" + chance.randbytes(chance.randrange(1, 900)).hex()
    client = f"{chance.randrange(1, 223)}.{chance.randrange(256)}.{chance.randrange(256)}.1"
    headers = {"x-forwarded-for": client}
    if kind == "oversized without a length":
        headers["transfer-encoding"] = "chunked"
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    else:
        headers["content-length"] = str(len(body))
    if kind == "oversized":
        body = body[:100]  # it is refused by its declared length
    return path, body, headers


class _Connection:
    """One connection, reopened if the receiver has closed it."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = str(parts.hostname), int(parts.port or 0)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: bytes, headers: dict[str, str]) -> int:
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port)
        reader, writer = self._streams
        lines = [f"POST {path} HTTP/1.1", "host: hooks.example.com"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if b"connection: close" in head:
            self.close()
        return int(head.split()[1])

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
        self._streams = None


async def flood(
    running: Running,
    calls: int,
    *,
    lines: int = 16,
    look_every: int = 10_000,
    say: Callable[[str], object] = lambda _: None,
) -> Outcome:
    """Send wrong calls over some connections, and a good one with every hundredth."""
    outcome = Outcome()
    numbers = itertools.count(1)
    kinds = list(EXPECTED)
    began = time.perf_counter()

    async def sender(seed: int) -> None:
        chance = random.Random(seed)
        line = _Connection(running.url)
        for number in numbers:
            if number > calls:
                break
            kind = kinds[number % len(kinds)]
            outcome.answers[kind, await line.post(*_wrong(kind, chance))] += 1
            if number % 100 == 0:
                path = urlsplit(URLS.url(chance.choice(KEYS))).path
                sent = time.perf_counter()
                status = await line.post(path, b"", {"content-length": "0"})
                outcome.good_ms.append((time.perf_counter() - sent) * 1000)
                outcome.answers["good", status] += 1
            if number % look_every == 0:
                outcome.rss_mib[number] = running.rss_mib
                say(f"{number:7d} calls: {running.rss_mib:.1f} MiB")
        line.close()

    await asyncio.gather(*(sender(seed) for seed in range(lines)))
    outcome.took_s = time.perf_counter() - began
    return outcome


def main() -> None:
    """Flood a receiver and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=100_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="krea-flood-") as name:
        folder = Path(name)
        file = make_journal(folder)
        before = state_of(file)
        free = ("--rate", "1e9", "--burst", "1e9", "--trust-proxy", "127.0.0.1")
        with serving(folder, *free) as running:
            print(f"      0 calls: {running.rss_mib:.1f} MiB")
            outcome = asyncio.run(flood(running, options.calls, say=print))
        good = sorted(outcome.good_ms)
        print(f"{options.calls / outcome.took_s:,.0f} calls a second, {outcome.took_s:.1f} s")
        print(f"good calls: {good[len(good) // 2]:.1f} ms median, {good[-1]:.1f} ms at most")
        for (kind, status), number in sorted(outcome.answers.items()):
            print(f"  {kind:28} {status} {number:7d}")
        with contextlib.closing(CallbackLog.open(f"sqlite:///{file}")) as log:
            counted = sum(call.count for call in log.received(KEYS).values())
        print(f"hints counted: {counted}; stderr: {running.stderr.stat().st_size} bytes")
        print("everything else of the journal:", "same" if state_of(file) == before else "CHANGED")


if __name__ == "__main__":
    main()
