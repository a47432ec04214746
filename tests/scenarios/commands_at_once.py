"""Several processes of one command, which start at the same moment.

``python -m tests.scenarios.commands_at_once COUNT FOLDER ARGUMENTS...`` runs ``krea-dagster
ARGUMENTS`` in COUNT processes, and prints their exit codes as a JSON list. What the first one
prints is in FOLDER/0.txt. They are forks of a process that has imported the command and done
nothing else.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import krea_dagster.plugin.materialize  # noqa: F401 - else each process imports it, seconds long
from krea_dagster import cli


def _run_and_exit() -> NoReturn:
    """Run the command, and end without waiting for the threads of the process that was forked."""
    code = 1
    try:
        cli.run()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001 - as Python itself prints what ends a process
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> int:
    """Start them, and wait for them."""
    count, folder = int(sys.argv[1]), Path(sys.argv[2])
    sys.argv = ["krea-dagster", *sys.argv[3:]]
    waiting, begin = os.pipe()
    processes = []
    for number in range(count):
        process = os.fork()
        if process == 0:
            os.close(begin)
            os.read(waiting, 1)  # returns when the first process closes the other end
            with (folder / f"{number}.txt").open("wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            _run_and_exit()
        processes.append(process)
    os.close(begin)
    statuses = [os.waitpid(process, 0)[1] for process in processes]
    print(json.dumps([os.waitstatus_to_exitcode(status) for status in statuses]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
