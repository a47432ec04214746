"""The thumbnails of the grid: a bounded number is made at a time, and each once."""

from __future__ import annotations

import os
from functools import partial
from typing import Final

import anyio
import anyio.to_thread

from krea_dagster.curation.thumbnails import Thumbnails

#: Concurrent decoders. Each may take about 12 bytes per pixel.
DECODERS: Final = max(2, min(8, os.cpu_count() or 2))


class GridThumbnails:
    """The thumbnails of a storage root, for one event loop."""

    def __init__(self, thumbnails: Thumbnails) -> None:
        self._thumbnails = thumbnails
        self._limiter = anyio.CapacityLimiter(DECODERS)
        self._under_way: dict[str, anyio.Event] = {}

    async def get(self, sha256: str, name: str) -> bytes:
        """Return the thumbnail (JPEG) of the file ``name`` with this hash. Raises NoThumbnail."""
        while True:
            if (data := self._thumbnails.find(sha256)) is not None:
                return data
            other = self._under_way.get(sha256)
            if other is None:
                break
            await other.wait()
        done = self._under_way[sha256] = anyio.Event()
        try:
            made = partial(self._thumbnails.make, sha256, name)
            return await anyio.to_thread.run_sync(made, limiter=self._limiter)
        finally:
            del self._under_way[sha256]
            done.set()
