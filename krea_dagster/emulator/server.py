"""Run the emulator in a background thread."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import uvicorn
from starlette.types import Scope

from krea_dagster.emulator.app import EmulatorApp
from krea_dagster.emulator.callback_sender import TIMEOUT_S, CallbackSender
from krea_dagster.emulator.contract import UNITS_PER_CREDIT
from krea_dagster.emulator.world import LINK_LIFETIME_S, World

_STOP_WITHIN_S: Final = 0.05


class Emulator:
    """EvoLink's API on this machine, in a background thread, while the ``with`` block runs.

    .. code-block:: python

        with Emulator(latency_s=0.05, state=tmp_path) as emulator:
            client = httpx.Client(base_url=emulator.url)
            emulator.world.script("drop_after_create")
            ...
            assert emulator.stats()["creates"] == 1

    The settings that are not listed are those of ``World``.

    Args:
        api_key: the key of the account.
        credits: the credits of that account. An account that exists in ``state`` keeps its own.
        other_accounts: further keys with their credits.
        state: the folder of the state file; None for one that is deleted at the end.
        host: the address to listen on.
        port: the port to listen on; 0 takes a free one.
        faults: rates (0 to 1) by fault name; see ``World.script`` for faults that strike once.
        batch: whether ``POST /v1/tasks/batch`` exists.
        callbacks_to_private: whether a ``callback_url`` may have a private address.
        callback_ca: a file of certificates (PEM) that are trusted for receivers of callbacks, in
            addition to the machine's.
        callback_timeout_s: how long a receiver of callbacks may take.

    Raises:
        StateInUseError: another emulator uses ``state``.
        OSError: the port is taken, or ``callback_ca`` cannot be read.
    """

    def __init__(
        self,
        *,
        api_key: str = "emulator",
        credits: float = 1000.0,
        other_accounts: Mapping[str, float] | None = None,
        state: Path | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        clock: Callable[[], float] = time.time,
        seed: int = 0,
        latency_s: float = 1.0,
        latency_jitter: float = 0.3,
        faults: Mapping[str, float] | None = None,
        max_concurrent: int | None = None,
        rate: float | None = None,
        idempotency: bool = True,
        batch: bool = True,
        task_lifetime_s: float | None = None,
        link_lifetime_s: float = LINK_LIFETIME_S,
        denies_foreign_tasks: bool = True,
        callbacks_to_private: bool = False,
        callback_ca: Path | None = None,
        callback_timeout_s: float = TIMEOUT_S,
    ) -> None:
        with contextlib.ExitStack() as undo:
            if state is None:
                state = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="emulator-")))
            self.state = state
            self.world = World(
                state,
                clock=clock,
                seed=seed,
                latency_s=latency_s,
                latency_jitter=latency_jitter,
                max_concurrent=max_concurrent,
                rate=rate,
                idempotency=idempotency,
                task_lifetime_s=task_lifetime_s,
                link_lifetime_s=link_lifetime_s,
                denies_foreign_tasks=denies_foreign_tasks,
            )
            undo.callback(self.world.close)
            for key, granted in {**(other_accounts or {}), api_key: credits}.items():
                self.world.add_account(key, round(granted * UNITS_PER_CREDIT))
            for name, share in (faults or {}).items():
                self.world.set_rate(name, share)
            self._socket = undo.enter_context(_listen(host, port))
            self.host = host
            self.port: int = self._socket.getsockname()[1]
            self._caller = CallbackSender(
                self.world,
                self.url,
                to_private=callbacks_to_private,
                ca=callback_ca,
                timeout_s=callback_timeout_s,
            )
            self.app = EmulatorApp(
                self.world, batch=batch, callbacks_to_private=callbacks_to_private
            )
            undo.callback(self.app.close)
            self._exit = undo.pop_all()
        self._server = _ThreadServer(
            uvicorn.Config(
                self.app,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=75,
            )
        )
        self.app.break_connection = self._server.break_connection
        self._thread = threading.Thread(target=self._run, name="emulator", daemon=True)

    @property
    def url(self) -> str:
        """The API's root, without a slash at the end."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def stats(self, *, tasks: bool = True) -> dict[str, Any]:
        """Return counts of requests, tasks and callbacks and sums of credits so far.

        Args:
            tasks: whether to include the list of all tasks.

        Returns:
            The fields that ``openapi.yaml`` describes under ``Stats``.
        """
        return self.world.stats(tasks=tasks)

    def start(self) -> None:
        """Start the server. It accepts connections when this returns."""
        self._thread.start()
        self._server.ready.wait()
        if not self._server.started:
            raise RuntimeError("the emulator did not start; the traceback of its thread shows why")

    def stop(self) -> None:
        """Stop the server, cut the requests in progress, and close the state."""
        if self._thread.is_alive():
            self._server.stop()
            self._thread.join()
        self._exit.close()

    def __enter__(self) -> Emulator:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _run(self) -> None:
        loop = _new_event_loop()
        try:
            loop.run_until_complete(self._serve())
        finally:
            self._server.ready.set()
            loop.close()

    async def _serve(self) -> None:
        async with self._caller as caller:
            self.app.wake = caller.wake
            calling = asyncio.create_task(caller.run())
            try:
                await self._server.serve([self._socket])
            finally:
                caller.stop()
                await calling


class _ThreadServer(uvicorn.Server):
    """uvicorn's server in a thread: it stops at once and does not wait for clients."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._woken: asyncio.Event | None = None

    def stop(self) -> None:
        """Stop the server, from another thread."""
        if self._loop is not None and self._woken is not None:
            self._loop.call_soon_threadsafe(self._woken.set)

    def break_connection(self, scope: Scope, how: str) -> None:
        """Break the connection of a request: "close", "reset" or "garbage"."""
        for connection in self.server_state.connections:
            # uvicorn's HTTP/1.1 protocols have a client; their common type does not declare it.
            if getattr(connection, "client", None) == scope["client"]:
                _break(connection.transport, how)
                return

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept connections."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._woken = asyncio.Event()
        self.ready.set()

    async def main_loop(self) -> None:
        """Update the Date header of the responses until ``stop`` is called."""
        assert self._woken is not None  # noqa: S101 - startup has run
        while not self._woken.is_set():
            await self.on_tick(0)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._woken.wait(), 1.0)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close everything. Responses in progress get a moment, then their connections are cut."""
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=_STOP_WITHIN_S)
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks)


def _break(transport: asyncio.Transport, how: str) -> None:
    if how == "garbage":
        transport.write(b"\x00\x01\x02 this is not HTTP\r\n\r\n")
    if how == "reset":
        # A linger time of zero makes the system answer with RST instead of FIN.
        linger = struct.pack("ii", 1, 0)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        transport.abort()
    else:
        transport.close()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family)
    listener.setblocking(False)
    return listener


def _new_event_loop() -> asyncio.AbstractEventLoop:
    if importlib.util.find_spec("uvloop"):
        loop: asyncio.AbstractEventLoop = importlib.import_module("uvloop").new_event_loop()
        return loop
    return asyncio.new_event_loop()
