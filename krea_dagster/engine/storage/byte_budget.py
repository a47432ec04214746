"""A limit on the bytes that concurrent work holds in memory."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


class ByteBudget:
    """A semaphore that counts bytes, first come, first served. For one event loop at a time.

    Work that is larger than the whole budget is admitted when nothing else is.
    """

    def __init__(self, total_bytes: int) -> None:
        self._total = total_bytes
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self.used_bytes = 0

    @asynccontextmanager
    async def take(self, size_bytes: int) -> AsyncIterator[None]:
        """Hold this number of bytes for the length of the block, once there is room."""
        await self._enter(size_bytes)
        try:
            yield
        finally:
            self._leave(size_bytes)

    async def _enter(self, size_bytes: int) -> None:
        if not self._waiting and self._fits(size_bytes):
            self.used_bytes += size_bytes
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size_bytes, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave(size_bytes)  # its turn had come, and passes to the next
            else:
                with suppress(ValueError):  # it was removed already
                    self._waiting.remove((size_bytes, turn))
                self._admit_next()
            raise

    def _leave(self, size_bytes: int) -> None:
        self.used_bytes -= size_bytes
        self._admit_next()

    def _admit_next(self) -> None:
        while self._waiting and self._fits(self._waiting[0][0]):
            size_bytes, turn = self._waiting.popleft()
            if not turn.done():
                self.used_bytes += size_bytes
                turn.set_result(None)

    def _fits(self, size_bytes: int) -> bool:
        return self.used_bytes == 0 or self.used_bytes + size_bytes <= self._total
