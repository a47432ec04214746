"""Run the emulator in the foreground, until a signal or until its users have gone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Final

from krea_dagster.emulator.server import Emulator

#: How often ``serve`` checks the users' lock, and how long it must be free.
UNLOCKED_LOOK_S: Final = 0.5
UNLOCKED_FOR_S: Final = 2.0


def serve(
    emulator: Emulator,
    *,
    until_unlocked: Path | None = None,
    ready_file: Path | None = None,
    on_ready: Callable[[Emulator], None] = lambda _: None,
) -> None:
    """Run an emulator until SIGINT or SIGTERM. Call it in the main thread.

    With ``until_unlocked`` it also ends once that file has been without a ``flock`` for two
    seconds. A process that uses the emulator takes a shared lock before the start and keeps it.
    A lock ends with its process, so the emulator does not outlive its users. ``ready_file`` gets
    ``{"url", "port", "pid"}`` as JSON, atomically, once connections are accepted; a file of that
    name from an earlier run is removed first.
    """
    stop = threading.Event()
    if ready_file is not None:
        ready_file.unlink(missing_ok=True)
    with _signals(stop), emulator:
        if ready_file is not None:
            _write_ready(ready_file, emulator)
        on_ready(emulator)
        unlocked_since: float | None = None
        while not stop.wait(UNLOCKED_LOOK_S):
            if until_unlocked is None:
                continue
            if _is_locked(until_unlocked):
                unlocked_since = None
            elif unlocked_since is None:
                unlocked_since = time.monotonic()
            elif time.monotonic() - unlocked_since >= UNLOCKED_FOR_S:
                return


@contextlib.contextmanager
def _signals(stop: threading.Event) -> Iterator[None]:
    def handle(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    wanted = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, handle) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write_ready(path: Path, emulator: Emulator) -> None:
    ready = {"url": emulator.url, "port": emulator.port, "pid": os.getpid()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(ready), encoding="utf-8")
    temporary.replace(path)


def _is_locked(path: Path) -> bool:
    """Return whether a process holds a lock on a file. A missing file is not locked."""
    import fcntl  # noqa: PLC0415 - not there on Windows, where only this option is missing

    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False
