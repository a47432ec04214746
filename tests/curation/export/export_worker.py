"""A process that exports and kills itself after some shards, for tests of resuming."""

from __future__ import annotations

import os
import signal
import sys

from krea_dagster.curation.export.export import export
from krea_dagster.curation.export.shards import ExportProgress
from krea_dagster.curation.export.spec import ExportSpec
from krea_dagster.engine.storage.storage import Storage


def main() -> None:
    root, to, form, after = sys.argv[1:]
    left = int(after)

    def die(progress: ExportProgress) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    spec = ExportSpec.parse(form=form, shard_images=10)
    export(Storage(root), spec, to, threads=1, on_progress=die)


if __name__ == "__main__":
    main()
