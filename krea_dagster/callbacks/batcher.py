"""Group commit for calls: whatever has gathered while the last commit was under way is the next.

A durable commit costs an fsync. Paid for each call it would let a burst of them wait for one
another; paid once for all that came meanwhile, the last of a thousand waits for a few.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from typing import Final

import anyio.to_thread

#: (request key, task id that the call claims, or None): one call, or many alike.
CallbackClaim = tuple[str, "str | None"]

#: Remembers calls durably and returns the keys of those whose request is known. Blocks.
RecordCallbacks = Callable[[Sequence[CallbackClaim]], Collection[str]]

#: Calls of one commit: enough that the fsync vanishes, few enough that nobody waits long.
MOST: Final = 512


class CallbackBatcher:
    """Gives what gathers to ``remember``, in a thread, one batch at a time. In one event loop."""

    def __init__(self, remember: RecordCallbacks) -> None:
        self._remember = remember
        self._waiting: list[tuple[CallbackClaim, asyncio.Future[bool]]] = []
        self._writer: asyncio.Task[None] | None = None

    async def add(self, call: CallbackClaim) -> bool:
        """Remember one call; returns, once it is durable, whether its request is known.

        A caller that is cancelled leaves, and the call is remembered all the same. Raises what
        ``remember`` raised.
        """
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append((call, answer))
        if self._writer is None:
            self._writer = asyncio.create_task(self._write())
        return await answer

    async def _write(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[:MOST], self._waiting[MOST:]
                await self._write_batch(batch)
        finally:
            self._writer = None

    async def _write_batch(
        self, batch: Sequence[tuple[CallbackClaim, asyncio.Future[bool]]]
    ) -> None:
        try:
            known = await anyio.to_thread.run_sync(self._remember, [call for call, _ in batch])
        except Exception as error:  # noqa: BLE001 - whoever waits gets it, whatever it is
            for _, answer in batch:
                if not answer.done():
                    answer.set_exception(error)
            return
        for (request_key, _), answer in batch:
            if not answer.done():
                answer.set_result(request_key in known)
