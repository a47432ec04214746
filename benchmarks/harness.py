"""The processes of a benchmark: the server and the clients, each on its own core, and their cost.

Imports nothing large: a process that is forked here counts this process's memory as its own.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

ROOT: Final = Path(__file__).parent.parent

_CORES: Final = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
#: The server has the first core, and what is measured has the others.
SERVER: Final = frozenset(_CORES[:1])
WORKERS: Final = frozenset(_CORES[1:] or _CORES)


@dataclass(frozen=True)
class EndedProcess:
    """A process that has ended. ``output`` is the JSON object of its last line on stdout.

    ``wall_s`` and ``cpu_s`` (user and system, with its children) begin with its start and count
    Python's imports; the figures in a worker's ``output`` do not. ``peak_bytes`` is the largest
    resident memory.
    """

    wall_s: float
    cpu_s: float
    peak_bytes: int
    output: dict[str, Any]


class RunningProcess:
    """A process that runs ``python -m command``."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        core: Collection[int] | None = None,
        environ: dict[str, str] | None = None,
    ) -> None:
        self._command = command
        self._out: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by wait
        self._err: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by wait
        self.started_s = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env={**_plain_environment(), **(environ or {})},
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._err,
        )
        _pin(self._process.pid, core)

    def wait(self) -> EndedProcess:
        """Wait for its end. Raises RuntimeError with its stderr if it fails."""
        _, status, used = os.wait4(self._process.pid, 0)
        wall_s = time.monotonic() - self.started_s
        self._process.returncode = os.waitstatus_to_exitcode(status)
        with self._out, self._err:
            self._out.seek(0)
            self._err.seek(0)
            out, err = self._out.read().decode(), self._err.read().decode()
        if self._process.returncode:
            raise RuntimeError(
                f"{' '.join(self._command)} ended with {self._process.returncode}:\n{err[-4000:]}"
            )
        last = out.strip().rpartition("\n")[2]
        output = json.loads(last) if last.startswith("{") else {}
        cpu_s = used.ru_utime + used.ru_stime
        return EndedProcess(wall_s, cpu_s, used.ru_maxrss * _RSS_UNIT, output)

    def stop(self) -> None:
        """Kill it if it still runs, because another process failed."""
        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()
            self._out.close()
            self._err.close()


_RSS_UNIT: Final = 1 if sys.platform == "darwin" else 1024


def run(
    command: Sequence[str],
    *,
    core: Collection[int] | None = None,
    environ: dict[str, str] | None = None,
) -> EndedProcess:
    """Run ``python -m command`` to its end, on these cores. Raises RuntimeError if it fails."""
    return RunningProcess(command, core=core, environ=environ).wait()


def peak_bytes() -> int:
    """Return this process's largest resident memory so far, without its parent's."""
    try:
        status = Path("/proc/self/status").read_text()
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


class BenchmarkServer:
    """``benchmarks.server`` in a separate process, on the first core."""

    def __init__(self, process: subprocess.Popen[bytes], url: str) -> None:
        self._process = process
        self.url = url

    @classmethod
    @contextmanager
    def start(cls, *options: object) -> Iterator[BenchmarkServer]:
        """Start it with options of its command; end it after the block."""
        command = [sys.executable, "-m", "benchmarks.server", *(str(option) for option in options)]
        process = subprocess.Popen(
            command, cwd=ROOT, env=_plain_environment(), stdout=subprocess.PIPE
        )
        _pin(process.pid, SERVER)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"{' '.join(command)} did not start")
            yield cls(process, json.loads(line)["url"])
        finally:
            process.terminate()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()

    def stats(self, *, brief: bool = False) -> dict[str, Any]:
        """Return the record of its calls: see benchmarks.account.Account.stats."""
        with urllib.request.urlopen(f"{self.url}/_stats?brief={int(brief)}") as response:
            stats: dict[str, Any] = json.load(response)
        return stats


def _pin(pid: int, cores: Collection[int] | None) -> None:
    # Just after the start, before it has a second thread.
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(pid, cores)


def _plain_environment() -> dict[str, str]:
    """Return the environment without proxies and without settings of this project."""
    unwanted = ("_PROXY", "KREA_", "EVOLINK_", "DAGSTER_")
    return {
        name: value
        for name, value in os.environ.items()
        if not name.upper().startswith(unwanted) and not name.upper().endswith("_PROXY")
    }


def note_progress(text: str) -> None:
    """Print on stderr what is being measured."""
    print(f"  {text}", file=sys.stderr, flush=True)
