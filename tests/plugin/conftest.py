"""The run that many tests read is made once."""

from __future__ import annotations

from collections.abc import Iterator

import dagster as dg
import pyarrow as pa
import pytest

from krea_dagster import KreaResource, build_krea_definitions
from krea_dagster.emulator import Emulator
from tests.dagster_bench import OpenAccount, run_job, write_table
from tests.plugin.bought_run import BUCKETS, PREFIX, BoughtRun, rows_of_the_run


@pytest.fixture(scope="session")
def bought_run(
    tmp_path_factory: pytest.TempPathFactory,
    emulator: Emulator,
    instance_on_disk: dg.DagsterInstance,
    open_account: OpenAccount,
) -> Iterator[BoughtRun]:
    """Both partitions, bought in one run with a key that is given as an EnvVar."""
    folder = tmp_path_factory.mktemp("shared")
    rows, api_key = rows_of_the_run(), open_account(100.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEY_OF_THE_RUN", api_key)
        defs = build_krea_definitions(
            prompts=write_table(folder / "prompts.parquet", pa.Table.from_pylist(rows)),
            partition_by="hash:2",
            krea=KreaResource(
                api_key=dg.EnvVar("KEY_OF_THE_RUN"),
                base_url=emulator.url,
                expected_latency_s=0.02,
                storage=str(folder / "krea"),
            ),
            key_prefix=PREFIX,
        )
        result = run_job(defs, instance_on_disk, *BUCKETS, job=f"{PREFIX}_krea_images")
        yield BoughtRun(rows, folder / "krea", defs, result, api_key)
