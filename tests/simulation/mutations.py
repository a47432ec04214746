"""Puts a bug back and counts the scenarios that it takes to find it: ``make simulate-bugs``.

Each of them existed, or could have. The simulation runs on a changed copy of the package.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_ROOT: Final = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutation:
    """A bug: for each file of the package, a text and its replacement."""

    name: str
    says: str
    changes: tuple[tuple[str, str, str], ...]


_NO_BOUND: Final = (
    "engine/run/poller.py",
    "timer = result.get_loop().call_later(within_s + _READ_TIMEOUT_S, read.fail, error)",
    "timer = result.get_loop().call_later(1e9, read.fail, error)",
)

_RELEASED: Final = """\
            connection.execute(update(requests).where(mine).values(claimed_by=None))
            connection.execute(delete(owners).where(owners.c.owner == owner))
"""
_QUEUED: Final = "        self._reads[read] = None\n"

MUTATIONS: Final = (
    Mutation(
        "batch-hang",
        "what came while the server had a batch read is never read once it has none",
        (
            _NO_BOUND,
            (
                "api/batch_support.py",
                "off_until_s=now_s + self.off_s,",
                "off_until_s=float('inf'),  # for good, as it was then",
            ),
            (
                "engine/run/poller.py",
                "[one for one in self._reads if not one.under_way]",
                """[
            one
            for one in self._reads
            if not one.under_way and (self._client.batch_supported is not False or one.single)
        ]""",
            ),
            (
                "engine/run/poller.py",
                "    under_way: bool = False\n",
                "    under_way: bool = False\n    single: bool = True\n",
            ),
            (
                "engine/run/poller.py",
                _QUEUED,
                f"{_QUEUED}        read.single = self._client.batch_supported is not True\n",
            ),
        ),
    ),
    Mutation(
        "doubled-claim",
        "the second question about a task takes the place of the first",
        (
            _NO_BOUND,
            (
                "engine/run/poller.py",
                _QUEUED,
                f"""        self._reads = {{
            one: None for one in self._reads if one.task_id != task_id
        }}
{_QUEUED}""",
            ),
            (
                "engine/run/poller.py",
                "            del self._reads[read]\n",
                "            self._reads.pop(read, None)\n",
            ),
        ),
    ),
    Mutation(
        "again-repeated",
        "a run killed with --again, and started again, asks for one more image",
        (
            (
                "engine/journal/attempt_log.py",
                "self._raised_for(slot), mine | open_",
                "self._raised_for(slot), mine",
            ),
            ("engine/journal/attempt_log.py", "if not settled(slot, attempt):", "if False:"),
        ),
    ),
    Mutation(
        "batch-failed-believed",
        "a failure that the batch read names is believed, and the image bought again",
        (
            ("engine/run/poller.py", 'task.status in ("failed", "cancelled") or (', "("),
            (
                "engine/run/submit.py",
                "if record.task_id is not None and not await self._confirm_failed(item):",
                "if False:",
            ),
        ),
    ),
    Mutation(
        "lost-journal",
        "a journal that is away for a moment ends the run",
        (
            (
                "engine/run/outages.py",
                "            except (JournalUnavailable, StorageUnavailable) as error:\n",
                "            except StorageUnavailable as error:\n",
            ),
        ),
    ),
    Mutation(
        "hold-forgotten",
        "an unknown outcome is repeated although it is to be held",
        (("engine/policy.py", 'if policy.on_unknown == "hold":', "if False:"),),
    ),
    Mutation(
        "claims-kept",
        "a run that ends gives nothing back",
        (
            (
                "engine/journal/claim_log.py",
                _RELEASED,
                "            connection.execute(select(owners))\n",
            ),
        ),
    ),
    Mutation(
        "caps-not-summed",
        "what a purchase does not cost after all stays in the sums",
        (
            (
                "engine/journal/commitments.py",
                'committed = columns.get("committed_units", earlier) - earlier',
                'committed = max(0, columns.get("committed_units", earlier) - earlier)',
            ),
        ),
    ),
)


def main() -> int:
    """Return 1 if a bug was not found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3000, help="how many scenarios at most")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("names", nargs="*")
    asked = parser.parse_args()
    missed = 0
    for mutation in MUTATIONS:
        if asked.names and mutation.name not in asked.names:
            continue
        began_s = time.monotonic()
        seed, said = find(mutation, asked.first, asked.seeds)
        seconds = time.monotonic() - began_s
        if seed is None:
            missed += 1
            print(f"{mutation.name}: NOT FOUND in {asked.seeds} scenarios, {seconds:.0f} s. {said}")
        else:
            print(f"{mutation.name}: found by seed {seed}, {seconds:.0f} s: {said}", flush=True)
    return 1 if missed else 0


def find(mutation: Mutation, first: int, seeds: int) -> tuple[int | None, str]:
    """Return the first seed whose scenario fails with a bug, and the failure."""
    which = ("--first", str(first), "--seeds", str(seeds))
    ended = simulate(mutation, *which, "--until", "1", "--plain")
    found = re.search(r"^seed (\d+): (.*)$", ended.stdout, re.MULTILINE)
    if found is None:
        return None, ended.stderr[-500:]
    return int(found[1]), found[2][:200]


def simulate(mutation: Mutation, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the simulation on a copy of the package with a bug.

    Raises ValueError if the text to change does not exist any more.
    """
    with tempfile.TemporaryDirectory(prefix="krea-mutation-") as folder:
        copy = Path(folder)
        for name in ("krea_dagster", "tests/simulation"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(_ROOT / name, copy / name, ignore=ignored)
        for name, old, new in mutation.changes:
            file = copy / "krea_dagster" / name
            text = file.read_text()
            if old not in text:
                raise ValueError(f"{mutation.name}: {name} has no {old!r} any more")
            file.write_text(text.replace(old, new))
        return subprocess.run(
            [sys.executable, "-m", "tests.simulation", *arguments],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )


if __name__ == "__main__":
    sys.exit(main())
