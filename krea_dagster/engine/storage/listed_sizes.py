"""The sizes of many images of an object store, from pages of its listing."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from krea_dagster.digests import Digests
from krea_dagster.engine.storage.lookups import digits_for, listing_of, plan_lookups
from krea_dagster.engine.storage.storage import STORE_THREADS, Storage

#: Names and their sizes, as a store lists them.
Listing: TypeAlias = Sequence[tuple[str, int]]
_Places: TypeAlias = npt.NDArray[np.int64]

#: The name of an image: its request key is in it twice.
_IMAGE_NAME: Final = re.compile(r"images/([0-9a-f]{2})/(\1[0-9a-f]{62})\.\w+")

#: Questions about single files that a thread asks one after the other.
_QUESTIONS: Final = 8

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


def look_up(
    storage: Storage,
    wanted: Digests,
    stored: int,
    *,
    ask: Callable[[_Places], None],
    take: Callable[[Listing, _Places], None],
) -> None:
    """Look up images in an object store, as ``plan_lookups`` plans it, in parallel.

    One beginning of keys is in memory at a time for each thread.

    Args:
        storage: The object store.
        wanted: The keys.
        stored: About how many images the store has.
        ask: Asks for the images at these places of ``wanted``, one by one.
        take: Takes a listing, and the places of the images that it was made for.
    """

    def list_beginning(beginning: str, places: _Places) -> None:
        take(storage.listed(listing_of(beginning)), places)

    with ThreadPoolExecutor(STORE_THREADS) as pool:
        calls: list[Future[None]] = []
        for one in plan_lookups(wanted, stored, by_prefix=storage.lists_by_prefix):
            if one.beginning is not None:
                calls.append(pool.submit(list_beginning, one.beginning, one.places))
                continue
            starts = range(0, len(one.places), _QUESTIONS)
            calls += [pool.submit(ask, one.places[at : at + _QUESTIONS]) for at in starts]
        for call in calls:
            call.result()


def sizes_of_images(storage: Storage, names: Sequence[str], stored: int) -> list[int | None]:
    """Return the size of each file, None where there is none. Raises StorageUnavailable.

    ``stored`` is about how many images the root has; only an object store needs it.
    """
    if storage.folder is not None:
        return [storage.size_bytes(name) for name in names]
    sizes: list[int | None] = [None] * len(names)
    matches = [_IMAGE_NAME.fullmatch(name) for name in names]
    own = np.array([place for place, match in enumerate(matches) if match], np.int64)
    others = [place for place, match in enumerate(matches) if not match]
    for place, size in zip(others, storage.sizes_bytes([names[at] for at in others]), strict=True):
        sizes[place] = size

    def ask(places: _Places) -> None:
        for place in own[places].tolist():
            sizes[place] = storage.size_bytes(names[place])

    def take(listed: Listing, places: _Places) -> None:
        found = dict(listed)
        for place in own[places].tolist():
            sizes[place] = found.get(names[place])

    keys = bytes.fromhex("".join(match[2] for match in matches if match))
    wanted = np.frombuffer(keys, np.uint8).reshape(-1, 32)
    look_up(storage, wanted, max(stored, len(own)), ask=ask, take=take)
    return sizes
