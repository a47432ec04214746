"""The report of a benchmark, in a terminal and in docs/benchmarks.md.

A benchmark is a module that is run as ``python -m benchmarks.NAME [--quick] [--json]``. It fills a
:class:`Report` and hands it to :func:`finish`:

    def main() -> None:
        options = options_of("planning").parse_args()
        report = Report("planning", "A table of 1,000,000 rows", columns=["what", "s"])
        ended = run(["benchmarks.worker", "engine", "--url", url], core=WORKERS)
        report.add("engine", f"{ended.wall_s:.2f}")
        report.claim("engine within", ended.wall_s, 4.0, unit="s")
        finish(report, options)
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

_VERSIONS_OF: Final = ("dagster", "httpx", "aiohttp", "requests", "pillow", "pyarrow", "sqlalchemy")


@dataclass(frozen=True)
class Claim:
    """A figure and the most that it may be."""

    text: str
    value: float
    limit: float
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether the figure is within the limit."""
        return self.value <= self.limit

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        verdict = "met" if self.met else "NOT MET"
        return f"{self.text}: {self.value:.4g}{unit} (at most {self.limit:g}{unit}): {verdict}"


@dataclass
class Report:
    """The result of a benchmark: a table, its claims, and its conditions.

    ``setting`` says what was run, with n, server and machine load. ``notes`` explain the figures.
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
        """Add a figure with the most that it may be."""
        self.claims.append(Claim(text, value, limit, unit))

    def note(self, text: str) -> None:
        """Add an explanation."""
        self.notes.append(text)

    def as_json(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        values = {**asdict(self), "conditions": conditions()}
        del values["began_s"]
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Report:
        """Return the report that :meth:`as_json` wrote."""
        fields = {name: value for name, value in values.items() if name != "conditions"}
        return cls(**{**fields, "claims": [Claim(**claim) for claim in fields["claims"]]})


def options_of(name: str) -> ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    parser = ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("--quick", action="store_true", help="fewer images, and only once")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON")
    return parser


def finish(report: Report, options: Namespace) -> None:
    """Print the report, as a table or as one JSON object."""
    report.seconds = round(time.monotonic() - report.began_s, 1)
    if options.as_json:
        print(json.dumps(report.as_json()))
    else:
        show(report)


def show(report: Report) -> None:
    """Print a report as a table."""
    from rich.console import Console
    from rich.table import Table

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


def conditions() -> dict[str, Any]:
    """Return the machine and the versions that the figures depend on."""
    versions = {}
    for name in _VERSIONS_OF:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cpu": _cpu_name(),
        "cores": _cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def conditions_text(found: dict[str, Any]) -> str:
    """Return the conditions in one line."""
    versions = ", ".join(f"{name} {text}" for name, text in found["versions"].items())
    return (
        f"{found['date']}, {found['cores']} cores of {found['cpu']}, {found['memory_gb']} GB, "
        f"{found['system']}, Python {found['python']}, {versions}"
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


# -- docs/benchmarks.md ---------------------------------------------------------------------------

_HEAD: Final = """\
# Benchmarks

Written by `make bench`; do not edit by hand. Every figure comes from one run on one machine. The
server (`benchmarks/server.py`) runs on the same machine, on a separate core, and shares no code
with the package. Figures differ between machines; ratios within one table are more stable.

- `make bench` runs all benchmarks in an hour. `make bench BENCH=quick` takes a few minutes, and
  writes nothing.
- `.venv/bin/python -m benchmarks NAME` runs one and replaces its part of this page. `--help`
  lists its options.

| benchmark | question |
| --- | --- |
| `start` | How long does a command take that has nothing to buy? |
| `makespan` | How close does a run come to the least time that the account's limits allow? |
| `processes` | What do several processes on one account and one journal cost each other? |
| `images` | How much CPU does an image take, and how many images come per second? |
| `memory` | How much memory does a run take, with many images and with large ones? |
| `planning` | How long does a run over a large table take before it buys? |
| `in_dagster` | How much time does Dagster add to the engine? |
| `partitions` | What do many partitions cost in Dagster, with nothing to do, and if they are new? |
| `spend` | How long do the spend tables of a year take? |
| `spend_warnings` | What do warnings about spend find, and how often have they no cause? |
| `export` | How much slower is an export than a loop that copies files? |
"""


def page(reports: Sequence[dict[str, Any]]) -> str:
    """Return the page of these reports, given as Report.as_json returns them."""
    return "\n".join([_HEAD, *(_part(values) for values in reports)])


def _part(values: dict[str, Any]) -> str:
    report = Report.from_json(values)
    lines = [f"## {report.title}", "", f"`benchmarks/{report.name}.py`. {report.setting}.", ""]
    if report.rows:
        lines += _table(report.columns, report.rows)
    if report.claims:
        lines += _table(
            ["limit", "measured", "at most", "met"],
            [
                [
                    claim.text,
                    f"{claim.value:.4g} {claim.unit}".strip(),
                    f"{claim.limit:g} {claim.unit}".strip(),
                    "yes" if claim.met else "**no**",
                ]
                for claim in report.claims
            ],
        )
    if report.notes:
        lines += [*(f"- {note}" for note in report.notes), ""]
    lines += [f"{conditions_text(values['conditions'])}; {report.seconds:g} s in all.", ""]
    return "\n".join(lines)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    aligned = ["---", *["---:"] * (len(columns) - 1)]
    lines = [columns, aligned, *rows]
    return [
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines),
        "",
    ]
