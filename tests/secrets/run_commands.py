"""Run several commands of krea-dagster in one process.

Read from stdin: a JSON list of lists of arguments. Between them stands a line on either stream,
and on stdout a last one with their exit codes. One process spares each command the imports.
"""

from __future__ import annotations

import json
import sys
import time
import traceback

from krea_dagster import cli


def main() -> None:
    """Run them all."""
    codes: list[int] = []
    begun_s = time.monotonic()
    for arguments in json.load(sys.stdin):
        sys.argv = ["krea-dagster", *arguments]
        for stream in (sys.stdout, sys.stderr):
            print(
                f"$ {' '.join(arguments)} {time.monotonic() - begun_s:.1f} s",
                file=stream,
                flush=True,
            )
        try:
            cli.run()
            codes.append(0)
        except SystemExit as ended:
            codes.append(ended.code if isinstance(ended.code, int) else 0)
        except Exception:  # noqa: BLE001 - that is what is looked for
            traceback.print_exc()
            codes.append(-1)
    print(json.dumps(codes))


if __name__ == "__main__":
    main()
