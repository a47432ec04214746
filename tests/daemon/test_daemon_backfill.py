"""A backfill of 200 partitions by a real daemon: to its end, and nothing bought twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import dagster as dg
import pyarrow.parquet as pq
import pytest

from krea_dagster.emulator import Emulator
from krea_dagster.prompts import HashPartitions
from tests.daemon.daemon_bench import dagster_dev
from tests.dagster_bench import OpenAccount, bought, write_table

pytestmark = pytest.mark.daemon

PARTITIONS = HashPartitions(200).keys()
ROWS = 250


@pytest.mark.parametrize(("width", "runs"), [(0, 1), (50, 4)], ids=["single_run", "multi_run_50"])
def test_a_backfill_of_200_partitions_buys_every_row_once_also_where_it_is_launched_twice(
    tmp_path: Path, emulator: Emulator, open_account: OpenAccount, width: int, runs: int
) -> None:
    key, marker = open_account(), f"of the backfill by {width}."
    prompts = [f"image {number} {marker}" for number in range(ROWS)]
    ids = [f"b-{number:03d}" for number in range(ROWS)]
    write_table(tmp_path / "prompts.parquet", {"prompt_id": ids, "prompt": prompts})
    with dagster_dev(
        tmp_path, base_url=emulator.url, api_key=key, partition_by="hash:200", width=width
    ) as dagster:
        # Twice at once: the runs of the two share their rows by the journal's claims.
        backfills = [dagster.backfill(PARTITIONS) for _ in range(2)]
        dagster.wait(
            lambda: all(dagster.backfill_status(one).startswith("COMPLETED") for one in backfills)
        )
        assert {dagster.backfill_status(one) for one in backfills} == {"COMPLETED_SUCCESS"}
        assert len(dagster.runs()) == 2 * runs
        assert {run.status for run in dagster.runs()} == {dg.DagsterRunStatus.SUCCESS}
    tasks = bought(emulator, marker)
    assert Counter(task["prompt"] for task in tasks) == dict.fromkeys(prompts, 1)
    account = emulator.world.account(key)
    assert account is not None
    assert account.charged == ROWS * 4500
    made = pq.read_table(tmp_path / "krea" / "manifest").to_pylist()
    assert Counter(row["status"] for row in made) == {"stored": ROWS}
    assert len(list((tmp_path / "krea" / "manifest").glob("*.parquet"))) == len(PARTITIONS)
