"""Call back: POST a task that has ended to the address that its order named.

As EvoLink documents it: the body of the task query, over HTTPS, with 10 s to answer, and three
more tries after 1, 2 and 4 s on anything but 2xx. What is to be called is in the world's state,
so that a restart forgets none of it; what was called is in its books.

When a call is due follows the world's clock. How long one takes is real time.
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
from krea_dagster.emulator.payloads import task_body
from krea_dagster.emulator.world import EmulatedTask, World

TIMEOUT_S: Final = 10.0
#: Calls under way at a time: a slow receiver holds back the calls, never the API.
MAX_CALLS: Final = 64
#: How often the clock is looked at while a call is still to be made: a test may move it.
LOOK_S: Final = 0.05

_SHORTEST_WAIT_S: Final = 0.001


class PostsCallbacks(Protocol):
    """Makes one call."""

    async def post(self, url: str, body: bytes) -> int:
        """Return the status of the answer, 0 where there was none."""

    async def close(self) -> None:
        """Close the connections."""


class CallbackSender:
    """Makes the calls of a world. An async context manager, for one event loop.

    ``base_url`` is the emulator's own address, for the links. ``to_private`` allows receivers at
    private addresses; ``ca`` is a file of certificates (PEM) that are trusted besides the
    machine's. ``poster`` makes the calls in another way, and ``look_s`` is how often the clock is
    looked at. Raises OSError where ``ca`` cannot be read, or holds none.
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
        self._under_way: dict[int, asyncio.Task[None]] = {}
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
        """Cut the calls that are under way: the next emulator on this state makes them again."""
        under_way = list(self._under_way.values())
        for call in under_way:
            call.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        if self._poster is not None:
            await self._poster.close()

    def wake(self) -> None:
        """Look at once for what is to be called. From the event loop's own thread."""
        self._woken.set()

    def stop(self) -> None:
        """End ``run``. From the event loop's own thread."""
        self._stopped = True
        self.wake()

    async def run(self) -> None:
        """Make each call when it is due, until it is told to stop."""
        while not self._stopped:
            self._woken.clear()
            wait_s = self._start_due()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._woken.wait(), wait_s)

    async def call_due(self) -> int:
        """Make the calls that are due now, and wait for their answers; return how many."""
        self._start_due()
        calls = list(self._under_way.values())
        await asyncio.gather(*calls)
        return len(calls)

    def _start_due(self) -> float | None:
        """Start what is due; return how long to wait for the next, None where there is none."""
        free = MAX_CALLS - len(self._under_way)
        if free <= 0:
            return None  # the next that ends wakes the loop
        found = self._world.due_calls(MAX_CALLS + 1, without=self._under_way.keys())
        now = self._world.now()
        for due in found:
            if due.due_at > now:
                return min(self._look_s, max(_SHORTEST_WAIT_S, due.due_at - now))
            if not free:
                return None
            free -= 1
            call = asyncio.create_task(self._call(due))
            self._under_way[due.id] = call
            call.add_done_callback(partial(self._ended, due.id))
        return None

    def _ended(self, number: int, _call: asyncio.Task[None]) -> None:
        self._under_way.pop(number, None)
        self.wake()

    async def _call(self, due: QueuedCallback) -> None:
        if self._poster is None:
            # Takes a while, and most emulators are never asked to call anybody.
            from krea_dagster.emulator.http_post import HttpPoster  # noqa: PLC0415 - see above

            self._poster = HttpPoster(
                self._ca,
                to_private=self._to_private,
                most=MAX_CALLS,
                timeout_s=self._timeout_s,
            )
        body = json.dumps(self._body(due), ensure_ascii=False).encode()
        self._world.called(due, await self._poster.post(due.url, body))

    def _body(self, due: QueuedCallback) -> Mapping[str, Any]:
        now, task = self._world.now(), self._world.task_called_about(due)
        if due.forged == "early":
            answer = task_body(task, now, [])
            return {**answer, "status": "completed", "progress": 100, "results": [self._link(task)]}
        answer = task_body(task, now, self._links(task, now))
        if due.forged == "status":
            claimed = "failed" if answer["status"] == "completed" else "completed"
            return {**answer, "status": claimed}
        if due.forged == "task":
            return {**answer, "id": self._world.unused_task_id()}
        return answer

    def _links(self, task: EmulatedTask, now: float) -> list[str]:
        if task.status(now) != "completed" or task.fault("no_results"):
            return []
        link = task.fault("link")
        return [self._link(task) if link is None else link.arg]

    def _link(self, task: EmulatedTask) -> str:
        return self._base_url + self._world.link_path(task)
