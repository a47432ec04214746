"""Only what changed: by a real daemon, with the shipped automation, and the emulator's accounts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from krea_dagster import KreaResource
from krea_dagster.emulator import Emulator
from krea_dagster.prompts import HashPartitions
from tests.daemon.daemon_bench import Dagster, dagster_dev
from tests.dagster_bench import OpenAccount, bought, write_table
from tests.prompts.reference import key_for

pytestmark = pytest.mark.daemon

BY = HashPartitions(8)
MARKER = "of the daemon's shop"
COUNT = 16
IMAGES = dg.AssetKey("images")


def rows(**changed: Any) -> pa.Table:
    columns: dict[str, Any] = {
        "prompt_id": [f"d-{number:02d}" for number in range(COUNT)],
        "prompt": [f"image {number} {MARKER}" for number in range(COUNT)],
        "quality": ["1K"] * COUNT,
    }
    return pa.table(columns | changed)


def partition_of(number: int) -> str:
    return key_for(BY, f"d-{number:02d}")


def worked_on(dagster: Dagster, since: int) -> Counter[str]:
    """How often the runs after these have worked on each partition of images."""
    partitions: Counter[str] = Counter()
    for run in dagster.runs()[since:]:
        for entry in dagster.instance.all_logs(run.run_id):
            event = entry.dagster_event
            if event and event.is_step_materialization and event.asset_key == IMAGES:
                partitions[str(event.partition)] += 1
    return partitions


def test_the_daemon_buys_what_is_missing_once_and_then_exactly_what_changed(
    tmp_path: Path, emulator: Emulator, open_account: OpenAccount
) -> None:
    key, manifest = open_account(100.0), tmp_path / "krea" / "manifest"
    write_table(tmp_path / "prompts.parquet", rows())
    with dagster_dev(
        tmp_path, base_url=emulator.url, api_key=key, partition_by="hash:8", automated=True
    ) as dagster:
        dagster.wait(lambda: len(bought(emulator, MARKER)) == COUNT)
        dagster.wait_until_quiet()
        first = {task["task_id"] for task in bought(emulator, MARKER)}
        assert len(first) == COUNT
        runs = len(dagster.runs())

        # In another order, and written otherwise: nothing is launched.
        other = rows().take(list(reversed(range(COUNT))))
        pq.write_table(other, tmp_path / "prompts.parquet", compression="zstd", row_group_size=3)
        dagster.wait_until_quiet()
        assert len(dagster.runs()) == runs

        # Three rows change, one of another partition is removed, and a column is carried along.
        campaign = ["autumn"] * COUNT
        prompts = rows(campaign=campaign).to_pylist()
        for number in (3, 5, 7):
            prompts[number]["prompt"] += ", in the rain"
        del prompts[12]
        write_table(tmp_path / "prompts.parquet", pa.Table.from_pylist(prompts))
        dagster.wait(lambda: len(bought(emulator, MARKER)) == COUNT + 3)
        dagster.wait_until_quiet()
        changed = {partition_of(number) for number in (3, 5, 7, 12)}
        assert worked_on(dagster, runs) == dict.fromkeys(changed, 1)
        new = [task for task in bought(emulator, MARKER) if task["task_id"] not in first]
        assert len(new) == 3
        assert all(task["prompt"].endswith(", in the rain") for task in new)
        # The images of the other partitions are left alone, and their manifests rewritten.
        made = pq.read_table(manifest).to_pylist()
        assert [row["campaign"] for row in made] == campaign[:-1]
        assert "d-12" not in {row["prompt_id"] for row in made}
        with KreaResource(storage=str(tmp_path / "krea")).krea().open_journal() as journal:
            assert len(list(journal.all_records())) == COUNT + 3

        # The account has nothing left: the one partition that changes fails, once.
        runs = len(dagster.runs())
        emulator.world.set_quota(0.0)
        try:
            prompts[1]["prompt"] += ", at night"
            write_table(tmp_path / "prompts.parquet", pa.Table.from_pylist(prompts))
            dagster.wait(lambda: len(dagster.runs()) == runs + 1)
            dagster.wait_until_quiet()
            assert len(dagster.runs()) == runs + 1
            assert dagster.runs()[-1].status is dg.DagsterRunStatus.FAILURE
        finally:
            emulator.world.set_quota(None)

        # Topped up: a person launches what failed, and only that is bought.
        dagster.launch(partition_of(1))
        dagster.wait_until_quiet()
        assert dagster.runs()[-1].status is dg.DagsterRunStatus.SUCCESS
        assert len(dagster.runs()) == runs + 2
        assert len(bought(emulator, MARKER)) == COUNT + 4
        account = emulator.world.account(key)
        assert account is not None
        assert account.charged == (COUNT + 4) * 4500
