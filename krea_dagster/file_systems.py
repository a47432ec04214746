"""Paths of this machine, and the file systems behind URLs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pyarrow import fs


def local_path(place: str) -> Path | None:
    """Return the absolute path of a file or folder of this machine, None for what may be a URL."""
    return None if ":" in place else Path(place).expanduser().absolute()


def file_system_of(url: str, **options: Any) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path in it. Raises what fsspec raises."""
    # Here, because it imports asyncio and ssl, which a project on a disk does not need.
    import fsspec.core

    return fsspec.core.url_to_fs(url, **options)  # type: ignore[no-any-return]  # has no types


def arrow_file_system_of(place: str) -> tuple[fs.FileSystem, str]:
    """Return the same for Arrow, also for a path of this machine."""
    if (path := local_path(place)) is not None:
        return fs.LocalFileSystem(), str(path)
    found, inner = file_system_of(place)
    return fs.PyFileSystem(fs.FSSpecHandler(found)), inner
