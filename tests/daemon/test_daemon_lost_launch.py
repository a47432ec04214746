"""A launch of the automation that came to nothing, and the real daemon that makes it again once."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pytest

from krea_dagster.emulator import Emulator
from krea_dagster.plugin.sensors.lost_launches import RELAUNCH_TAG
from tests.daemon.daemon_bench import dagster_dev
from tests.dagster_bench import OpenAccount, bought, write_table
from tests.plugin.sensors.test_lost_launches import lost_backfill

pytestmark = pytest.mark.daemon

MARKER = "of the lost launch"
KEYS = ["bucket-000", "bucket-001"]

#: The shipped definitions, whose sensors look more often. Without an automation: it has launched.
DEFINITIONS = """\
import os
import dagster as dg
from krea_dagster import KreaResource, build_krea_definitions
from krea_dagster.plugin.names import Names
from krea_dagster.plugin.sensors.retries import build_retries_sensor



@dg.definitions
def location():
    krea = KreaResource(
        api_key=dg.EnvVar("DAEMON_KEY"),
        base_url=os.environ["BASE_URL"],
        storage=os.environ["STORAGE"],
    )
    made = build_krea_definitions(
        prompts=os.environ["TABLE"], partition_by=os.environ["PARTITION_BY"], krea=krea,
        spend=False, salvage=False, curation=False,
    )
    images = made.resolve_assets_def(dg.AssetKey("images"))
    return dg.Definitions(
        assets=made.assets, jobs=made.jobs, resources=made.resources, executor=made.executor,
        sensors=[build_retries_sensor(Names(), images, minimum_interval_s=1)],
    )
"""


def test_the_daemon_makes_a_launch_again_that_came_to_nothing_and_only_once(
    tmp_path: Path, emulator: Emulator, open_account: OpenAccount
) -> None:
    prompts = [f"image {number} {MARKER}" for number in range(6)]
    write_table(tmp_path / "prompts.parquet", {"prompt": prompts})
    with dagster_dev(
        tmp_path,
        base_url=emulator.url,
        api_key=open_account(100.0),
        partition_by="hash:2",
        definitions=DEFINITIONS,
    ) as dagster:
        backfill = lost_backfill("okgmlpxv", KEYS, dg.StaticPartitionsDefinition(KEYS))
        dagster.instance.add_backfill(backfill)
        dagster.wait(lambda: len(bought(emulator, MARKER)) == len(prompts))
        dagster.wait_until_quiet()
        (run,) = dagster.runs()
        assert run.tags[RELAUNCH_TAG] == "okgmlpxv"
        assert run.status is dg.DagsterRunStatus.SUCCESS
        assert len(bought(emulator, MARKER)) == len(prompts)
