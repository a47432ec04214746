"""A cap of ten credits, 64 in flight, four processes: ``python -m tests.crash.cap_trials``.

The emulator's totals are watched all the time: the held and the charged credits together must
never pass the cap. In every second trial the server fails in all the ways that make an
outcome unknown or return what was reserved.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

from krea_dagster.emulator import Emulator
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.models import credits_from_units
from tests.crash.process_harness import ProcessHarness, outcomes

CAP_UNITS: Final = 100_000
PROCESSES: Final = 4
ROWS: Final = 80

#: Shares of the requests at which the server fails, in trials with faults.
FAULTS: Final = {
    "drop_after_create": 0.05,
    "drop_before_create": 0.05,
    "500_after_create": 0.05,
    "502_html": 0.05,
    "429": 0.05,
    "fail": 0.1,
    "cancelled": 0.05,
    "no_id": 0.02,
}


@dataclass(frozen=True)
class Trial:
    """The result of one trial, in units.

    ``most_units`` is the highest sum of held and charged credits that was seen.
    """

    most_units: int
    charged_units: int
    committed_units: int
    creates: int
    delivered: int
    deferred: int
    posts: int
    seconds: float


def trial(
    folder: Path, *, seed: int, faults: bool, journal: str | None = None, scope: str = "day"
) -> Trial:
    """Run four processes over overlapping rows, under one cap that they share."""
    with Emulator(latency_s=0.2, seed=seed, credits=1000.0, state=folder / "emulator") as emulator:
        for name, rate in (FAULTS if faults else {}).items():
            emulator.world.set_rate(name, rate, arg="0.1" if name == "429" else None)
        harness = ProcessHarness(folder, emulator, journal)
        started_s = time.monotonic()
        run: dict[str, Any] = {
            "count": ROWS,
            "two_k": 6 if faults else 0,
            f"{scope}_units": CAP_UNITS,
        }
        if scope == "run":
            run["run_id"] = "the-one-run"
        with _Watch(emulator) as watch:
            # Half of each process's rows are also those of another one.
            ended = outcomes(
                harness.start(*({**run, "start": n * ROWS // 2} for n in range(PROCESSES)))
            )
        harness.close()
        seconds = time.monotonic() - started_s
        stats = emulator.stats()
    assert stats["bodies_bought_more_than_once"] == 0, stats["bodies_bought_more_than_once"]
    assert {code for code, _ in ended} == {1}, ended
    with closing(Journal(harness.job.journal)) as opened:
        today = f"{datetime.now(timezone.utc):%Y-%m-%d}"
        key = f"day:{today}" if scope == "day" else "run:the-one-run"
        committed_units = opened.commitment(key).committed_units
        states = opened.count_by_state()
    return Trial(
        most_units=max(watch.most_units, stats["charged_units"] + stats["held_units"]),
        charged_units=stats["charged_units"],
        committed_units=committed_units,
        creates=stats["creates"],
        delivered=sum(n for state, n in states.items() if state.value == "stored"),
        deferred=sum(n for state, n in states.items() if state.value == "deferred"),
        posts=sum(report["posts"] for _, report in ended),
        seconds=seconds,
    )


class _Watch:
    """Reads the emulator's totals all the time, in a thread."""

    def __init__(self, emulator: Emulator) -> None:
        self._emulator = emulator
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.most_units = 0

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._end.wait(0.05):
            stats = self._emulator.stats(tasks=False)
            billed = stats["charged_units"] + stats["held_units"]
            self.most_units = max(self.most_units, billed)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(arguments: Sequence[str]) -> int:
    """Print one line per trial; return 1 if one has passed the cap."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--scope", choices=["day", "run"], default="day")
    options = parser.parse_args(arguments)
    passed = 0
    _say("trial  faults  most billed  charged  committed  created  stored  deferred  posts    s")
    for number in range(options.trials):
        folder = Path(tempfile.mkdtemp(prefix="krea-cap-"))
        faults = bool(number % 2)
        try:
            found = trial(folder, seed=number, faults=faults, scope=options.scope)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        passed += max(found.most_units, found.committed_units) > CAP_UNITS
        _say(
            f"{number + 1:5}  {'yes' if faults else 'no':6}"
            f"  {credits_from_units(found.most_units):11.2f}"
            f"  {credits_from_units(found.charged_units):7.2f}"
            f"  {credits_from_units(found.committed_units):9.2f}"
            f"  {found.creates:7}  {found.delivered:6}  {found.deferred:8}  {found.posts:5}"
            f"  {found.seconds:4.1f}"
        )
    _say(f"the cap of {credits_from_units(CAP_UNITS):g} credits was passed in {passed} trials")
    return 1 if passed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
