"""How a table's rows become Dagster's partitions: by a column, by day, or by a hash."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow.parquet as pq
import pytest
from sqlalchemy import Engine, event

from krea_dagster import KreaResource, build_krea_definitions
from krea_dagster.emulator import Emulator
from krea_dagster.errors import ConfigError, PromptTableError
from krea_dagster.plugin.partitions import ranges, register_partitions, without_finished
from krea_dagster.prompts import PromptTable, parse_partition_by
from tests.dagster_bench import bought, run_job, tick, write_table
from tests.prompts.reference import key_from_name, partition_version

#: What people write into a column, and file systems or shells stumble over.
CATEGORIES = ["Still life & more", "a/b", "..", "Ünïcode 🌊", "50% off?", "bucket-000"]


def definitions(
    folder: Path, prefix: str, by: str, base_url: str = "http://127.0.0.1:9"
) -> dg.Definitions:
    return build_krea_definitions(
        prompts=str(folder / "prompts.parquet"),
        partition_by=by,
        krea=KreaResource(
            api_key="emulator",
            base_url=base_url,
            expected_latency_s=0.02,
            storage=str(folder / "krea"),
        ),
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


def test_a_category_that_is_gone_is_reported_as_empty_and_its_partition_stays(
    tmp_path: Path, instance: dg.DagsterInstance
) -> None:
    defs = definitions(tmp_path, "gone", "column:category")
    write_categories(tmp_path, ["stays", "goes"])
    first = tick(defs, instance, "gone_krea_prompts")
    write_categories(tmp_path, ["stays"])
    second = tick(defs, instance, "gone_krea_prompts", first.cursor)
    assert {event.partition for event in second.asset_events} == {"goes"}
    versions = {
        (event.tags or {})["dagster/data_version"]
        for event in second.asset_events
        if isinstance(event, dg.AssetMaterialization)
    }
    assert versions == {partition_version([])}
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


# -- weeks, months, zones, and with a column -------------------------------------------


def partitions_of(defs: dg.Definitions, prefix: str) -> dg.PartitionsDefinition[str]:
    found = defs.resolve_asset_graph().get(dg.AssetKey([prefix, "images"])).partitions_def
    assert found is not None
    return found


def test_weeks_begin_on_mondays_and_months_on_their_first_day_in_their_zone(
    tmp_path: Path,
) -> None:
    sunday_night = datetime(2026, 11, 1, 23, 30, tzinfo=timezone.utc)  # Monday in Berlin
    write_table(tmp_path / "prompts.parquet", {"prompt": ["a"], "at": [sunday_night]})
    now = datetime(2026, 11, 20)  # noqa: DTZ001 - Dagster's own clock has no zone here
    for by, keys in (
        ("week:at", ["2026-10-26", "2026-11-02", "2026-11-09", "2026-11-16"]),
        ("week:at@Europe/Berlin", ["2026-11-02", "2026-11-09", "2026-11-16"]),
        ("month:at", ["2026-11-01"]),
    ):
        partitions = partitions_of(definitions(tmp_path, "time", by), "time")
        assert isinstance(partitions, dg.TimeWindowPartitionsDefinition)
        assert partitions.get_partition_keys(current_time=now) == keys
        assert partitions.timezone == ("Europe/Berlin" if "@" in by else "UTC")


def test_a_start_leaves_out_what_came_before_and_is_asked_of_times_only(tmp_path: Path) -> None:
    write_table(tmp_path / "prompts.parquet", {"prompt": ["a"], "at": [date(2020, 1, 1)]})

    def begun(by: str, start: str) -> dg.Definitions:
        return build_krea_definitions(
            prompts=str(tmp_path / "prompts.parquet"),
            partition_by=by,
            start=start,
            krea=KreaResource(api_key="emulator", storage=str(tmp_path / "krea")),
            key_prefix="begun",
        )

    partitions = partitions_of(begun("month:at", "2026-09-17"), "begun")
    assert isinstance(partitions, dg.TimeWindowPartitionsDefinition)
    assert partitions.get_first_partition_key() == "2026-09-01"
    with pytest.raises(ConfigError, match="start is 'soon'; use a day such as 2026-11-01"):
        begun("month:at", "soon")
    with pytest.raises(ConfigError, match="partitions by hash:8 have no start"):
        begun("hash:8", "2026-09-17")


def test_a_column_and_a_day_are_two_dimensions_and_each_partition_has_its_file(
    tmp_path: Path, instance: dg.DagsterInstance, emulator: Emulator
) -> None:
    today = datetime.now(timezone.utc).date()
    yesterday = today - timedelta(days=1)
    rows = [("ink", yesterday), ("ink", today), ("oil, wet", today)]
    write_multi(tmp_path, rows[:2])
    defs = definitions(tmp_path, "multi", "day:day,column:style", emulator.url)
    tick(defs, instance, "multi_krea_prompts")
    assert instance.get_dynamic_partitions("multi_krea_style") == ["ink"]
    first, last = f"ink|{yesterday}", f"ink|{today}"
    assert run_job(defs, instance, first, last, job="multi_krea_images").success
    files = sorted((tmp_path / "krea" / "manifest" / "multi").iterdir())
    assert [key_from_name(file.stem) for file in files] == [first, last]
    assert [pq.read_table(file)["style"].to_pylist() for file in files] == [["ink"], ["ink"]]
    assert len(bought(emulator, "of two dimensions")) == 2

    write_multi(tmp_path, rows)
    with pytest.raises(PromptTableError, match="'oil, wet'"):
        build_table(tmp_path).partition_keys()


def test_ranges_of_two_dimensions_stay_within_one_value_of_the_column() -> None:
    days = dg.DailyPartitionsDefinition("2026-11-01", end_date="2026-11-04")
    multi = dg.MultiPartitionsDefinition(
        {"column": dg.StaticPartitionsDefinition(["a", "b"]), "day": days}
    )
    known = list(multi.get_partition_keys())
    found = ranges(multi, known, known)
    assert found == [("a|2026-11-01", "a|2026-11-03"), ("b|2026-11-01", "b|2026-11-03")]
    assert ranges(days, ["2026-11-01", "2026-11-03"], days.get_partition_keys()) == [
        ("2026-11-01", "2026-11-01"),
        ("2026-11-03", "2026-11-03"),
    ]


@pytest.mark.parametrize(
    ("unfinished", "left"),
    [("", ""), ("a", "a"), ("ce", "cde"), ("f", "f"), ("ag", "ag"), ("abcdefg", "abcdefg")],
)
def test_finished_keys_are_cut_off_at_the_ends_of_each_range(unfinished: str, left: str) -> None:
    found = [("a", "e"), ("f", "f"), ("g", "g")]
    assert "".join(without_finished(found, "abcdefg", lambda key: key not in unfinished)) == left


def test_partitions_that_another_process_registers_at_the_same_time_are_there(
    tmp_path: Path,
) -> None:
    values = ["sea", "sky", "sun"]
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        assert instance.get_dynamic_partitions("krea_category") == []
        database = tmp_path / "history" / "runs" / "index.db"
        overtaken: list[str] = []

        def overtake(conn: Any, cursor: Any, statement: str, *_: Any) -> None:
            """Between Dagster's look and its writing."""
            if "INSERT INTO dynamic_partitions" in statement and not overtaken:
                overtaken.append("sky")
                with closing(sqlite3.connect(database)) as other, other:
                    other.execute(
                        "INSERT INTO dynamic_partitions (partitions_def_name, partition) "
                        "VALUES ('krea_category', 'sky')"
                    )

        event.listen(Engine, "before_cursor_execute", overtake)
        try:
            by = dg.DynamicPartitionsDefinition(name="krea_category")
            register_partitions(instance, by, iter(values))
        finally:
            event.remove(Engine, "before_cursor_execute", overtake)
        assert overtaken
        assert sorted(instance.get_dynamic_partitions("krea_category")) == values


def write_multi(folder: Path, rows: Sequence[tuple[str, date]]) -> None:
    columns = {
        "prompt": [f"{style} {day} of two dimensions" for style, day in rows],
        "style": [style for style, _ in rows],
        "day": [day for _, day in rows],
    }
    write_table(folder / "prompts.parquet", columns)


def build_table(folder: Path) -> PromptTable:
    by = parse_partition_by("day:day,column:style")
    return PromptTable(str(folder / "prompts.parquet"), by)


def test_definitions_load_before_there_is_a_table(tmp_path: Path) -> None:
    for number, by in enumerate(
        ("hash:3", "column:category", "day:day", "week:day,column:category")
    ):
        defs = definitions(tmp_path, f"early{number}", by)
        dg.Definitions.validate_loadable(defs)
