"""The client of a fork server: starts and kills worker processes, and tells how each ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Final

import anyio
import anyio.abc

from krea_dagster.drill.job import WorkerJob

#: The fork server with the right worker. Tests give commands of workers with defects.
COMMAND: Final = (sys.executable, "-m", "krea_dagster.drill.worker")

KILLED: Final = -int(signal.SIGKILL)


class WorkerProcess:
    """One worker process. ``status`` is an exit code, or the signal that ended it, negative."""

    def __init__(self, number: int, client: ForkServerClient) -> None:
        self.number = number
        self._client = client
        self.started = anyio.Event()
        self.ended = anyio.Event()
        self.status: int | None = None

    async def kill(self) -> None:
        """Send SIGKILL, unless it has ended."""
        await self._client.send({"kill": self.number})

    async def wait(self) -> int:
        """Wait for its end; return its status, or 1 if the fork server is gone."""
        await self.ended.wait()
        return 1 if self.status is None else self.status


class ForkServerClient:
    """The client of one fork server."""

    def __init__(self, process: anyio.abc.Process) -> None:
        self._process = process
        self._workers: dict[int, WorkerProcess] = {}
        self._gone = False
        self.ready = anyio.Event()  # the fork server has imported what workers need, or is gone

    async def start(self, job: WorkerJob) -> WorkerProcess:
        """Start a worker and wait until it runs. Without a fork server it has failed at once."""
        worker = WorkerProcess(job.number, self)
        self._workers[job.number] = worker
        if self._gone:
            worker.started.set()
            worker.ended.set()
        await self.send({"start": asdict(job)})
        await worker.started.wait()
        return worker

    async def listen(self) -> None:
        """Read the fork server's messages until it ends."""
        assert self._process.stdout is not None  # noqa: S101 - it was requested
        rest = b""
        async for piece in self._process.stdout:
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                self._handle(json.loads(line))
        self._gone = True
        self.ready.set()
        for worker in self._workers.values():
            worker.started.set()
            worker.ended.set()

    def _handle(self, message: dict[str, int]) -> None:
        if "ready" in message:
            self.ready.set()
            return
        if "started" in message:
            self._workers[message["started"]].started.set()
            return
        worker = self._workers.pop(message["ended"])
        worker.status = message["status"]
        worker.ended.set()

    async def send(self, message: object) -> None:
        """Send a message; without effect if the fork server is gone."""
        assert self._process.stdin is not None  # noqa: S101 - it was requested
        with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            await self._process.stdin.send(json.dumps(message).encode() + b"\n")


def _environment(folder: Path) -> dict[str, str]:
    """Return this process's environment, without a proxy and without TLS certificates.

    Loading certificates, which the drill does not need, takes longer than most of a worker's work.
    """
    kept = {name: value for name, value in os.environ.items() if name != "SSL_CERT_FILE"}
    return {**kept, "NO_PROXY": "*", "no_proxy": "*", "SSL_CERT_DIR": str(folder)}


@asynccontextmanager
async def fork_server(
    folder: Path, command: Sequence[str] = COMMAND
) -> AsyncIterator[ForkServerClient]:
    """Start a fork server; on leaving, it kills its workers and ends."""
    with (folder / "workers.log").open("ab") as log:
        process = await anyio.open_process(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=_environment(folder),
            start_new_session=True,  # Ctrl-C ends the drill, which then ends these
        )
    client = ForkServerClient(process)
    async with process, anyio.create_task_group() as listening:
        listening.start_soon(client.listen)
        try:
            yield client
        finally:
            with anyio.CancelScope(shield=True):
                if process.stdin is not None:
                    await process.stdin.aclose()
                await process.wait()
