"""A look at journal and storage, taken in a thread while the prompt table is planned."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

from krea_dagster.engine.journal.bulk_reads import KnownRequests


class Look:
    """What ``read`` returns, for the first who takes it; a later one has to look again."""

    def __init__(self, read: Callable[[], KnownRequests | None]) -> None:
        pool = ThreadPoolExecutor(1)
        self._found = [pool.submit(read)]
        pool.shutdown(wait=False)

    def take(self) -> KnownRequests | None:
        """Return what was found; None if it was taken, or was not worth a look at all that is."""
        return self._found.pop().result() if self._found else None

    def close(self) -> None:
        """Wait for the end of the look, so that it reads nothing afterwards."""
        wait(self._found)
