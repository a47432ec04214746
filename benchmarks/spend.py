"""The spend tables of a simulated year of a million purchases.

python -m benchmarks.spend [--purchases N] [--quick] [--json]

Each update is measured in a new process, and its sums are compared with the simulation's own
accounts.
"""

from __future__ import annotations

import json
import os
import time
from argparse import Namespace
from contextlib import closing
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from benchmarks.harness import EndedProcess, note_progress, peak_bytes, run
from benchmarks.report import Report, finish, options_of

PURCHASES: Final = 1_000_000
SCRATCH_S: Final = 20.0
DAY_S: Final = 2.0
NOTHING_S: Final = 0.5
PEAK_BYTES: Final = 1_000_000_000

#: The columns that are summed, by their names in the ledger and in the simulation's accounts.
_SUMS: Final = {
    "credits_charged": "charged_units",
    "credits_returned": "returned_units",
    "credits_unknown": "unknown_units",
}


def main() -> None:
    """Run the command: the report, or with ``--work`` one of its processes."""
    parser = options_of("spend")
    parser.add_argument("--purchases", type=int, default=PURCHASES, help="purchases of the year")
    parser.add_argument(
        "--work", choices=["simulate", "update"], help="do this step, and print its cost"
    )
    parser.add_argument("--until", help="for --work simulate: the days to write, in order")
    parser.add_argument("--folder", type=Path, help="for --work")
    options = parser.parse_args()
    if options.work:
        work = simulate if options.work == "simulate" else update
        print(json.dumps(work(options)))
        return
    if options.quick:
        options.purchases //= 20
    with TemporaryDirectory() as name:
        _measure(options, Path(name))


def _measure(options: Namespace, folder: Path) -> None:
    report = Report(
        "spend",
        f"Spend tables of a year, {options.purchases:,} purchases",
        setting=(
            "A simulated year in a SQLite journal, eight manifests with a row per image: prices "
            "rise in May, three days of outage in July, one runaway day in September. Ledger, "
            "daily sums and failures as Parquet files by month. n = 1, both cores."
        ),
        columns=["what", "wall, s", "CPU, s", "peak memory, MB", "months written"],
    )
    # One simulation, which stops before the last day and continues when the tables are made.
    for step, (what, until) in enumerate(
        (("from scratch, 364 days", "2026-12-30"), ("one more day", "2026-12-30,2026-12-31"))
    ):
        accounts = _do("simulate", folder / str(step), options, until).output
        if step:
            _take_tables(folder / "0", folder / "1")
        ended = _do("update", folder / str(step), options, until).output
        differ = {name: ended["sums"][name] - accounts[units] for name, units in _SUMS.items()}
        assert not any(differ.values()), differ
        assert ended["purchases"] == accounts["asked"]
        _add(report, what, ended, DAY_S if step else SCRATCH_S)
    _add(
        report, "nothing new", _do("update", folder / "1", options, "2026-12-31").output, NOTHING_S
    )
    report.note(
        "Purchases and charged, returned and unknown credits equal the simulation's own accounts, "
        "to 1/10,000 credit. Seconds are without Python's start and imports, memory is with them."
    )
    finish(report, options)


def _add(report: Report, what: str, ended: dict[str, Any], limit_s: float) -> None:
    memory = f"{ended['peak_bytes'] / 1e6:.0f}"
    report.add(what, f"{ended['wall_s']:.2f}", f"{ended['cpu_s']:.2f}", memory, ended["months"])
    report.claim(what, ended["wall_s"], limit_s, "s")
    report.claim(f"{what}: peak memory, MB", ended["peak_bytes"] / 1e6, PEAK_BYTES / 1e6)


def _take_tables(before: Path, after: Path) -> None:
    """Move the tables of the first 364 days to the journal of the whole year.

    Both journals are of one simulation, but each has its own name.
    """
    (before / "spend").rename(after / "spend")
    state = after / "spend" / "state.json"
    said = json.loads(state.read_text())
    said["journal_id"] = _journal_id(after)
    state.write_text(json.dumps(said))


def _journal_id(folder: Path) -> str:
    import sqlite3

    with closing(sqlite3.connect(folder / "journal.db")) as database:
        return str(database.execute("select journal_id from about").fetchone()[0])


def _do(work: str, folder: Path, options: Namespace, until: str) -> EndedProcess:
    note_progress(f"{work}, {options.purchases:,} purchases until {until}")
    folder.mkdir(exist_ok=True)
    command = ["benchmarks.spend", "--work", work, "--folder", str(folder), "--until", until]
    return run([*command, "--purchases", str(options.purchases)])


# -- the processes --------------------------------------------------------------------------------


def simulate(options: Namespace) -> dict[str, Any]:
    """Write the days of the year, and return the sums of the simulation's own accounts."""
    from tests.spend.simulated_year import SimulatedYear

    year = SimulatedYear(options.folder, options.purchases)
    for until in options.until.split(","):
        year.write(date.fromisoformat(until))
    accounts = year.expected()
    return {name: accounts.total(name) for name in ("asked", *_SUMS.values())}


def update(options: Namespace) -> dict[str, Any]:
    """Update the tables from the journal, and sum them up."""
    import duckdb

    from krea_dagster.engine.journal.journal import Journal
    from krea_dagster.engine.storage.storage import Storage
    from krea_dagster.spend.tables.update import update_spend

    storage = Storage(str(options.folder))
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    with closing(Journal(f"sqlite:///{options.folder / 'journal.db'}")) as journal:
        # The year may end in this machine's future, and an update stops at the present.
        ended = date.fromisoformat(options.until.split(",")[-1]) + timedelta(days=1)
        now = datetime.combine(ended, datetime.min.time(), timezone.utc)
        updated = update_spend(journal, storage, now=now)
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    peak = peak_bytes()
    paths = os.fspath(options.folder / "spend" / "ledger" / "*.parquet")
    sums = ", ".join(f"CAST(sum({name}) * 10000 AS BIGINT)" for name in _SUMS)
    found = duckdb.sql(f"SELECT {sums} FROM read_parquet('{paths}')").fetchone()
    assert found is not None
    return {
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "peak_bytes": peak,
        "months": len(updated.months),
        "purchases": updated.purchases,
        "sums": dict(zip(_SUMS, found, strict=True)),
    }


if __name__ == "__main__":
    main()
