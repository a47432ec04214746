"""Plays many scenarios, in as many processes as there are cores: ``make simulate SEEDS=10000``.

With ``--seed`` it plays one, shortened if it fails, and with ``--lines`` prints every call.
"""

from __future__ import annotations

import argparse
import os
import sys

#: The order of sets of strings depends on their hashes, so those must be the same each time.
_HASHES = "PYTHONHASHSEED"

if os.environ.get(_HASHES) != "0":
    os.environ[_HASHES] = "0"
    os.execv(sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]])  # noqa: S606

from tests.simulation.batch import run_many, run_one  # noqa: E402 - only with these hashes


def main() -> int:
    """Return how many scenarios failed, 1 at most."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many scenarios")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, action="append", help="this scenario alone")
    parser.add_argument("--lines", action="store_true", help="tell it line by line")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--until", type=int, default=5, help="end after this many failures")
    parser.add_argument("--plain", action="store_true", help="shorten no scenario that fails")
    asked = parser.parse_args()
    if asked.seed is not None:
        return max(run_one(seed, lines=asked.lines) for seed in asked.seed)
    seeds = range(asked.first, asked.first + asked.seeds)
    return run_many(seeds, processes=asked.processes, most_failures=asked.until, plain=asked.plain)


if __name__ == "__main__":
    sys.exit(main())
