"""The drill's emulator: a separate process whose state outlives it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.to_thread
import httpx

from krea_dagster import file_locks
from krea_dagster.drill.job import API_KEY, OTHER_API_KEY
from krea_dagster.errors import KreaError

_CREDITS: Final = 10_000_000


class EmulatorServer:
    """A running emulator. ``url`` is its root."""

    def __init__(self, url: str, http: httpx.AsyncClient) -> None:
        self.url = url
        self._http = http

    async def stats(self) -> dict[str, Any]:
        """Return the server's records of what was requested, created, charged and fetched."""
        response = await self._http.get("/emulator/books")
        return dict(response.raise_for_status().json())

    async def posts(self) -> int:
        """Return how many purchases were requested."""
        response = await self._http.get("/emulator/books", params={"tasks": "0"})
        return int(response.raise_for_status().json()["submit_posts"])

    async def script(self, fault: str, times: int, arg: float | None = None) -> None:
        """Have a fault strike the next requests of its kind; ``arg`` refines it."""
        await self._set_faults({"script": [{"name": fault, "n": times, "arg": arg}]})

    async def all_struck(self) -> bool:
        """Return whether every scripted fault has struck as often as scripted."""
        response = await self._http.get("/emulator/faults")
        return not response.raise_for_status().json()["unconsumed"]

    async def reset_faults(self, rates: Mapping[str, float]) -> None:
        """Forget the scripted faults that have not struck, and set these rates."""
        await self._set_faults({"clear": True, "rates": dict(rates)})

    async def _set_faults(self, faults: dict[str, Any]) -> None:
        (await self._http.post("/emulator/faults", json=faults)).raise_for_status()


@asynccontextmanager
async def run_emulator(
    folder: Path,
    *,
    honours_key: bool,
    latency_s: float,
    seed: int,
    rates: Mapping[str, float],
) -> AsyncIterator[EmulatorServer]:
    """Run an emulator on a free port. It ends with the drill, also if the drill is killed.

    ``rates`` are faults by name, from 0 to 1.
    """
    in_use = folder / "in_use.lock"
    with in_use.open("a") as lock, (folder / "emulator.log").open("ab") as log:
        file_locks.lock(lock, shared=True)
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
            start_new_session=True,  # Ctrl-C ends the drill, which then ends this
        )
        async with process:
            url = await _first_line(process)
            try:
                async with httpx.AsyncClient(base_url=url, timeout=60.0, trust_env=False) as http:
                    yield EmulatorServer(url, http)
            finally:
                with anyio.CancelScope(shield=True):
                    process.terminate()
                    await process.wait()


async def _first_line(process: anyio.abc.Process) -> str:
    """Read the line with its address. Raises KreaError if it ended before."""
    output = b""
    if process.stdout is not None:
        async for piece in process.stdout:
            output += piece
            if b"\n" in output:
                return output.split(b"\n")[0].decode().strip()
    raise KreaError("the drill's emulator did not start; see emulator.log")
