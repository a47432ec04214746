"""Prompts that a dbt model makes in a DuckDB file, and their images, in one job.

``python examples/prompts_from_dbt/definitions.py``. It needs no dbt: ``dbt_models`` stands for what
``@dbt_assets`` of dagster-dbt gives, an asset ``shop/prompts`` for the model of that name, and runs
the model's SQL. The README has the lines with which dbt itself runs it.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import duckdb
import pyarrow as pa

from krea_dagster import KreaResource, build_krea_definitions

HERE = Path(__file__).parent
FOLDER = Path(os.environ.get("EXAMPLE_FOLDER", "data/examples/prompts_from_dbt")).absolute()
WAREHOUSE = FOLDER / "warehouse.duckdb"
PLACES = (
    "select * from (values ('Oslo', 'harbor'), ('Rome', 'market'), ('Oslo', 'tram')) as t(c, s)"
)


@dg.multi_asset(specs=[dg.AssetSpec(["shop", "prompts"], kinds={"dbt"})])
def dbt_models() -> Iterator[dg.MaterializeResult[None]]:
    """Stands for dbt: creates the model's table from its SQL."""
    model = (HERE / "dbt_project" / "models" / "prompts.sql").read_text(encoding="utf-8")
    with duckdb.connect(str(WAREHOUSE)) as warehouse:
        warehouse.execute("create schema if not exists main_shop")
        warehouse.execute(f"create or replace table main_shop.prompts as {model}")
    yield dg.MaterializeResult(asset_key=["shop", "prompts"])


def prompts() -> pa.Table:
    """The model's table; a function is called whenever the prompts are read."""
    with duckdb.connect(str(WAREHOUSE), read_only=True) as warehouse:
        return warehouse.sql("select * from main_shop.prompts").to_arrow_table()


images = build_krea_definitions(
    prompts=prompts,
    # dbt writes the table itself, so that the asset has no value: it is a dependency.
    deps=[dg.AssetKey(["shop", "prompts"])],
    partition_by="hash:2",
    krea=KreaResource(emulator=True, storage=str(FOLDER / "krea")),
    checks=(),
)
everything = dg.define_asset_job(
    "everything", selection=["shop/prompts", "images", "image_manifest"]
)
defs = dg.Definitions.merge(images, dg.Definitions(assets=[dbt_models], jobs=[everything]))


def fill_source(rows: str) -> None:
    """Write the table that the model reads; in a project a loader does."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with duckdb.connect(str(WAREHOUSE)) as warehouse:
        warehouse.execute(f"create or replace table places as {rows}")


def run(instance: dg.DagsterInstance) -> str:
    """Run the job for both partitions, and return the order of its steps and what it bought."""
    result = defs.resolve_job_def("everything").execute_in_process(
        instance=instance,
        tags={
            "dagster/asset_partition_range_start": "bucket-000",
            "dagster/asset_partition_range_end": "bucket-001",
        },
        run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
    )
    steps = [event.step_key for event in result.all_events if event.is_step_materialization]
    manifests = duckdb.read_parquet(str(FOLDER / "krea" / "manifest" / "*.parquet"))
    bought = manifests.filter(f"run_id = '{result.run_id}'").order("prompt").project("prompt")
    return (
        f"{' > '.join(dict.fromkeys(map(str, steps)))}: bought {[p for (p,) in bought.fetchall()]}"
    )


if __name__ == "__main__":
    with dg.DagsterInstance.ephemeral() as instance:
        fill_source(PLACES)
        print(f"first: {run(instance)}")
        print(f"the same: {run(instance)}")
        fill_source(f"{PLACES} union all select 'Rome', 'fountain'")
        print(f"one more: {run(instance)}")
