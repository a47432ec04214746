"""Blocking calls in threads. Passed in, so that a simulation has none."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, Protocol, TypeVar

_T = TypeVar("_T")


class InThread(Protocol):
    """Makes a call in a thread, and returns its result."""

    async def __call__(self, call: Callable[..., _T], /, *arguments: Any) -> _T:
        """Make the call. A cancellation is raised once the call has ended."""


class Threads:
    """A pool with a bounded number of threads, made when it is first used."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._pool: ThreadPoolExecutor | None = None
        self._pool_of = 0

    async def __call__(self, call: Callable[..., _T], /, *arguments: Any) -> _T:
        """Make the call. A cancellation is raised once the call has ended.

        So no claim or lock is released while a thread still uses it.
        """
        if self._pool is None or self._pool_of != os.getpid():
            # A child inherits the pool of its parent without the threads in it.
            self._pool = ThreadPoolExecutor(self._most, "krea")
            self._pool_of = os.getpid()
        running = self._pool.submit(partial(call, *arguments))
        try:
            return await asyncio.wrap_future(running)
        except asyncio.CancelledError:
            ending = None if running.cancelled() else asyncio.wrap_future(running)
            while ending is not None and not ending.done():
                try:
                    await asyncio.wait([ending])
                except asyncio.CancelledError:  # again; the first one is raised below
                    continue
            if ending is not None and not ending.cancelled():
                ending.exception()  # marks it as retrieved: no caller is left
            raise


#: The threads that read and write the journal.
in_thread: Final = Threads(16)
