"""The shopping trip that many tests look at is taken once."""

from __future__ import annotations

from collections.abc import Iterator

import dagster as dg
import pyarrow as pa
import pytest

from krea_dagster import KreaResource, build_krea_definitions
from krea_dagster.emulator import Emulator
from tests.dagster_bench import OpenAccount, run_job, write_table
from tests.plugin.bought_partitions import BUCKETS, PREFIX, Trip, rows_of_the_trip


@pytest.fixture(scope="session")
def trip(
    tmp_path_factory: pytest.TempPathFactory,
    emulator: Emulator,
    instance: dg.DagsterInstance,
    open_account: OpenAccount,
) -> Iterator[Trip]:
    """Both partitions, bought in one run with a key that is given as an EnvVar."""
    folder = tmp_path_factory.mktemp("trip")
    rows, api_key = rows_of_the_trip(), open_account(100.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEY_OF_THE_TRIP", api_key)
        defs = build_krea_definitions(
            prompts=write_table(folder / "prompts.parquet", pa.Table.from_pylist(rows)),
            partition_by="hash:2",
            krea=KreaResource(
                api_key=dg.EnvVar("KEY_OF_THE_TRIP"),
                base_url=emulator.url,
                expected_latency_s=0.02,
                storage=str(folder / "krea"),
            ),
            key_prefix=PREFIX,
        )
        result = run_job(defs, instance, *BUCKETS, job=f"{PREFIX}_krea_images")
        yield Trip(rows, folder / "krea", defs, result, api_key)
