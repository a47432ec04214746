"""Who holds a claim on requests, and whether that process is still alive."""

from __future__ import annotations

import os
import socket
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

#: Owners of this process whose runs have ended and could not say so in the journal.
_ended: Final[set[str]] = set()


@dataclass(frozen=True)
class Owner:
    """One run of one process. ``pid_started`` is in milliseconds since 1970.

    A process id alone is used again after a crash; together with its start it names one
    process. ``host`` tells machines and containers apart.
    """

    owner: str
    run_id: str
    host: str
    pid: int
    pid_started: int


def this_process(run_id: str) -> Owner:
    """An owner for a run in this process; each call is another owner."""
    return Owner(
        owner=uuid.uuid4().hex,
        run_id=run_id,
        host=_host(),
        pid=os.getpid(),
        pid_started=_started(psutil.Process()),
    )


def has_ended(owner: Owner) -> None:
    """Remember that an owner's run is over, where its claims could not be given up."""
    _ended.add(owner.owner)


def is_alive(owner: Owner, *, silent_s: float, limit_s: float) -> bool:
    """Whether an owner may still be at work.

    On its own machine the process table knows at once, so that a run after ``kill -9`` goes
    on without waiting. From elsewhere only its silence tells.
    """
    if owner.owner in _ended:
        return False
    if owner.host != _host():
        return silent_s <= limit_s
    try:
        process = psutil.Process(owner.pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False  # killed, and its parent has not noticed yet
        started = _started(process)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return silent_s <= limit_s
    # The start is derived from the clock, which may have been set a little since.
    return abs(started - owner.pid_started) < 2000


def _started(process: psutil.Process) -> int:
    return int(process.create_time() * 1000)


def _host() -> str:
    """The machine, and on Linux the process namespace: containers may share a host's name."""
    namespace = ""
    with suppress(OSError):
        namespace = str(Path("/proc/self/ns/pid").readlink())
    return f"{socket.gethostname()} {namespace}".strip()
