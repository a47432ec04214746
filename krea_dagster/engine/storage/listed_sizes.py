"""The sizes of many images of an object store, from pages of its listing."""

from __future__ import annotations

import threading
from pathlib import PurePosixPath
from typing import Final

from krea_dagster.engine.storage.lookups import digits_for, listing_of
from krea_dagster.engine.storage.storage import Storage

#: Pages that are kept: several threads ask, and are not in step.
_PAGES: Final = 4


class ListedSizes:
    """The sizes of images that are asked for in the order of their keys. Thread-safe.

    An object store is listed by the beginning of the keys, about a page at a time, and each page
    once. ``stored`` is about how many images it has. In a folder each file is looked up.
    """

    def __init__(self, storage: Storage, stored: int) -> None:
        self._storage = storage
        self._digits = digits_for(stored, by_prefix=storage.lists_by_prefix)
        self._pages: dict[str, dict[str, int]] = {}
        self._lock = threading.Lock()

    def size_bytes(self, name: str) -> int | None:
        """Return the size of a file, None where there is none. Raises StorageUnavailable."""
        key = PurePosixPath(name).stem
        if self._storage.folder is not None or not name.startswith(f"images/{key[:2]}/{key}"):
            return self._storage.size_bytes(name)
        with self._lock:
            return self._page(key[: self._digits]).get(name)

    def _page(self, beginning: str) -> dict[str, int]:
        if beginning not in self._pages:
            while len(self._pages) >= _PAGES:
                del self._pages[next(iter(self._pages))]
            self._pages[beginning] = dict(self._storage.listed(listing_of(beginning)))
        return self._pages[beginning]
