"""What all benchmarks share: a server and workers in processes of their own, and their report.

A benchmark is a module that is run as ``python -m benchmarks.NAME [--quick] [--json]``. It makes
a :class:`Report` and hands it to :func:`finish`, which prints a table, or with ``--json`` the
report as one JSON object, from which ``make bench`` writes ``docs/benchmarks.md``:

    def main() -> None:
        options = options_of("planning").parse_args()
        report = Report("planning", "A table of 1,000,000 rows", columns=["what", "s"])
        with Server.start("--latency", "0") as server:
            ran = run(["benchmarks.worker", "engine", "--url", server.url], core=WORKERS)
            report.add("engine", f"{ran.wall_s:.2f}")
            report.claim("engine within", ran.wall_s, 4.0, unit="s")
        finish(report, options)

Imports nothing large, because a process that is forked here counts this one's memory as its own.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import urllib.request
from argparse import ArgumentParser, Namespace
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, Final

ROOT: Final = Path(__file__).parent.parent

_CORES: Final = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
#: The server has the first core to itself, and whatever is measured the others.
SERVER: Final = frozenset(_CORES[:1])
WORKERS: Final = frozenset(_CORES[1:] or _CORES)
#: One core, for what is compared by its CPU.
ONE: Final = frozenset(_CORES[-1:])

_VERSIONS_OF: Final = ("dagster", "httpx", "aiohttp", "requests", "pillow", "pyarrow", "sqlalchemy")


# -- processes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """How a process ended. ``said`` is the JSON object of its last line on stdout.

    ``wall_s`` and ``cpu_s`` (user and system, of it and its children) begin with its start, so
    they count Python's imports; a worker says its own without them. ``peak_bytes`` is the
    largest resident memory.
    """

    wall_s: float
    cpu_s: float
    peak_bytes: int
    said: dict[str, Any]


class Started:
    """A process under way."""

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

    def wait(self) -> Ran:
        """Wait for its end. Raises RuntimeError, with its stderr, where that is not 0."""
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
        said = json.loads(last) if last.startswith("{") else {}
        return Ran(wall_s, used.ru_utime + used.ru_stime, used.ru_maxrss * _RSS_UNIT, said)

    def stop(self) -> None:
        """End it if it is still under way: for when another one failed."""
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
) -> Ran:
    """Run ``python -m command …`` to its end, on these cores. Raises RuntimeError."""
    return Started(command, core=core, environ=environ).wait()


def peak_bytes() -> int:
    """This process's largest resident memory so far, without what it was forked from."""
    try:
        status = Path("/proc/self/status").read_text()
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


class Server:
    """``benchmarks.server`` in a process of its own, on the first core."""

    def __init__(self, process: subprocess.Popen[bytes], url: str) -> None:
        self._process = process
        self.url = url

    @classmethod
    @contextmanager
    def start(cls, *options: object) -> Iterator[Server]:
        """Start it with the options of its command, and end it after the block."""
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

    def books(self, *, brief: bool = False) -> dict[str, Any]:
        """What was asked of it: see benchmarks.account.Account.report."""
        with urllib.request.urlopen(f"{self.url}/_books?brief={int(brief)}") as answer:
            books: dict[str, Any] = json.load(answer)
        return books

    def reset(self) -> None:
        """Empty its books and forget its tasks."""
        urllib.request.urlopen(f"{self.url}/_reset", data=b"").close()

    def cpu_s(self) -> float:
        """CPU seconds that it has used so far; 0 where the system does not tell."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except FileNotFoundError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _pin(pid: int, cores: Collection[int] | None) -> None:
    # Right after the start, before it has a second thread.
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(pid, cores)


def _plain_environment() -> dict[str, str]:
    """The environment without proxies, and without what a developer has set for this project."""
    unwanted = ("_PROXY", "KREA_", "EVOLINK_", "DAGSTER_")
    return {
        name: value
        for name, value in os.environ.items()
        if not name.upper().startswith(unwanted) and not name.upper().endswith("_PROXY")
    }


# -- reports --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """A figure that is to stay within a limit."""

    text: str
    value: float
    limit: float
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether it does."""
        return self.value <= self.limit

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        verdict = "met" if self.met else "NOT MET"
        return f"{self.text}: {self.value:.4g}{unit} (at most {self.limit:g}{unit}): {verdict}"


@dataclass
class Report:
    """What a benchmark found: a table, the claims that it holds up, and its conditions.

    ``setting`` says what was run, with n, server and machine load; ``notes`` what the reader
    must know to read the figures.
    """

    name: str
    title: str
    setting: str = ""
    columns: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    began_s: float = field(default_factory=time.monotonic)

    def add(self, *cells: object) -> None:
        """Add a row to the table."""
        self.rows.append([str(cell) for cell in cells])

    def claim(self, text: str, value: float, limit: float, unit: str = "") -> None:
        """Hold a figure against the most that it may be."""
        self.claims.append(Claim(text, value, limit, unit))

    def note(self, text: str) -> None:
        """Add what the reader must know."""
        self.notes.append(text)

    def as_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        values = {**asdict(self), "conditions": conditions()}
        del values["began_s"]
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Report:
        """The report that :meth:`as_json` wrote."""
        fields = {name: value for name, value in values.items() if name != "conditions"}
        return cls(**{**fields, "claims": [Claim(**claim) for claim in fields["claims"]]})


def options_of(name: str) -> ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("--quick", action="store_true", help="fewer images, and only once")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON")
    return parser


def finish(report: Report, options: Namespace) -> None:
    """Print the report: a table for people, or one JSON object."""
    report.seconds = round(time.monotonic() - report.began_s, 1)
    if options.as_json:
        print(json.dumps(report.as_json()))
    else:
        show(report)


def show(report: Report) -> None:
    """Print a report as a table."""
    from rich.console import Console  # noqa: PLC0415 - only here
    from rich.table import Table  # noqa: PLC0415 - only here

    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table(title=report.title, title_justify="left", caption_justify="left")
    for number, column in enumerate(report.columns):
        table.add_column(column, justify="right" if number else "left")
    for row in report.rows:
        table.add_row(*row)
    console.print(table)
    for line in (report.setting, *report.claims, *report.notes):
        console.print(str(line), markup=False, highlight=False)
    console.print(f"{conditions_text(conditions())} · {report.seconds:g} s in all\n", markup=False)


def note_progress(text: str) -> None:
    """Say on stderr what is being measured."""
    print(f"  {text}", file=sys.stderr, flush=True)


def conditions() -> dict[str, Any]:
    """The machine and the versions that a figure hangs on."""
    versions = {}
    for name in _VERSIONS_OF:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cpu": _cpu_name(),
        "cores": len(_CORES),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def conditions_text(found: dict[str, Any]) -> str:
    """The conditions in one line."""
    versions = ", ".join(f"{name} {text}" for name, text in found["versions"].items())
    return (
        f"{found['date']}, {found['cores']} cores of {found['cpu']}, {found['memory_gb']} GB, "
        f"{found['system']}, Python {found['python']}, {versions}"
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
