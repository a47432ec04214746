"""Starts an emulator process for runs without an API key; runs share it, and it ends after them.

Every user of an emulator holds a shared lock on a file in its folder. The emulator exits once the
lock is free: the kernel releases it when a process dies, also when it is killed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import httpx

from krea_dagster import file_locks
from krea_dagster.application.settings import EMULATOR_KEY
from krea_dagster.errors import ConfigError

_START_S: Final = 20.0

#: Emulators that this process started. They may outlive the run, so it does not wait for them.
_started: Final[list[subprocess.Popen[bytes]]] = []


@contextmanager
def local_emulator(folder: Path) -> Iterator[str]:
    """Yield the URL of the emulator whose state is in ``folder``; start it if none runs.

    Raises ConfigError if it cannot be started.
    """
    folder.mkdir(parents=True, exist_ok=True)
    in_use = folder / "in_use.lock"
    with in_use.open("a") as lock:
        file_locks.lock(lock, shared=True)
        with (folder / "start.lock").open("a") as starting:
            file_locks.lock(starting)
            url = _running(folder) or _start(folder, in_use)
        yield url


def _running(folder: Path) -> str | None:
    """Return the URL of the emulator that serves this folder, if it answers."""
    try:
        url = str(json.loads((folder / "ready.json").read_text())["url"])
        answer = httpx.get(f"{url}/emulator/health", timeout=2.0, trust_env=False)
    except (OSError, ValueError, KeyError, httpx.HTTPError):
        return None
    return url if answer.status_code == httpx.codes.OK else None


def _start(folder: Path, in_use: Path) -> str:
    ready = folder / "ready.json"
    # The port that was used before, so that earlier links stay valid.
    port = _last_port(ready)
    ready.unlink(missing_ok=True)
    for wanted in dict.fromkeys((port, 0)):
        with (folder / "emulator.log").open("ab") as log:
            process = subprocess.Popen(  # noqa: S603 - our own module, by this interpreter
                [
                    sys.executable,
                    "-m",
                    "krea_dagster.emulator",
                    f"--port={wanted}",
                    f"--state={folder / 'state'}",
                    f"--api-key={EMULATOR_KEY}",
                    "--credits=1000000",
                    f"--until-unlocked={in_use}",
                    f"--ready-file={ready}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the run, which still polls
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        _started.append(process)
        deadline_s = time.monotonic() + _START_S
        while time.monotonic() < deadline_s and process.poll() is None:
            if (url := _running(folder)) is not None:
                return url
            time.sleep(0.05)
        process.kill()
        process.wait()
    raise ConfigError(
        f"the emulator did not start; see {folder / 'emulator.log'}. "
        "Set EVOLINK_API_KEY to use EvoLink instead."
    )


def _last_port(ready: Path) -> int:
    try:
        return int(json.loads(ready.read_text())["port"])
    except (OSError, ValueError, KeyError):
        return 0
