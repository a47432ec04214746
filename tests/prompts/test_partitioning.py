"""Partition keys: how they are chosen, which are refused, and how they become file names."""

from __future__ import annotations

from datetime import date
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from krea_dagster.errors import ConfigError
from krea_dagster.prompts import (
    ColumnPartitions,
    HashPartitions,
    MultiPartitions,
    PartitionBy,
    TimePartitions,
    parse_partition_by,
    safe_name,
)
from krea_dagster.prompts.partitioning import Unit, day_of_text, key_problem, parse_day
from tests.prompts.reference import key_for, key_from_name

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("hash:8", HashPartitions(8)),
        (" hash:10000\n", HashPartitions(10_000)),
        ("column:category", ColumnPartitions("category")),
        ("column:a:b c", ColumnPartitions("a:b c")),
        ("day:made_at", TimePartitions("day", "made_at")),
        ("week:made_at", TimePartitions("week", "made_at")),
        ("month:a@b:c@Europe/Berlin", TimePartitions("month", "a@b:c", "Europe/Berlin")),
        (
            "day:made_at@Asia/Tokyo,column:a,b",
            MultiPartitions(
                TimePartitions("day", "made_at", "Asia/Tokyo"), ColumnPartitions("a,b")
            ),
        ),
    ],
)
def test_the_kinds_are_read_and_written(text: str, meant: PartitionBy) -> None:
    assert parse_partition_by(text) == meant
    assert str(meant) == text.strip()


@pytest.mark.parametrize(
    "text",
    ["", "hash", "hash:", "hash:0", "hash:10001", "hash:-1", "hash:8.0", "hash:٨", "hash:1_0",
     "column:", "day:", "Column:a", "range:a", "category", "hash:" + "9" * 5000,
     "day:@UTC", "day:,column:a", "day:a,column:", "year:a"],
)  # fmt: skip
def test_nonsense_is_a_config_error_that_says_what_is_allowed(text: str) -> None:
    with pytest.raises(ConfigError, match=r"partition_by is .*must be hash:N"):
        parse_partition_by(text)


@pytest.mark.parametrize("zone", ["Berlin", "", "europe/berlin", "UTC+1"])
def test_an_unknown_zone_is_named(zone: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown time zone {zone!r}".replace("+", r"\+")):
        parse_partition_by(f"day:made_at@{zone}")


@pytest.mark.parametrize(
    ("unit", "day", "key", "last"),
    [
        ("day", "2026-11-04", "2026-11-04", "2026-11-04"),
        ("week", "2026-11-04", "2026-11-02", "2026-11-08"),  # a Wednesday; weeks begin on Mondays
        ("week", "2026-11-08", "2026-11-02", "2026-11-08"),
        ("week", "0001-01-01", "0001-01-01", "0001-01-07"),
        ("week", "9999-12-31", "9999-12-27", "9999-12-31"),
        ("month", "2028-02-29", "2028-02-01", "2028-02-29"),
        ("month", "2026-12-31", "2026-12-01", "2026-12-31"),
    ],
)
def test_the_key_of_a_time_is_the_first_day_of_its_unit(
    unit: Unit, day: str, key: str, last: str
) -> None:
    by = TimePartitions(unit, "at")
    assert by.key_of(date.fromisoformat(day)) == key
    assert by.last_day(key) == date.fromisoformat(last)
    assert by.has_key(key)
    assert by.has_key(day) is (day == key)


def test_the_key_of_a_column_and_a_time_is_as_dagster_writes_it() -> None:
    by = parse_partition_by("week:at,column:model")
    assert by.has_key("flux|2026-11-02")
    for wrong in ("flux|2026-11-03", "2026-11-02|flux", "flux", "|2026-11-02", "a|b|2026-11-02"):
        assert not by.has_key(wrong), wrong
    assert not by.has_key("a,b|2026-11-02"), "a comma parts lists of keys in Dagster"


def test_the_bucket_is_the_pinned_hash_of_the_prompt_id() -> None:
    """Made with libstdc++'s ``_Hash_bytes``. A change would move paid images elsewhere."""
    assert key_for(HashPartitions(8), "harbor-dawn-01") == "bucket-004"
    assert key_for(HashPartitions(10_000), "harbor-dawn-01") == "bucket-9372"


def test_the_keys_of_hash_partitions_are_known_sorted_and_of_one_width() -> None:
    assert HashPartitions(3).keys() == ["bucket-000", "bucket-001", "bucket-002"]
    for count in (1, 999, 1000, 1001, 10_000):
        keys = HashPartitions(count).keys()
        assert len(keys) == count
        assert keys == sorted(keys)
        assert len({len(key) for key in keys}) == 1
    assert HashPartitions(1001).keys()[-1] == "bucket-1000"


@given(TEXTS, st.integers(1, 10_000))
def test_every_prompt_id_has_a_bucket_among_the_keys(prompt_id: str, count: int) -> None:
    by = HashPartitions(count)
    key = key_for(by, prompt_id)
    assert 0 <= int(key.removeprefix("bucket-")) < count
    assert len(key) == len(by.keys()[0])


@pytest.mark.parametrize(
    "key",
    ["", "...", "a...c", "a\nb", "a\rb", "a\tb", "a|b", "a\x1b[31m", "a\0", "a\u2028b", " a",
     "a ", "x" * 251, "\x7f", "a\u0085b", "\ud800"],
)  # fmt: skip
def test_a_key_that_dagster_would_mangle_has_a_reason(key: str) -> None:
    assert key_problem(key)


@pytest.mark.parametrize("key", ["a", "Food & Drink", "a/b", "..", "雪", "x" * 250, "a,b", "[1]"])
def test_an_odd_but_harmless_key_is_let_through(key: str) -> None:
    assert key_problem(key) is None


def test_a_usual_key_is_percent_quoted() -> None:
    assert safe_name("Food & Drink") == "Food%20%26%20Drink"
    assert safe_name("2026-11-02") == "2026-11-02"
    assert safe_name("a/b") == "a%2Fb"


@pytest.mark.parametrize(
    ("key", "name"), [(".", "%2E"), ("..", "%2E."), (".hidden", "%2Ehidden"), ("_a", "%5Fa")]
)
def test_a_name_is_not_a_directory_and_not_hidden_from_readers_of_folders(
    key: str, name: str
) -> None:
    assert safe_name(key) == name


@given(TEXTS)
def test_a_name_fits_a_file_system_and_gives_the_key_back_unless_it_was_cut(key: str) -> None:
    name = safe_name(key)
    assert name.isascii()
    assert len(name) <= 200
    assert not set(name) & set('/\\:*?"<>|\0 ')
    assert name not in {".", ".."}
    if len(quote(key, safe="")) < 190:
        assert key_from_name(name) == key
    assert key_from_name(name) in {key, None}


def test_long_keys_keep_names_of_their_own() -> None:
    long = "雪" * 250
    assert len(safe_name(long)) == 200
    assert safe_name(long) != safe_name(long + "a")
    assert key_from_name(safe_name(long)) is None
    assert safe_name(safe_name(long)) != safe_name(long)


@pytest.mark.parametrize(
    ("text", "day"),
    [
        ("2026-11-01", "2026-11-01"),
        ("2026-11-01T23:59:59", "2026-11-01"),
        ("2026-11-01 23:59", "2026-11-01"),
        ("2026-11-01T23:30:00.123456789Z", "2026-11-01"),
        ("2026-11-01T23:30:00-05:00", "2026-11-02"),
        ("2026-11-01T00:30:00+01:00", "2026-10-31"),
        ("2026-11-01T00:30+0100", "2026-10-31"),
        ("2026-11-01T00:30:00+01", "2026-10-31"),
        ("2024-02-29", "2024-02-29"),
        ("2023-02-29", None),
        ("2026-11-01T24:00:00", None),
        ("2026-11-01T12:60", None),
        ("2026-11", None),
        ("01.11.2026", None),
        ("20261101", None),
        (" 2026-11-01", None),
        ("2026-11-01x", None),
        ("٢٠٢٦-11-01", None),
        ("9999-12-31T23:00:00-05:00", None),
        ("", None),
    ],
)
def test_the_day_of_an_iso_text_is_that_in_utc(text: str, day: str | None) -> None:
    assert day_of_text(text) == day


@pytest.mark.parametrize(
    ("text", "day"),
    [
        ("2026-11-01T23:30:00Z", "2026-11-02"),
        ("2026-07-01T22:30:00+00:00", "2026-07-02"),
        ("2026-11-01T23:30:00+02:00", "2026-11-01"),
        ("2026-11-01T23:30:00", "2026-11-01"),
        ("2026-11-01", "2026-11-01"),
        ("9999-12-31T23:30:00Z", None),
    ],
)
def test_the_day_of_an_iso_text_with_a_zone_is_that_in_the_partitions_zone(
    text: str, day: str | None
) -> None:
    assert day_of_text(text, "Europe/Berlin") == day


def test_a_day_key_is_one_way_to_write_a_day() -> None:
    assert str(parse_day("2026-11-01")) == "2026-11-01"
    assert parse_day("2026-11-01T00:00") is None
    assert parse_day("monday") is None
