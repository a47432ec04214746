"""Locks on files, which the kernel releases when their process ends: not on Windows."""

from __future__ import annotations

from typing import IO, Final

from krea_dagster.errors import ConfigError

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

AVAILABLE: Final = fcntl is not None


def lock(file: int | IO[str], *, shared: bool = False, wait: bool = True) -> None:
    """Lock an open file or descriptor; several processes can have a shared lock.

    Raises:
        BlockingIOError: without ``wait``, if another process has the lock.
        OSError: if the file system, or this system, has no such locks.
    """
    if not AVAILABLE:
        raise OSError("this system has no locks that end with their process")
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)


def require() -> None:
    """Raise ConfigError before a purchase on a system without these locks."""
    if not AVAILABLE:
        raise ConfigError(
            "images can be bought on Linux and macOS only, where a lock of the kernel says which "
            "runs are alive; on Windows use WSL. Nothing was bought."
        )
