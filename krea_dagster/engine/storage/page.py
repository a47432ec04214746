"""Write a page that a user asked for, outside the storage root."""

from __future__ import annotations

import os
from pathlib import Path

from krea_dagster.errors import StorageError


def write_page(path: Path, page: bytes, what: str) -> None:
    """Write a page atomically. Raises StorageError, which calls it ``what``."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(page)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{what} cannot be written to {path}: {error}") from error
