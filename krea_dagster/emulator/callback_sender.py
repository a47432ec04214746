"""Send callbacks: POST each ended task to the ``callback_url`` of its create call.

As EvoLink documents it: the body of the task query, over HTTPS, with 10 s to respond, and three
retries after 1, 2 and 4 s on anything but 2xx. The queue is in the world's state file, so a
restart loses none of it.

When a callback is due follows the world's clock. How long one takes is real time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol

from krea_dagster.emulator.callback_queue import QueuedCallback
from krea_dagster.emulator.model import EmulatedTask
from krea_dagster.emulator.payloads import task_body
from krea_dagster.emulator.world import World

TIMEOUT_S: Final = 10.0
#: Callbacks in progress at a time: a slow receiver delays callbacks, never the API.
MAX_CALLS: Final = 64
#: How often the clock is read while a callback is waiting: a test may move it.
LOOK_S: Final = 0.05

_SHORTEST_WAIT_S: Final = 0.001


class PostsCallbacks(Protocol):
    """Makes the HTTP requests."""

    async def post(self, url: str, body: bytes) -> int:
        """Return the status of the response, 0 if there was none."""


class CallbackSender:
    """Sends the callbacks of a world. An async context manager, for one event loop.

    ``base_url`` is the emulator's own address, for the links. ``to_private`` allows receivers at
    private addresses; ``ca`` is a file of certificates (PEM) that are trusted in addition to the
    machine's. ``poster`` replaces the HTTP client, and ``look_s`` is how often the clock is read.
    Raises OSError if ``ca`` cannot be read or contains no certificate.
    """

    def __init__(
        self,
        world: World,
        base_url: str,
        *,
        to_private: bool = False,
        ca: Path | None = None,
        timeout_s: float = TIMEOUT_S,
        poster: PostsCallbacks | None = None,
        look_s: float = LOOK_S,
    ) -> None:
        self._world = world
        self._base_url = base_url
        self._to_private = to_private
        self._ca = ca
        self._timeout_s = timeout_s
        self._poster = poster
        self._look_s = look_s
        self._in_progress: dict[int, asyncio.Task[None]] = {}
        self._woken = asyncio.Event()
        self._stopped = False
        if ca is not None:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(ca)

    async def __aenter__(self) -> CallbackSender:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Cut the callbacks in progress: the next emulator on this state sends them again."""
        in_progress = list(self._in_progress.values())
        for call in in_progress:
            call.cancel()
        await asyncio.gather(*in_progress, return_exceptions=True)
        await asyncio.sleep(0)  # connections that were cut in their handshake close now

    def wake(self) -> None:
        """Read the queue at once. Call it in the event loop's thread."""
        self._woken.set()

    def stop(self) -> None:
        """End ``run``. Call it in the event loop's thread."""
        self._stopped = True
        self.wake()

    async def run(self) -> None:
        """Send each callback when it is due, until ``stop`` is called."""
        while not self._stopped:
            self._woken.clear()
            wait_s = self._start_due()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._woken.wait(), wait_s)

    def _start_due(self) -> float | None:
        """Start what is due. Return the seconds until the next one, None if there is none."""
        free = MAX_CALLS - len(self._in_progress)
        if free <= 0:
            return None  # the next that ends wakes the loop
        found = self._world.due_callbacks(MAX_CALLS + 1, without=self._in_progress.keys())
        now = self._world.now()
        for due in found:
            if due.due_at > now:
                return min(self._look_s, max(_SHORTEST_WAIT_S, due.due_at - now))
            if not free:
                return None
            free -= 1
            call = asyncio.create_task(self._call(due))
            self._in_progress[due.id] = call
            call.add_done_callback(partial(self._ended, due.id))
        return None

    def _ended(self, number: int, _call: asyncio.Task[None]) -> None:
        self._in_progress.pop(number, None)
        self.wake()

    async def _call(self, due: QueuedCallback) -> None:
        if self._poster is None:
            # Slow to import, and most emulators never send a callback.
            from krea_dagster.emulator.http_post import HttpPoster  # noqa: PLC0415 - see above

            self._poster = HttpPoster(
                self._ca, to_private=self._to_private, timeout_s=self._timeout_s
            )
        body = json.dumps(self._body(due), ensure_ascii=False).encode()
        self._world.callback_answered(due, await self._poster.post(due.url, body))

    def _body(self, due: QueuedCallback) -> Mapping[str, Any]:
        now, task = self._world.now(), self._world.task_of_callback(due)
        if due.forged == "early":
            body = task_body(task, now, [])
            return {**body, "status": "completed", "progress": 100, "results": [self._link(task)]}
        body = task_body(task, now, self._links(task, now))
        if due.forged == "status":
            return {**body, "status": "failed" if body["status"] == "completed" else "completed"}
        if due.forged == "task":
            return {**body, "id": self._world.unused_task_id()}
        return body

    def _links(self, task: EmulatedTask, now: float) -> list[str]:
        if task.status(now) != "completed" or task.fault("no_results"):
            return []
        link = task.fault("link")
        return [self._link(task) if link is None else link.arg]

    def _link(self, task: EmulatedTask) -> str:
        return self._base_url + self._world.link_path(task)
