"""How a table's rows become Dagster's partitions: by a column, by day, or by a hash."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime, timedelta, timezone
from pathlib import Path

import dagster as dg
import pyarrow.parquet as pq

from krea_dagster import KreaResource, build_krea_definitions
from krea_dagster.emulator import Emulator
from krea_dagster.prompts import key_from_name
from tests.dagster_bench import run_job, tick, write_table

#: What people write into a column, and file systems or shells stumble over.
CATEGORIES = ["Still life & more", "a/b", "..", "Ünïcode 🌊", "50% off?", "bucket-000"]


def definitions(
    folder: Path, prefix: str, by: str, base_url: str = "http://127.0.0.1:9"
) -> dg.Definitions:
    return build_krea_definitions(
        prompts=str(folder / "prompts.parquet"),
        partition_by=by,
        krea=KreaResource(api_key="emulator", base_url=base_url, storage=str(folder / "krea")),
        key_prefix=prefix,
    )


def write_categories(folder: Path, categories: Sequence[str]) -> None:
    prompts = [f"about {category} [emulator: refuse]" for category in categories]
    write_table(folder / "prompts.parquet", {"prompt": prompts, "category": list(categories)})


# -- column:NAME ------------------------------------------------------------------------------


def test_the_sensor_registers_the_values_of_a_column_and_later_only_the_new_ones(
    tmp_path: Path, instance: dg.DagsterInstance
) -> None:
    defs = definitions(tmp_path, "col", "column:category")
    write_categories(tmp_path, CATEGORIES)
    first = tick(defs, instance, "col_krea_prompts")
    assert sorted(instance.get_dynamic_partitions("col_krea_category")) == sorted(CATEGORIES)
    assert {event.partition for event in first.asset_events} == set(CATEGORIES)

    write_categories(tmp_path, [*CATEGORIES, "Seascape, calm"])
    second = tick(defs, instance, "col_krea_prompts", first.cursor)
    (request,) = second.dynamic_partitions_requests or []
    assert isinstance(request, dg.AddDynamicPartitionsRequest)
    assert list(request.partition_keys or []) == ["Seascape, calm"]
    assert {event.partition for event in second.asset_events} == {"Seascape, calm"}


def test_a_category_that_is_gone_is_not_reported_and_its_partition_stays(
    tmp_path: Path, instance: dg.DagsterInstance
) -> None:
    defs = definitions(tmp_path, "gone", "column:category")
    write_categories(tmp_path, ["stays", "goes"])
    first = tick(defs, instance, "gone_krea_prompts")
    write_categories(tmp_path, ["stays"])
    second = tick(defs, instance, "gone_krea_prompts", first.cursor)
    assert second.asset_events == []
    assert set(instance.get_dynamic_partitions("gone_krea_category")) == {"stays", "goes"}


def test_any_name_can_be_materialized_and_gives_a_file_that_is_told_from_all_others(
    tmp_path: Path, instance: dg.DagsterInstance, emulator: Emulator
) -> None:
    defs = definitions(tmp_path, "any", "column:category", emulator.url)
    write_categories(tmp_path, CATEGORIES)
    tick(defs, instance, "any_krea_prompts")
    keys = list(instance.get_dynamic_partitions("any_krea_category"))
    assert run_job(defs, instance, keys[0], keys[-1], job="any_krea_images").success

    files = list((tmp_path / "krea").rglob("*.parquet"))
    assert all(file.parent == tmp_path / "krea" / "manifest" / "any" for file in files)
    assert {key_from_name(file.stem) for file in files} == set(CATEGORIES)
    for file in files:
        (row,) = pq.read_table(file).to_pylist()
        assert row["partition_key"] == row["category"] == key_from_name(file.stem)
        assert f"about {row['category']} " in row["prompt"]


# -- day:NAME ---------------------------------------------------------------------------------


def test_days_are_daily_partitions_from_the_tables_first_day_to_today(
    tmp_path: Path, instance: dg.DagsterInstance, emulator: Emulator
) -> None:
    today = datetime.now(timezone.utc).date()
    days = [today - timedelta(days=2), today, today + timedelta(days=30)]
    columns = {"prompt": [f"{day} [emulator: refuse]" for day in days], "day": days}
    write_table(tmp_path / "prompts.parquet", columns)
    defs = definitions(tmp_path, "day", "day:day", emulator.url)
    partitions = defs.resolve_asset_graph().get(dg.AssetKey(["day", "images"])).partitions_def
    assert isinstance(partitions, dg.DailyPartitionsDefinition)
    keys = partitions.get_partition_keys()
    expected = [today - timedelta(days=2), today - timedelta(days=1), today]
    assert list(keys) == [day.isoformat() for day in expected]

    first, last = (day.isoformat() for day in (days[0], today))
    assert run_job(defs, instance, first, last, job="day_krea_images").success
    counts = {
        file.stem: pq.read_metadata(file).num_rows
        for file in (tmp_path / "krea" / "manifest" / "day").iterdir()
    }
    assert counts == {day.isoformat(): int(day in days) for day in expected}


def test_a_time_belongs_to_its_day_in_utc(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    late = datetime(2026, 3, 1, 23, 30, tzinfo=timezone(timedelta(hours=-5)))
    write_table(tmp_path / "prompts.parquet", {"prompt": ["late"], "at": [late]})
    defs = definitions(tmp_path, "utc", "day:at")
    outcome = tick(defs, instance, "utc_krea_prompts")
    assert {event.partition for event in outcome.asset_events} == {date(2026, 3, 2).isoformat()}


def test_definitions_load_before_there_is_a_table(tmp_path: Path) -> None:
    for number, by in enumerate(("hash:3", "column:category", "day:day")):
        defs = definitions(tmp_path, f"early{number}", by)
        dg.Definitions.validate_loadable(defs)
