"""A command that imports, waits for a file to exist, and runs, so that several start at once.

``python -m tests.scenarios.waiting_command FILE ARGUMENTS...`` prints ``ready``, waits for
the file, and then runs ``krea-dagster ARGUMENTS``.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import krea_dagster.plugin.materialize  # noqa: F401 - else the command imports it, seconds long
from krea_dagster import cli


def main() -> None:
    begin = Path(sys.argv[1])
    sys.argv = ["krea-dagster", *sys.argv[2:]]
    print("ready", flush=True)
    deadline_s = time.monotonic() + 120
    while not begin.exists():
        if time.monotonic() > deadline_s:
            sys.exit("nobody said begin")
    cli.run()


if __name__ == "__main__":
    main()
