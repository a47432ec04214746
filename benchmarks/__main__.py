"""Runs the benchmarks and writes docs/benchmarks.md.

    python -m benchmarks [NAME …] [--quick]

Each runs in a separate process. With names, only their parts of the page are replaced. With
``--quick`` nothing is written, because its figures say little.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from argparse import ArgumentParser
from typing import Any, Final

from benchmarks.harness import ROOT
from benchmarks.report import Report, page, show

#: In the order of the page.
NAMES: Final = (
    "start",
    "makespan",
    "processes",
    "images",
    "memory",
    "planning",
    "in_dagster",
    "partitions",
    "spend",
    "spend_warnings",
    "export",
)

PAGE: Final = ROOT / "docs" / "benchmarks.md"
#: The data of the page, so that one benchmark can be run without the others.
RESULTS: Final = ROOT / "docs" / "benchmarks.json"


def main() -> None:
    """Run the command; exit with 1 if a benchmark failed to run."""
    add = ArgumentParser(prog="python -m benchmarks", description="Run the benchmarks")
    add.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    add.add_argument("--quick", action="store_true", help="a few minutes, and nothing is written")
    options = add.parse_args()
    if wrong := set(options.names) - set(NAMES):
        add.error(f"unknown benchmark {', '.join(sorted(wrong))}")
    found: dict[str, Any] = {}
    failed = []
    for name in options.names or NAMES:
        print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)
        values = _run(name, quick=options.quick)
        if values is None:
            failed.append(name)
            continue
        found[name] = values
        show(Report.from_json(values))
        if not options.quick:
            _write(found)
    missed = [
        str(claim)
        for values in found.values()
        for claim in Report.from_json(values).claims
        if not claim.met
    ]
    print("\n".join(["Not met:", *missed]) if missed else "Every limit is met.")
    if failed:
        print(f"Did not run to their end: {', '.join(failed)}")
        sys.exit(1)


def _run(name: str, *, quick: bool) -> dict[str, Any] | None:
    """Run one; return None, with its error on stderr, if it failed."""
    os.sync()  # or it waits for what the one before has left to write
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json"]
    ended = subprocess.run(
        command + ["--quick"] * quick, cwd=ROOT, stdout=subprocess.PIPE, check=False
    )
    if ended.returncode:
        return None
    values: dict[str, Any] = json.loads(ended.stdout.decode().strip().rpartition("\n")[2])
    return values


def _write(found: dict[str, Any]) -> None:
    known: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known.update(found)
    in_order = {name: known[name] for name in NAMES if name in known}
    RESULTS.write_text(json.dumps(in_order, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(page(list(in_order.values())))


if __name__ == "__main__":
    main()
