"""Re-read stored files in threads, streaming, a bounded number at a time."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from krea_dagster.engine.record import Record, StoredImage
from krea_dagster.engine.storage.listed_sizes import ListedSizes
from krea_dagster.engine.storage.storage import Storage

#: Bytes read at once.
_PIECE: Final = 1024 * 1024
#: Most files that are begun and not finished.
_WAITING: Final = 64


@dataclass(frozen=True)
class FileState:
    """The file of a stored image: no size where it is missing, no hash where it was not hashed.

    ``trouble`` is why it could not be read.
    """

    size_bytes: int | None = None
    sha256: str | None = None
    trouble: str | None = None


class FileChecker:
    """Reads files, and returns their states in the order in which they were given.

    The first ``hash_bytes`` bytes are hashed (None: all); of the other files only the size is read.
    Use it as a context manager.

    Args:
        storage: The storage root.
        hash_bytes: How many bytes to hash.
        stored: About how many images it has. The requests come in the order of their keys, so that
            an object store is listed page by page.
    """

    def __init__(self, storage: Storage, *, hash_bytes: int | None = None, stored: int = 0) -> None:
        self._storage = storage
        self._listed = ListedSizes(storage, stored)
        self._left = hash_bytes
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        self._waiting: deque[tuple[Record, StoredImage, Future[FileState]]] = deque()

    def __enter__(self) -> FileChecker:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def check(
        self, record: Record, image: StoredImage
    ) -> Iterator[tuple[Record, StoredImage, FileState]]:
        """Begin to read a file; yield finished ones while too many wait."""
        to_hash = self._left is None or self._left >= image.bytes
        if to_hash and self._left is not None:
            self._left -= image.bytes
        call = self._hash if to_hash else self._size
        self._waiting.append((record, image, self._pool.submit(call, image.path)))
        while len(self._waiting) > _WAITING:
            yield self._next()

    def rest(self) -> Iterator[tuple[Record, StoredImage, FileState]]:
        """Yield all that still wait."""
        while self._waiting:
            yield self._next()

    def _next(self) -> tuple[Record, StoredImage, FileState]:
        record, image, state = self._waiting.popleft()
        return record, image, state.result()

    def _size(self, name: str) -> FileState:
        try:
            return FileState(self._listed.size_bytes(name))
        except OSError as error:
            return FileState(trouble=str(error))

    def _hash(self, name: str) -> FileState:
        digest, size = hashlib.sha256(), 0
        try:
            with self._storage.open(name) as file:
                while piece := file.read(_PIECE):
                    digest.update(piece)
                    size += len(piece)
        except (FileNotFoundError, NotADirectoryError):
            return FileState()
        except OSError as error:
            return FileState(trouble=str(error))
        return FileState(size, digest.hexdigest())
