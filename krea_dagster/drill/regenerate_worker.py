"""A worker's life as the command `materialize --again`, in this process. Imports all of Dagster."""

from __future__ import annotations

import json
import os
import sys

from krea_dagster.drill.job import Job
from krea_dagster.errors import KreaError
from krea_dagster.plugin.config import KreaImagesConfig
from krea_dagster.plugin.environment import KEY_VARIABLE, Settings
from krea_dagster.plugin.materialize import materialize
from krea_dagster.plugin.resource import KreaResource


def ask_again(job: Job, krea: KreaResource) -> None:
    """Do what the command does with the job's wish. Raises KreaError where a run of it fails."""

    class DrilledSettings(Settings):
        """What the environment says, with the drilled resource."""

        def resource(self) -> KreaResource:
            return krea

    os.environ["DAGSTER_HOME"] = str(job.place.folder / "dagster")
    settings = DrilledSettings.from_environment(
        {
            KEY_VARIABLE: job.api_key,
            "EVOLINK_BASE_URL": job.url,
            "KREA_PROMPTS": str(job.place.prompts),
            "KREA_STORAGE": str(job.place.storage),
            "KREA_JOURNAL_URL": job.place.journal_url,
            "KREA_PARTITION_BY": "hash:1",
            "KREA_ON_UNKNOWN": job.on_unknown,
        }
    )
    wishes = KreaImagesConfig(again=list(job.again or ()), wait=True)
    done = materialize(settings, (), wishes)
    if done.failures:
        raise KreaError("; ".join(done.failures))
    ended = {
        "worker": job.number,
        "again": list(wishes.again),
        "seconds": round(done.seconds, 3),
        "delivered": done.progress.delivered,
        "left": done.progress.left,
    }
    print(json.dumps(ended), file=sys.stderr)  # noqa: T201 - the worker's log
