"""Prompts that another asset makes, by a real daemon with a process for each step."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import dagster as dg
import pytest

from krea_dagster import KreaResource
from krea_dagster.emulator import Emulator
from krea_dagster.prompts import HashPartitions
from tests.daemon.daemon_bench import Dagster, dagster_dev
from tests.dagster_bench import OpenAccount, bought
from tests.prompts.reference import key_for

pytestmark = pytest.mark.daemon

COUNT = 8
BY = HashPartitions(4)
UPSTREAM, IMAGES = dg.AssetKey(["raw", "prompts"]), dg.AssetKey("images")

#: A project whose upstream reads rows from a file, and fails if there is none.
DEFINITIONS = """\
import os
import dagster as dg
import pandas as pd
from krea_dagster import (
    KreaManifestIOManager, KreaResource, PromptTable, build_krea_assets, on_prompts_changed,
)
from krea_dagster.plugin.names import Names
from krea_dagster.plugin.sensors.prompts import build_automation_sensor, build_prompts_sensor
from krea_dagster.prompts import parse_partition_by

is_value = os.environ["WIRING"] == "value"
place = os.environ["TABLE"]

@dg.asset(key=["raw", "prompts"])
def upstream():
    table = pd.read_json(os.environ["ROWS"], orient="records")
    if is_value:
        return table
    table.to_parquet(place)

made = build_krea_assets(
    PromptTable(place, parse_partition_by(os.environ["PARTITION_BY"])),
    automation_condition=on_prompts_changed(),
    **({"prompts": upstream} if is_value else {"deps": [upstream]}),
)
storage = os.environ["STORAGE"]
defs = dg.Definitions(
    assets=[upstream, *made.all],
    jobs=[dg.define_asset_job("write", selection=[upstream])],
    sensors=[
        build_prompts_sensor(
            Names(), made.table, made.partitions_def, upstream=made.upstream, minimum_interval_s=1
        ),
        build_automation_sensor(
            [made.images, made.image_manifest], name="krea_automation", minimum_interval_s=1
        ),
    ],
    resources={
        "krea": KreaResource(
            api_key=dg.EnvVar("DAEMON_KEY"), base_url=os.environ["BASE_URL"], storage=storage
        ),
        "krea_manifest": KreaManifestIOManager(storage=storage),
        "io_manager": dg.FilesystemIOManager(base_dir=os.environ["VALUES"]),
    },
    executor=dg.multiprocess_executor,
)
"""


def materialized(dagster: Dagster, key: dg.AssetKey, since: int) -> Counter[str]:
    """How often the steps of the runs after these have materialized each partition of an asset."""
    found: Counter[str] = Counter()
    for run in dagster.runs()[since:]:
        for entry in dagster.instance.all_logs(run.run_id):
            event = entry.dagster_event
            if event and event.is_step_materialization and event.asset_key == key:
                found[str(event.partition)] += 1
    return found


def ended(dagster: Dagster, run_id: str) -> bool:
    run = dagster.instance.get_run_by_id(run_id)
    return run is not None and run.is_finished


@pytest.mark.parametrize("wiring", ["value", "file"])
def test_the_daemon_buys_what_the_upstream_changes_and_orders_a_backfill_of_both(
    tmp_path: Path, emulator: Emulator, open_account: OpenAccount, wiring: str
) -> None:
    key, marker = open_account(100.0), f"of the upstream's {wiring}"
    rows = [
        {"prompt_id": f"u-{number}", "prompt": f"image {number} {marker}"}
        for number in range(COUNT)
    ]
    file = tmp_path / "rows.json"

    def change(*numbers: int) -> set[str]:
        for number in numbers:
            rows[number]["prompt"] += ", in the rain"
        file.write_text(json.dumps(rows))
        return {key_for(BY, f"u-{number}") for number in numbers}

    with dagster_dev(
        tmp_path,
        base_url=emulator.url,
        api_key=key,
        partition_by=str(BY),
        definitions=DEFINITIONS,
        variables={
            "WIRING": wiring,
            "ROWS": str(file),
            "VALUES": str(tmp_path / "values"),
            "TABLE": str(tmp_path / ("kept" if wiring == "value" else "prompts.parquet")),
        },
    ) as dagster:
        change()
        dagster.launch(job="write")
        dagster.wait(lambda: len(bought(emulator, marker)) == COUNT)
        dagster.wait_until_quiet()

        # The same again: only the upstream's own run.
        runs = len(dagster.runs())
        dagster.launch(job="write")
        dagster.wait_until_quiet()
        assert len(dagster.runs()) == runs + 1

        # Three rows: their partitions, once.
        runs = len(dagster.runs())
        changed = change(0, 1, 2)
        dagster.launch(job="write")
        dagster.wait(lambda: len(bought(emulator, marker)) == COUNT + 3)
        dagster.wait_until_quiet()
        assert materialized(dagster, IMAGES, runs) == dict.fromkeys(changed, 1)

        # All together, as the button does: the upstream first, and from what it makes is bought.
        runs = len(dagster.runs())
        change(3, 4, 5)
        together = dagster.backfill(BY.keys(), [UPSTREAM.path, ["images"], ["image_manifest"]])
        dagster.wait(lambda: dagster.backfill_status(together).startswith("COMPLETED"))
        assert dagster.backfill_status(together) == "COMPLETED_SUCCESS"
        assert len(bought(emulator, marker)) == COUNT + 6
        first = dagster.runs()[runs]
        assert first.asset_selection == {UPSTREAM}
        dagster.wait_until_quiet()
        assert len(bought(emulator, marker)) == COUNT + 6

        # It fails: nothing more is launched.
        runs = len(dagster.runs())
        file.unlink()
        failed = dagster.launch(job="write")
        dagster.wait(lambda: ended(dagster, failed))
        dagster.wait_until_quiet()
        assert len(dagster.runs()) == runs + 1

        # Nothing was reported on the upstream but by its own four steps.
        records = dagster.instance.fetch_materializations(UPSTREAM, limit=100).records
        assert len(records) == 4
        assert all(record.event_log_entry.step_key for record in records)
    account = emulator.world.account(key)
    assert account is not None
    assert account.charged == (COUNT + 6) * 4500
    with KreaResource(storage=str(tmp_path / "krea")).krea().open_journal() as journal:
        assert len(list(journal.all_records())) == COUNT + 6
