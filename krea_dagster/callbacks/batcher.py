"""Group commit for callbacks: those that arrive during a commit are written by the next one.

A durable commit costs an fsync. With one for each call, the calls of a burst would wait for one
another; with one for all calls that arrived during it, the last of a thousand waits for a few.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from typing import Final

import anyio.to_thread

#: (request key, task id that the call claims or None).
CallbackClaim = tuple[str, "str | None"]

#: Records calls durably and returns the keys whose request is known. Blocks.
RecordCallbacks = Callable[[Sequence[CallbackClaim]], Collection[str]]

#: Calls per commit: enough to make the fsync cheap, few enough for a short wait.
MAX_BATCH: Final = 512


class CallbackBatcher:
    """Passes calls to ``record`` in batches, in a thread, one at a time. For one event loop."""

    def __init__(self, record: RecordCallbacks) -> None:
        self._record = record
        self._waiting: list[tuple[CallbackClaim, asyncio.Future[bool]]] = []
        self._writer: asyncio.Task[None] | None = None

    async def add(self, claim: CallbackClaim) -> bool:
        """Record one call durably, and return whether its request is known.

        If the caller is cancelled, the call is still recorded. Raises what ``record`` raised.
        """
        known: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append((claim, known))
        if self._writer is None:
            self._writer = asyncio.create_task(self._write())
        return await known

    async def _write(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
                await self._write_batch(batch)
        finally:
            self._writer = None

    async def _write_batch(
        self, batch: Sequence[tuple[CallbackClaim, asyncio.Future[bool]]]
    ) -> None:
        try:
            keys = await anyio.to_thread.run_sync(self._record, [claim for claim, _ in batch])
        except Exception as error:  # noqa: BLE001 - passed on to the callers
            for _, known in batch:
                if not known.done():
                    known.set_exception(error)
            return
        for (request_key, _), known in batch:
            if not known.done():
                known.set_result(request_key in keys)
