"""Processes that buy the same rows at the same time: ``python -m tests.crash.pair_of_runs``."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from krea_dagster.emulator import Emulator
from tests.crash.process_harness import ProcessHarness, outcomes


def together(
    folder: Path, *, rows: int, processes: int, journal: str | None = None
) -> tuple[dict[str, Any], list[Any]]:
    """Run them to their end, and return the emulator's totals and the reports."""
    with Emulator(latency_s=0.2, state=folder / "emulator") as emulator:
        harness = ProcessHarness(folder, emulator, journal)
        ended = outcomes(harness.start(*({"count": rows} for _ in range(processes))))
        harness.close()
        assert [code for code, _ in ended] == [0] * processes, ended
        assert {record.state.value for record in harness.records()} == {"stored"}
        return harness.assert_accounts_agree(tasks=rows), [report for _, report in ended]


def main(arguments: Sequence[str]) -> int:
    """Print what was billed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="krea-pair-") as folder:
        stats, reports = together(Path(folder), rows=options.rows, processes=options.processes)
    images = sum(task["charged_units"] > 0 for task in stats["tasks"])
    for number, report in enumerate(reports):
        sys.stdout.write(f"process {number + 1}: {report}\n")
    sys.stdout.write(
        f"{options.rows} rows, {options.processes} processes: {stats['creates']} tasks created, "
        f"{images} billed ({stats['charged_units'] / 10_000:g} credits), "
        f"{stats['bodies_bought_more_than_once']} bought twice\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
