"""The drill's emulator: a process of its own, whose state outlives it."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.to_thread
import httpx

from krea_dagster.drill.job import API_KEY, OTHER_API_KEY
from krea_dagster.errors import KreaError

_CREDITS: Final = 10_000_000


class Server:
    """A running emulator. ``url`` is its root."""

    def __init__(self, url: str, http: httpx.AsyncClient) -> None:
        self.url = url
        self._http = http

    async def books(self) -> dict[str, Any]:
        """What was asked, created, charged and fetched, from the server's own records."""
        answer = await self._http.get("/emulator/books")
        return dict(answer.raise_for_status().json())

    async def posts(self) -> int:
        """How many purchases were asked for, whatever the answers."""
        answer = await self._http.get("/emulator/books", params={"tasks": "0"})
        return int(answer.raise_for_status().json()["submit_posts"])

    async def script(self, fault: str, times: int, arg: float | None = None) -> None:
        """Have a fault strike the next requests of its kind; ``arg`` refines it."""
        wanted = {"script": [{"name": fault, "n": times, "arg": arg}]}
        (await self._http.post("/emulator/faults", json=wanted)).raise_for_status()

    async def has_struck(self) -> bool:
        """Whether every scripted fault has struck as often as it was to."""
        answer = await self._http.get("/emulator/faults")
        return not answer.raise_for_status().json()["unconsumed"]

    async def calm(self, rates: Mapping[str, float]) -> None:
        """Forget the scripted faults that have not struck, and set these rates anew."""
        wanted = {"clear": True, "rates": dict(rates)}
        (await self._http.post("/emulator/faults", json=wanted)).raise_for_status()


@asynccontextmanager
async def emulator(
    folder: Path,
    *,
    honours_key: bool,
    latency_s: float,
    seed: int,
    rates: Mapping[str, float],
) -> AsyncIterator[Server]:
    """Run an emulator on a free port. It ends with the drill, however that ends.

    ``rates`` are faults by name, from 0 to 1.
    """
    in_use = folder / "in_use.lock"
    with in_use.open("a") as lock, (folder / "emulator.log").open("ab") as log:
        fcntl.flock(lock, fcntl.LOCK_SH)
        process = await anyio.open_process(
            [
                sys.executable,
                "-m",
                "krea_dagster.emulator",
                "--port=0",
                f"--state={folder / 'emulator'}",
                f"--api-key={API_KEY}",
                f"--other-key={OTHER_API_KEY}",
                "--foreign-tasks=unknown",
                f"--credits={_CREDITS}",
                f"--latency-s={latency_s}",
                f"--seed={seed}",
                f"--until-unlocked={in_use}",
                "--idempotency" if honours_key else "--no-idempotency",
                *(f"--fault={name}={rate:f}" for name, rate in rates.items()),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,  # a Ctrl-C ends the drill, which then ends this
        )
        async with process:
            url = await _first_line(process)
            try:
                async with httpx.AsyncClient(base_url=url, timeout=60.0, trust_env=False) as http:
                    yield Server(url, http)
            finally:
                with anyio.CancelScope(shield=True):
                    process.terminate()
                    await process.wait()


async def _first_line(process: anyio.abc.Process) -> str:
    """The line in which it says its address. Raises KreaError where it ended before."""
    said = b""
    if process.stdout is not None:
        async for piece in process.stdout:
            said += piece
            if b"\n" in said:
                return said.split(b"\n")[0].decode().strip()
    raise KreaError("the drill's emulator did not start; emulator.log says why")
