"""Temporary files that are being written, and the removal of abandoned ones.

Their names identify the process that writes them. Files of a killed process are removed by the next
process that writes here on the same machine. Files whose process is unknown are kept for a day.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import stat
import tempfile
import time
from contextlib import suppress
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Final

import psutil

from krea_dagster.errors import ConfigError

#: The folder under the storage root.
FOLDER: Final = ".partial"
#: A file of this age is abandoned: writing a file never takes that long.
_ABANDONED_S: Final = 24 * 3600.0

_NAME = re.compile(r"(?P<host>[0-9a-f]{12})-(?P<pid>\d+)-(?P<started>\d+)-\d+\.part")
_NUMBERS: Final = count()


def own_folder() -> Path:
    """Return this user's folder for temporary files of storage roots behind URLs.

    It is in the system's folder for such files, which TMPDIR names. Raises ConfigError if another
    user owns it.
    """
    folder = Path(tempfile.gettempdir()) / f"krea-dagster-{_user_id()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    about = folder.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != _user_id():
        raise ConfigError(
            f"{folder} does not belong to this user, or is not a folder; remove it, or name "
            "another folder for temporary files (TMPDIR)"
        )
    return folder


def _user_id() -> int:
    """Return this user's number; on Windows, where each user has such a folder, it is always 0."""
    return os.getuid() if hasattr(os, "getuid") else 0


def new_name() -> str:
    """Return a file name that is unique among processes and machines."""
    return f"{_prefix(os.getpid())}-{next(_NUMBERS)}.part"


def remove_abandoned(folder: Path) -> None:
    """Remove the files in a folder whose process has ended."""
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                if entry.is_file(follow_symlinks=False) and _is_abandoned(entry):
                    Path(entry.path).unlink()


def _is_abandoned(entry: os.DirEntry[str]) -> bool:
    named = _NAME.fullmatch(entry.name)
    if named is not None and named["host"] == _host():
        return not _is_alive(int(named["pid"]), int(named["started"]))
    return time.time() - entry.stat().st_mtime > _ABANDONED_S


def _is_alive(pid: int, started_s: int) -> bool:
    try:
        # The start time depends on the clock, which may have been adjusted since.
        return abs(psutil.Process(pid).create_time() - started_s) < 5.0
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


@lru_cache(maxsize=4)
def _prefix(pid: int) -> str:
    return f"{_host()}-{pid}-{int(psutil.Process(pid).create_time())}"


@lru_cache(maxsize=1)
def _host() -> str:
    """Return a hash of the machine and, on Linux, of the namespace of process ids."""
    namespace = ""
    with suppress(OSError):
        namespace = str(Path("/proc/self/ns/pid").readlink())
    return hashlib.sha256(f"{socket.gethostname()} {namespace}".encode()).hexdigest()[:12]
