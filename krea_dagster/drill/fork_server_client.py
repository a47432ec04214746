"""Starts and kills worker processes, and tells how each ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import anyio
import anyio.abc

from krea_dagster.drill.job import Job

#: The fork server with the worker as it should be. Tests give one that is wrong on purpose.
COMMAND: Final = (sys.executable, "-m", "krea_dagster.drill.worker")

KILLED: Final = -int(signal.SIGKILL)


class Worker:
    """One worker process. ``status`` is an exit code, or the signal that ended it, negative."""

    def __init__(self, number: int, workers: Workers) -> None:
        self.number = number
        self._workers = workers
        self.started = anyio.Event()
        self.ended = anyio.Event()
        self.status: int | None = None

    async def kill(self) -> None:
        """SIGKILL, unless it has ended."""
        await self._workers.kill(self)

    async def wait(self) -> int:
        """Wait for its end; returns its status, 1 where the fork server is gone."""
        await self.ended.wait()
        return 1 if self.status is None else self.status


class Workers:
    """The fork server's client."""

    def __init__(self, process: anyio.abc.Process) -> None:
        self._process = process
        self._workers: dict[int, Worker] = {}
        self._gone = False
        self.ready = anyio.Event()  # it has imported what workers need, or is gone

    async def start(self, job: Job) -> Worker:
        """Start a worker; returns once it runs. Without a fork server it has failed at once."""
        worker = Worker(job.number, self)
        self._workers[job.number] = worker
        if self._gone:
            worker.started.set()
            worker.ended.set()
        await self._send({"start": job.to_json()})
        await worker.started.wait()
        return worker

    async def kill(self, worker: Worker) -> None:
        """SIGKILL, unless it has ended."""
        await self._send({"kill": worker.number})

    async def listen(self) -> None:
        """Hear what the fork server says, until it ends."""
        assert self._process.stdout is not None  # noqa: S101 - it was asked for
        rest = b""
        async for piece in self._process.stdout:
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                self._hear(json.loads(line))
        self._gone = True
        self.ready.set()
        for worker in self._workers.values():
            worker.started.set()
            worker.ended.set()

    def _hear(self, message: dict[str, int]) -> None:
        if "ready" in message:
            self.ready.set()
            return
        if "started" in message:
            self._workers[message["started"]].started.set()
            return
        worker = self._workers.pop(message["ended"])
        worker.status = message["status"]
        worker.ended.set()

    async def _send(self, message: object) -> None:
        assert self._process.stdin is not None  # noqa: S101 - it was asked for
        with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            await self._process.stdin.send(json.dumps(message).encode() + b"\n")


def _environment(folder: Path) -> dict[str, str]:
    """This process's, but no proxy is between the workers and the emulator, and no TLS.

    The certificates that nobody needs here cost more than most of what a worker does.
    """
    kept = {name: value for name, value in os.environ.items() if name != "SSL_CERT_FILE"}
    return {**kept, "NO_PROXY": "*", "no_proxy": "*", "SSL_CERT_DIR": str(folder)}


@asynccontextmanager
async def fork_server(folder: Path, command: Sequence[str] = COMMAND) -> AsyncIterator[Workers]:
    """Start the fork server; leaving kills its workers and ends it."""
    with (folder / "workers.log").open("ab") as log:
        process = await anyio.open_process(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=_environment(folder),
            start_new_session=True,  # Ctrl-C ends the drill, which then ends these
        )
    workers = Workers(process)
    async with process, anyio.create_task_group() as listening:
        listening.start_soon(workers.listen)
        try:
            yield workers
        finally:
            with anyio.CancelScope(shield=True):
                if process.stdin is not None:
                    await process.stdin.aclose()
                await process.wait()
