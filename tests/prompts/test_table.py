"""The prompt table: what it takes, what it refuses and how it says so, and what it reads."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from krea_dagster.errors import ConfigError, Problem, PromptTableError
from krea_dagster.models import SIZES
from krea_dagster.prompts import (
    RECOGNISED_COLUMNS,
    RESERVED_COLUMNS,
    Defaults,
    HashPartitions,
    PlannedImage,
    PromptTable,
    parse_partition_by,
    safe_name,
)
from tests.prompts.reference import (
    PromptRow,
    derived_prompt_id,
    images_of,
    key_for,
    partition_version,
    plan_images,
    read_rows,
)

Open = Callable[..., PromptTable]
Problems = Callable[..., list[Problem]]
Only = Callable[..., PromptRow]
Write = Callable[..., str]


def texts(found: list[Problem]) -> str:
    return "\n".join(map(str, found))


# -- what a row means ---------------------------------------------------------------------------


def test_a_table_with_only_prompts_takes_the_defaults(only: Only) -> None:
    row = only({"prompt": ["a red kite"]})
    assert (row.row, row.prompt, row.size, row.quality) == (1, "a red kite", "1:1", "1K")
    assert (row.seed, row.nsfw_check, row.num_images) == (None, False, 1)
    assert row.prompt_id == derived_prompt_id(
        prompt="a red kite", size="1:1", quality="1K", seed=None, nsfw_check=False
    )


def test_a_missing_cell_takes_the_tables_default(only: Only) -> None:
    defaults = Defaults(size="16:9", quality="2K", nsfw_check=True, num_images=4)
    columns: dict[str, Any] = {"prompt": ["a"], "prompt_id": ["x"]}
    columns |= {name: pa.nulls(1) for name in ("size", "quality", "nsfw_check", "num_images")}
    row = only(columns, defaults=defaults)
    assert (row.size, row.quality, row.nsfw_check, row.num_images) == ("16:9", "2K", True, 4)


def test_all_recognised_columns_are_read(only: Only) -> None:
    row = only(
        {
            "prompt": ["  kept as it is \n"],
            "prompt_id": ["x"],
            "size": ["1:2"],
            "quality": ["2K"],
            "seed": [7],
            "nsfw_check": [True],
            "num_images": [3],
        }
    )
    key = key_for(HashPartitions(4), "x")
    assert row == PromptRow(1, "x", "  kept as it is \n", "1:2", "2K", 7, True, 3, key)


TEXT_TYPES = [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())]
if int(pa.__version__.split(".")[0]) >= 26:  # older versions of Arrow do not write views
    TEXT_TYPES.append(pa.string_view())


@pytest.mark.parametrize("kind", TEXT_TYPES, ids=str)
def test_text_may_be_encoded_in_any_way(open_table: Open, kind: pa.DataType) -> None:
    def column(*values: str) -> pa.Array:
        plain = pa.array(values, pa.string())
        return plain.dictionary_encode() if pa.types.is_dictionary(kind) else plain.cast(kind)

    table = open_table(
        {
            "prompt": column("a 雪", "b"),
            "prompt_id": column("x", "y"),
            "size": column("16:9", "1:1"),
            "quality": column("2K", "1K"),
            "kind": column("k1", "k2"),
        },
        "column:kind",
    )
    rows = read_rows(table, ["k1"])
    assert [(row.prompt, row.prompt_id, row.size, row.quality) for row in rows.rows] == [
        ("a 雪", "x", "16:9", "2K")
    ]
    assert rows.passthrough.column("kind").to_pylist() == ["k1"]
    assert len(read_rows(table).rows) == 2


@pytest.mark.parametrize(
    "kind",
    [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint64(), pa.float32(),
     pa.float64(), pa.decimal128(9, 2), pa.dictionary(pa.int8(), pa.int64())],
    ids=str,
)  # fmt: skip
def test_whole_numbers_may_have_any_width_and_pandas_floats_count(
    only: Only, kind: pa.DataType
) -> None:
    if pa.types.is_dictionary(kind):
        value = pa.array([7]).dictionary_encode()
    else:
        value = pa.array([Decimal(7) if pa.types.is_decimal(kind) else 7], kind)
    row = only({"prompt": ["a"], "seed": value, "num_images": value})
    assert (row.seed, row.num_images) == (7, 7)


@pytest.mark.parametrize("nothing", [0, None, float("nan"), 0.0])
def test_0_and_missing_both_mean_that_a_seed_is_drawn(only: Only, nothing: float | None) -> None:
    assert only({"prompt": ["a"], "seed": pa.array([nothing], pa.float64())}).seed is None


@pytest.mark.parametrize("seed", [1, 1_048_576])
def test_the_ends_of_the_seed_range_are_used_as_they_are(only: Only, seed: int) -> None:
    assert only({"prompt": ["a"], "seed": [seed]}).seed == seed


def test_what_pandas_writes_is_read(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "prompt_id": ["a", "b", "c"],
            "prompt": ["one", "two", "three"],
            "seed": [5, None, 0],
            "size": [None, None, None],
            "quality": [float("nan")] * 3,
            "nsfw_check": [True, None, False],
            "num_images": [2, 1, float("nan")],
            "tag": pd.Categorical(["x", "y", "x"]),
        },
        index=[10, 11, 12],
    )
    frame.to_parquet(tmp_path / "p.parquet")
    table = PromptTable(str(tmp_path / "p.parquet"), parse_partition_by("column:tag"))
    rows = read_rows(table, ["x"])
    assert [(row.prompt_id, row.seed, row.num_images) for row in rows.rows] == [
        ("a", 5, 2),
        ("c", None, 1),
    ]
    assert [(row.size, row.quality, row.nsfw_check) for row in rows.rows] == [
        ("1:1", "1K", True),
        ("1:1", "1K", False),
    ]
    assert [row.row for row in rows.rows] == [1, 3]


def test_whole_numbers_as_prompt_ids_become_text(open_table: Open) -> None:
    rows = read_rows(open_table({"prompt": ["a", "b"], "prompt_id": [7, -12]})).rows
    assert [row.prompt_id for row in rows] == ["7", "-12"]


def test_rows_that_ask_for_the_same_thing_share_a_derived_prompt_id(open_table: Open) -> None:
    rows = read_rows(open_table({"prompt": ["a", "b", "a"]})).rows
    assert rows[0].prompt_id == rows[2].prompt_id != rows[1].prompt_id
    assert len({image.request.request_key for image in plan_images(rows)}) == 2


HOSTILE_IDS = [
    "x" * 10_000,
    "../../etc/passwd",
    "..",
    "a/b\\c",
    "\x1b[31mred",
    "雪\n",
    " ",
    "'\"`$(",
]


def test_hostile_prompt_ids_are_carried_safely(open_table: Open) -> None:
    """They never become names of files: those come from the request key."""
    table = open_table({"prompt": ["a"] * len(HOSTILE_IDS), "prompt_id": HOSTILE_IDS})
    rows = read_rows(table).rows
    assert [row.prompt_id for row in rows] == HOSTILE_IDS
    assert len({image.request.request_key for image in plan_images(rows)}) == len(HOSTILE_IDS)


def test_an_empty_table_has_no_rows_and_no_problem(open_table: Open) -> None:
    columns = {
        "prompt": pa.array([], pa.string()),
        "prompt_id": pa.array([], pa.string()),
        "day": pa.array([], pa.date32()),
    }
    assert read_rows(open_table(columns)).rows == ()
    assert len(open_table(columns).versions()) == 4
    by_day = open_table(columns, "day:day")
    assert (by_day.partition_keys(), by_day.first_time(), by_day.versions()) == ([], None, {})
    assert read_rows(by_day).passthrough.column_names == ["day"]


# -- what is wrong with a row -------------------------------------------------------------------


def test_the_eleven_sizes_are_named_where_one_is_unknown(problems: Problems) -> None:
    (problem,) = problems({"prompt": ["a"], "prompt_id": ["kite"], "size": ["7:1"]})
    assert (problem.row, problem.prompt_id) == (1, "kite")
    assert (problem.column, problem.value) == ("size", "'7:1'")
    assert len(SIZES) == 11
    assert all(size in problem.allowed for size in SIZES)


WRONG: list[tuple[str, object, object, str]] = [
    ("quality", "1K", "4K", "'4K'"),
    ("quality", "1K", "1k", "'1k'"),
    ("quality", "1K", "", "''"),
    ("size", "1:1", "1024x1024", "'1024x1024'"),
    ("size", None, 1.5, "1.5"),
    ("seed", 1, -1, "-1"),
    ("seed", 1, 1_048_577, "1048577"),
    ("seed", 1.0, 1.5, "1.5"),
    ("seed", 1.0, float("inf"), "inf"),
    ("seed", Decimal("1.00"), Decimal("2.50"), "2.50"),
    ("num_images", 1, 0, "0"),
    ("num_images", 1, 101, "101"),
    ("num_images", 1.0, 2.5, "2.5"),
    ("num_images", 1, -(2**63), "-9223372036854775808"),
    ("nsfw_check", None, 1.0, "1.0"),
    ("prompt_id", "x", "", "''"),
    ("prompt_id", "x", None, "missing"),
    ("prompt_id", "x", "a\0b", r"'a\x00b'"),
    ("prompt", "x", "", "''"),
    ("prompt", "x", " \t\n\u3000", r"' \t\n\u3000'"),
    ("prompt", "x", None, "missing"),
    ("prompt", "x", "a\0b", r"'a\x00b'"),
]


@pytest.mark.parametrize(("column", "right", "wrong", "shown"), WRONG)
def test_a_wrong_cell_is_named_with_its_row_column_value_and_what_is_allowed(
    problems: Problems, column: str, right: object, wrong: object, shown: str
) -> None:
    columns: dict[str, Any] = {"prompt": ["a", "b"], "prompt_id": ["first", "second"]}
    (problem,) = problems(columns | {column: [right, wrong]})
    assert problem.row == 2
    assert problem.column == column
    assert problem.value == shown
    assert problem.allowed
    assert str(problem).isprintable()


def test_prompt_ids_that_pandas_made_floats_are_refused_since_they_may_be_rounded(
    problems: Problems,
) -> None:
    found = problems({"prompt": ["a", "b"], "prompt_id": [7.0, None]})
    assert [(problem.row, problem.value) for problem in found] == [(1, "7.0"), (2, "missing")]


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("prompt", [1]),
        ("prompt", [["a"]]),
        ("prompt", [{"a": "b"}]),
        ("prompt", [b"a"]),
        ("prompt_id", [["a"]]),
        ("prompt_id", [True]),
        ("prompt_id", [date(2026, 11, 1)]),
        ("size", [1]),
        ("quality", [{"a": 1}]),
        ("seed", ["7"]),
        ("seed", [True]),
        ("num_images", ["2"]),
        ("num_images", [[2]]),
        ("nsfw_check", ["true"]),
        ("nsfw_check", [1]),
    ],
)
def test_a_column_of_another_type_is_one_problem_of_the_table(
    problems: Problems, column: str, values: list[object]
) -> None:
    (problem,) = problems({"prompt": ["a"]} | {column: values})
    assert (problem.row, problem.column) == (None, column)
    assert problem.value.startswith("of the type ")


def test_everything_wrong_is_said_at_once_in_row_order(problems: Problems) -> None:
    found = problems(
        {
            "prompt": ["", "a", "b", "c"],
            "prompt_id": ["w", "x", "x", None],
            "size": ["1:1", "0:0", "1:1", "9:9"],
            "seed": [-5, 1, 2, 3],
            "nsfw_check": ["yes"] * 4,
        }
    )
    assert [(problem.row, problem.column) for problem in found] == [
        (None, "nsfw_check"),
        (1, "prompt"),
        (1, "seed"),
        (2, "size"),
        (3, "prompt_id"),
        (4, "prompt_id"),
        (4, "size"),
    ]


def test_the_first_20_problems_are_named_and_all_are_counted(open_table: Open) -> None:
    rows = 20_000
    table = open_table({"prompt": ["a"] * rows, "prompt_id": range(rows), "size": ["?"] * rows})
    with pytest.raises(PromptTableError) as caught:
        read_rows(table)
    assert caught.value.count == rows
    assert [problem.row for problem in caught.value.problems] == list(range(1, 21))
    assert "… and 19980 more" in str(caught.value)


def test_a_value_is_shown_short_and_cannot_reach_the_terminal(problems: Problems) -> None:
    evil = "\x1b]0;owned\x07\u202e" + "x" * 5000
    (problem,) = problems({"prompt": ["a"], "prompt_id": [evil], "size": [evil]})
    assert len(problem.value) <= 64
    assert problem.prompt_id is not None
    assert len(problem.prompt_id) <= 64
    assert str(problem).isprintable()


def not_utf8(*values: bytes) -> pa.Array:
    """An array of strings that holds bytes which are no text, as other writers make them."""
    data = b"".join(values)
    ends = [0]
    for value in values:
        ends.append(ends[-1] + len(value))
    offsets = pa.array(ends, pa.int32()).buffers()[1]
    return pa.Array.from_buffers(pa.string(), len(values), [None, offsets, pa.py_buffer(data)])


@pytest.mark.parametrize("bad", [b"\xff\xfe", b"\xed\xa0\x80"], ids=["bytes", "lone surrogate"])
@pytest.mark.parametrize("column", ["prompt", "prompt_id"])
def test_text_that_is_not_utf8_is_named(problems: Problems, column: str, bad: bytes) -> None:
    columns = {"prompt": pa.array(["a", "b"]), "prompt_id": pa.array(["x", "y"])}
    (problem,) = problems(columns | {column: not_utf8(b"fine", bad)})
    assert (problem.row, problem.column) == (2, column)
    assert problem.value == repr(bad)
    assert "UTF-8" in problem.allowed


def test_not_utf8_in_a_column_of_choices_is_named_too(problems: Problems) -> None:
    (problem,) = problems({"prompt": ["a"], "size": not_utf8(b"\xff")})
    assert problem.column == "size"


# -- lengths ------------------------------------------------------------------------------------


def test_a_prompt_over_640_tokens_is_refused_and_one_of_640_is_not(
    problems: Problems, open_table: Open
) -> None:
    (problem,) = problems({"prompt": [("cat " * 641).strip()], "prompt_id": ["x"]})
    assert "about 641 tokens; EvoLink takes at most 640" in problem.allowed
    assert len(problem.value) <= 64
    rows = read_rows(open_table({"prompt": [("cat " * 640).strip()], "prompt_id": ["x"]}))
    assert len(rows.rows) == 1


def test_a_short_prompt_of_many_bytes_is_counted_too(problems: Problems) -> None:
    (problem,) = problems({"prompt": ["🦊" * 250]})
    assert "about 750 tokens" in problem.allowed


def test_a_prompt_over_500_tokens_is_a_warning(open_table: Open) -> None:
    prompts = [("cat " * 500).strip(), ("cat " * 501).strip()]
    rows = read_rows(open_table({"prompt": prompts, "prompt_id": ["short", "long"]}))
    (warning,) = rows.warnings
    assert (warning.row, warning.prompt_id, rows.warning_count) == (2, "long", 1)
    assert "501 tokens" in warning.allowed


def test_the_counter_and_the_limit_can_be_changed(problems: Problems, open_table: Open) -> None:
    columns = {"prompt": ["abc"]}
    (problem,) = problems(columns, count_tokens=lambda _prompt: 641)
    assert "641" in problem.allowed
    assert problems(columns, max_prompt_tokens=0)
    assert read_rows(open_table(columns, max_prompt_tokens=1, count_tokens=lambda _prompt: 1)).rows


# -- what is wrong with the columns -------------------------------------------------------------


def test_a_table_without_prompts_names_its_columns_and_the_one_that_was_meant(
    problems: Problems,
) -> None:
    (problem,) = problems({"Promt": ["a"], "seed": [1]})
    assert (problem.row, problem.column, problem.value) == (None, "prompt", "missing")
    assert "Promt, seed" in problem.allowed
    assert "is Promt meant?" in problem.allowed


def test_a_doubled_prompt_id_names_both_rows(problems: Problems) -> None:
    (problem,) = problems({"prompt": ["a", "b", "c"], "prompt_id": ["x", "y", "x"]})
    assert (problem.row, problem.prompt_id) == (3, "x")
    assert "row 1 has it too" in problem.allowed


def test_a_doubled_prompt_id_is_found_when_only_another_partition_is_read(open_table: Open) -> None:
    columns = {"prompt": ["a", "b", "c"], "prompt_id": ["x", "y", "x"], "part": ["p", "q", "r"]}
    with pytest.raises(PromptTableError, match="row 1 has it too"):
        read_rows(open_table(columns, "column:part"), ["q"])


def test_doubled_prompt_ids_are_counted_across_batches_and_files(
    write: Write, tmp_path: Path
) -> None:
    ids = [str(number) for number in range(9000)]
    write({"prompt": ["a"] * 9000, "prompt_id": ids}, "table/1.parquet")
    write({"prompt": ["a"] * 9000, "prompt_id": pa.array(range(9000))}, "table/2.parquet")
    table = PromptTable(str(tmp_path / "table"), parse_partition_by("hash:2"))
    with pytest.raises(PromptTableError) as caught:
        table.versions()
    assert caught.value.count == 9000
    first = caught.value.problems[0]
    assert (first.row, first.prompt_id) == (9001, "0")
    assert "row 1 has it too" in first.allowed


@pytest.mark.parametrize("name", RESERVED_COLUMNS)
def test_a_further_column_may_not_have_the_name_of_a_manifest_column(
    problems: Problems, name: str
) -> None:
    (problem,) = problems({"prompt": ["a"], name: ["b"]})
    assert problem.column == name
    assert "manifest" in problem.allowed


def test_reserved_and_recognised_names_do_not_meet() -> None:
    assert not set(RESERVED_COLUMNS) & set(RECOGNISED_COLUMNS)
    assert len(set(RESERVED_COLUMNS)) == len(RESERVED_COLUMNS)


def test_a_column_that_is_there_twice_is_a_problem(write: Write) -> None:
    twice = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["prompt", "tag", "tag"])
    table = PromptTable(write(twice), parse_partition_by("hash:2"))
    with pytest.raises(PromptTableError, match=r"tag is there 2 times in .*prompts\.parquet"):
        read_rows(table)


# -- further columns ----------------------------------------------------------------------------


def test_passthrough_columns_stay_with_their_rows(open_table: Open) -> None:
    columns = {
        "a.b": [1, 2, 3],
        "prompt": ["x", "y", "z"],
        "prompt_id": ["x", "y", "z"],
        "a": [{"b": 1, "c": [1]}, {"b": 2, "c": []}, None],
        "part": ["p", "q", "p"],
        "__filename": ["f", "g", "h"],
        "when": pa.array([0, 1, 2], pa.timestamp("us", "UTC")),
    }
    rows = read_rows(open_table(columns, "column:part"), ["p"])
    assert [row.prompt_id for row in rows.rows] == ["x", "z"]
    assert rows.passthrough.column_names == ["a.b", "a", "part", "__filename", "when"]
    assert rows.passthrough.select(["a.b", "a", "part"]).to_pylist() == [
        {"a.b": 1, "a": {"b": 1, "c": [1]}, "part": "p"},
        {"a.b": 3, "a": None, "part": "p"},
    ]
    assert rows.passthrough.schema.field("when").type == pa.timestamp("us", "UTC")


def test_a_column_is_found_by_its_whole_name_not_as_a_path(open_table: Open) -> None:
    columns = {"a": [{"b": 1}, {"b": 2}], "a.b": ["p", "q"], "prompt": ["x", "y"]}
    table = open_table(columns, "column:a.b")
    assert table.partition_keys() == ["p", "q"]
    assert [row.prompt for row in read_rows(table, ["q"]).rows] == ["y"]


def test_a_table_without_passthrough_columns_has_as_many_empty_rows(open_table: Open) -> None:
    rows = read_rows(open_table({"prompt": ["a", "b"], "prompt_id": ["a", "b"]}))
    assert (rows.passthrough.num_columns, rows.passthrough.num_rows) == (0, 2)


# -- partitions ---------------------------------------------------------------------------------


def test_hash_partitions_hold_every_row_once(open_table: Open) -> None:
    ids = [f"row-{number}" for number in range(200)]
    table = open_table({"prompt": ["a"] * 200, "prompt_id": ids}, "hash:4")
    parts = [read_rows(table, [key]).rows for key in table.partition_keys()]
    assert min(map(len, parts)) > 20
    assert sorted(row.row for rows in parts for row in rows) == list(range(1, 201))
    assert sorted(
        row.prompt_id for row in read_rows(table, table.partition_keys()[:2]).rows
    ) == sorted(row.prompt_id for rows in parts[:2] for row in rows)


@pytest.mark.parametrize("key", ["bucket-000", "bucket-001"])
def test_a_row_without_prompt_id_is_a_problem_of_every_hash_partition(
    open_table: Open, key: str
) -> None:
    """It may belong to any of them, and would else be passed over by each."""
    table = open_table({"prompt": ["a", "b"], "prompt_id": ["x", None]}, "hash:2")
    with pytest.raises(PromptTableError, match="row 2: prompt_id is missing"):
        read_rows(table, [key])


def test_a_wrong_row_of_another_partition_does_not_stop_this_one(open_table: Open) -> None:
    columns = {"prompt": ["a", "b"], "prompt_id": ["x", "y"], "size": ["1:1", "?"]}
    by_column = open_table(columns | {"part": ["p", "q"]}, "column:part")
    assert len(read_rows(by_column, ["p"]).rows) == 1
    by_hash = open_table(columns, "hash:100")
    assert len(read_rows(by_hash, [key_for(HashPartitions(100), "x")]).rows) == 1
    with pytest.raises(PromptTableError, match="row 2"):
        read_rows(by_hash)


def test_hash_partitions_work_without_a_prompt_id_column(open_table: Open) -> None:
    prompts = [f"cat {number}" for number in range(50)]
    table = open_table({"prompt": prompts, "note": range(50)}, "hash:4")
    parts = [read_rows(table, [key]) for key in table.partition_keys()]
    assert sorted(row.prompt for part in parts for row in part.rows) == sorted(prompts)
    for part in parts:
        assert [f"cat {note}" for note in part.passthrough.column("note").to_pylist()] == [
            row.prompt for row in part.rows
        ]


def test_the_keys_of_hash_partitions_need_no_table() -> None:
    table = PromptTable("/does/not/exist.parquet", parse_partition_by("hash:2"))
    assert table.partition_keys() == ["bucket-000", "bucket-001"]


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        (["b", "a", "b"], ["a", "b"]),
        ([10, 9, 10], ["10", "9"]),
        (pa.array([2**64 - 1, 0, 0], pa.uint64()), ["0", "18446744073709551615"]),
        ([True, False, True], ["false", "true"]),
        ([date(2026, 11, 2), date(2026, 11, 1), date(2026, 11, 2)], ["2026-11-01", "2026-11-02"]),
        (pa.array(["b", "a", "b"]).dictionary_encode(), ["a", "b"]),
    ],
)
def test_a_column_gives_its_values_as_keys_and_each_reads_its_rows(
    open_table: Open, values: Any, keys: list[str]
) -> None:
    table = open_table({"prompt": ["x", "y", "z"], "part": values}, "column:part")
    assert table.partition_keys() == keys
    found = {key: [row.row for row in read_rows(table, [key]).rows] for key in keys}
    assert sorted(row for rows in found.values() for row in rows) == [1, 2, 3]
    assert all(row.partition_key == key for key in keys for row in read_rows(table, [key]).rows)


def test_a_recognised_column_can_decide_the_partition(open_table: Open) -> None:
    table = open_table({"prompt": ["x", "y"], "quality": ["2K", "1K"]}, "column:quality")
    (row,) = read_rows(table, ["2K"]).rows
    assert (row.quality, row.partition_key) == ("2K", "2K")
    assert read_rows(table).passthrough.num_columns == 0


UTC = timezone.utc
NEW_YORK_EVENING = datetime(2026, 11, 1, 23, 30, tzinfo=timezone(timedelta(hours=-5)))


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        ([date(2026, 11, 1), date(1969, 12, 31)], ["1969-12-31", "2026-11-01"]),
        (pa.array([0, -86_400_000], pa.date64()), ["1969-12-31", "1970-01-01"]),
        (pa.array([-1, 0], pa.timestamp("ns")), ["1969-12-31", "1970-01-01"]),
        (pa.array([-1, 86_399_999_999], pa.timestamp("us")), ["1969-12-31", "1970-01-01"]),
        (
            pa.array([NEW_YORK_EVENING, NEW_YORK_EVENING - timedelta(days=1)],
                     pa.timestamp("ms", "America/New_York")),
            ["2026-11-01", "2026-11-02"],
        ),
        (["2026-11-01T23:30:00-05:00", "2026-11-01"], ["2026-11-01", "2026-11-02"]),
        (pa.array(["2026-11-01", "2026-11-02"]).dictionary_encode(), ["2026-11-01", "2026-11-02"]),
    ],
)  # fmt: skip
def test_a_day_is_that_of_a_date_a_time_or_an_iso_text_in_utc(
    open_table: Open, values: Any, keys: list[str]
) -> None:
    table = open_table({"prompt": ["x", "y"], "at": values}, "day:at")
    assert table.partition_keys() == keys
    assert table.first_time() == keys[0]
    for key in keys:
        (row,) = read_rows(table, [key]).rows
        assert row.partition_key == key
    assert len(read_rows(table, keys).rows) == 2


BERLIN_NIGHT = datetime(2026, 10, 31, 23, 30, tzinfo=UTC)  # 00:30 of November there


@pytest.mark.parametrize(
    ("by", "values", "keys"),
    [
        ("day:at@Europe/Berlin", [BERLIN_NIGHT, BERLIN_NIGHT - timedelta(hours=1)],
         ["2026-10-31", "2026-11-01"]),
        ("month:at@Europe/Berlin", [BERLIN_NIGHT, BERLIN_NIGHT - timedelta(hours=1)],
         ["2026-10-01", "2026-11-01"]),
        ("month:at", [BERLIN_NIGHT, BERLIN_NIGHT + timedelta(hours=1)],
         ["2026-10-01", "2026-11-01"]),
        ("week:at", [date(2026, 11, 2), date(2026, 11, 1)], ["2026-10-26", "2026-11-02"]),
        ("week:at@Asia/Tokyo", ["2026-11-01T15:00:00Z", "2026-11-01T14:59:59Z"],
         ["2026-10-26", "2026-11-02"]),
        ("day:at@America/New_York", pa.array([1_761_955_200, 1_762_041_600], pa.timestamp("s")),
         ["2025-11-01", "2025-11-02"]),  # without a zone: as it stands
    ],
)  # fmt: skip
def test_weeks_and_months_and_zones_decide_the_partition(
    open_table: Open, by: str, values: Any, keys: list[str]
) -> None:
    table = open_table({"prompt": ["x", "y"], "at": values}, by)
    assert table.partition_keys() == keys
    assert table.first_time() == keys[0]
    for key in keys:
        (row,) = read_rows(table, [key]).rows
        assert row.partition_key == key


def test_a_column_and_a_time_decide_the_partition_together(open_table: Open) -> None:
    table = open_table(
        {
            "prompt": ["w", "x", "y", "z"],
            "style": ["flux", "ink", "flux", "ink"],
            "at": [date(2026, 11, 2), date(2026, 11, 2), date(2026, 11, 3), date(2026, 11, 2)],
        },
        "day:at,column:style",
    )
    assert table.partition_keys() == ["flux|2026-11-02", "flux|2026-11-03", "ink|2026-11-02"]
    assert table.first_time() == "2026-11-02"
    assert [row.prompt for row in read_rows(table, ["ink|2026-11-02"]).rows] == ["x", "z"]
    assert read_rows(table, ["ink|2026-11-03"]).rows == ()
    with pytest.raises(ConfigError, match="is not a partition of"):
        read_rows(table, ["2026-11-02|ink"])


def test_each_part_of_a_multi_dimensional_key_names_its_own_column(open_table: Open) -> None:
    columns = {"prompt": ["x", "y"], "style": ["flux", "a,b"], "at": ["2026-11-02", "soon"]}
    table = open_table(columns, "day:at,column:style")
    with pytest.raises(PromptTableError) as caught:
        table.partition_keys()
    assert {problem.column for problem in caught.value.problems} == {"style", "at"}
    assert "separate lists of keys in Dagster" in str(caught.value)
    missing = open_table({"prompt": ["x"], "at": ["2026-11-02"]}, "day:at,column:style")
    with pytest.raises(PromptTableError, match="needs this column"):
        read_rows(missing)


@pytest.mark.parametrize(
    ("by", "values", "column", "shown"),
    [
        ("column:part", ["p", None], "part", "missing"),
        ("column:part", ["p", ""], "part", "''"),
        ("column:part", ["p", "a|b"], "part", "'a|b'"),
        ("column:part", ["p", "a...b"], "part", "'a...b'"),
        ("column:part", ["p", "a\nb"], "part", r"'a\nb'"),
        ("column:part", ["p", "x" * 251], "part", "'" + "x" * 59 + "…"),
        ("column:part", not_utf8(b"p", b"\xff"), "part", r"b'\xff'"),
        ("day:part", ["2026-11-01", None], "part", "missing"),
        ("day:part", ["2026-11-01", "tomorrow"], "part", "'tomorrow'"),
        ("day:part", pa.array([0, 10_000_000], pa.date32()), "part", "'29349-01-26'"),
    ],
)
def test_a_value_that_cannot_be_a_key_is_named_with_its_row(
    open_table: Open, by: str, values: Any, column: str, shown: str
) -> None:
    table = open_table({"prompt": ["x", "y"], "part": values}, by)
    for use in (table.partition_keys, table.plan, table.versions):
        with pytest.raises(PromptTableError) as caught:
            use()
        (problem,) = caught.value.problems
        assert (problem.row, problem.column, problem.value) == (2, column, shown)


@pytest.mark.parametrize(
    ("by", "values", "said"),
    [
        ("column:part", [1.5], "of the type double"),
        ("column:part", [["a"]], "of the type list"),
        ("day:part", [1], "of the type int64"),
        ("column:prat", ["a"], "is part meant?"),
        ("day:day", ["a"], "missing"),
    ],
)
def test_a_partition_column_that_cannot_serve_is_a_problem_of_the_table(
    open_table: Open, by: str, values: Any, said: str
) -> None:
    table = open_table({"prompt": ["x"], "part": values}, by)
    for use in (table.partition_keys, table.plan):
        with pytest.raises(PromptTableError, match="the table: ") as caught:
            use()
        assert said in str(caught.value)


@pytest.mark.parametrize(
    ("by", "key"),
    [("hash:4", "bucket-004"), ("hash:4", "p"), ("day:part", "monday"), ("column:part", "a|b")],
)
def test_a_key_that_the_partitioning_cannot_have_is_a_config_error(
    open_table: Open, by: str, key: str
) -> None:
    table = open_table({"prompt": ["x"], "part": ["2026-11-01"]}, by)
    with pytest.raises(ConfigError, match="is not a partition of"):
        read_rows(table, [key])


@pytest.mark.parametrize(
    ("by", "values"),
    [
        ("column:part", ["2026-11-01", "a"]),
        ("column:part", [1, 2]),
        ("column:part", [date(2026, 1, 1), date(2026, 1, 2)]),
    ],
)
@pytest.mark.parametrize("key", ["gone", "9" * 30, "2031-01-01"])
def test_a_key_without_rows_has_none(open_table: Open, by: str, values: Any, key: str) -> None:
    table = open_table({"prompt": ["x", "y"], "part": values}, by)
    assert read_rows(table, [key]).rows == ()
    assert table.versions([key]) == {key: partition_version([])}
    assert read_rows(table, []).rows == ()


def test_one_text_is_not_a_list_of_keys(open_table: Open) -> None:
    with pytest.raises(TypeError, match="not one text"):
        read_rows(open_table({"prompt": ["x"]}), "bucket-000")


def test_the_first_time_is_asked_of_times_only(open_table: Open) -> None:
    with pytest.raises(ConfigError, match="no first day"):
        open_table({"prompt": ["x"]}).first_time()


# -- versions -----------------------------------------------------------------------------------


def by_partition(images: list[PlannedImage]) -> dict[str, list[PlannedImage]]:
    return {
        key: [image for image in images if image.partition_key == key]
        for key in {image.partition_key for image in images}
    }


def test_a_version_is_that_of_the_partitions_request_keys(open_table: Open) -> None:
    columns = {
        "prompt": ["x", "y", "z"],
        "prompt_id": ["x", "y", "z"],
        "part": ["p", "q", "p"],
        "num_images": [2, 1, 1],
    }
    table = open_table(columns, "column:part")
    expected = {
        key: partition_version(image.request.request_key for image in images)
        for key, images in by_partition(images_of(table)).items()
    }
    assert table.versions() == expected
    assert table.versions(["q"]) == {"q": expected["q"]}
    assert table.versions(attempts={("y", 0): 1})["p"] == expected["p"]
    assert table.versions(attempts={("y", 0): 1})["q"] != expected["q"]


def test_every_hash_partition_has_a_version_even_without_rows(open_table: Open) -> None:
    versions = open_table({"prompt": ["x"], "prompt_id": ["x"]}, "hash:3").versions()
    assert list(versions) == ["bucket-000", "bucket-001", "bucket-002"]
    assert len(set(versions.values())) == 2


TABLES = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": st.sampled_from(["a kite", "雪", "a|b", "x" * 99]),
            "size": st.sampled_from([None, "1:1", "16:9"]),
            "seed": st.sampled_from([None, 0, 1, 1_048_576]),
            "num_images": st.sampled_from([None, 1, 3]),
        }
    ),
    min_size=1,
    max_size=8,
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(TABLES, st.booleans(), st.randoms(use_true_random=False))
def test_order_partitioning_files_and_further_columns_change_no_request(
    tmp_path: Path, rows: list[dict[str, Any]], with_ids: bool, chance: random.Random
) -> None:
    if with_ids:
        rows = [row | {"prompt_id": f"id-{number}"} for number, row in enumerate(rows)]

    def requests(source: Path, by: str) -> list[tuple[str, int, str]]:
        read = read_rows(PromptTable(str(source), parse_partition_by(by))).rows
        return sorted(
            (image.prompt_id, image.sample, image.request.request_key)
            for image in plan_images(read)
        )

    kinds = {
        "prompt": pa.string(),
        "size": pa.string(),
        "seed": pa.int64(),
        "num_images": pa.int32(),
        "prompt_id": pa.string(),
    }
    columns = {name: kinds[name] for name in rows[0]}
    before = tmp_path / "before.parquet"
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(columns.items())), before)
    shuffled = [
        row | {"part": str(number % 3), "note": chance.random()}
        for number, row in enumerate(chance.sample(rows, len(rows)))
    ]
    wider = pa.schema([*columns.items(), ("part", pa.string()), ("note", pa.float64())])
    after = tmp_path / "after"
    after.mkdir(exist_ok=True)
    half = len(rows) // 2
    for name, some in (("1", shuffled[:half]), ("2", shuffled[half:])):
        pq.write_table(pa.Table.from_pylist(some, wider), after / f"{name}.parquet")
    assert requests(before, "hash:3") == requests(after, "column:part")
    assert requests(before, "hash:3") == requests(after, "hash:7")


# -- what is read -------------------------------------------------------------------------------


def spoil(path: str, group: int, column: str) -> None:
    """Overwrite the data of one column in one row group, and leave the rest as it is."""
    group_data = pq.read_metadata(path).row_group(group)
    (chunk,) = [
        group_data.column(index)
        for index in range(group_data.num_columns)
        if group_data.column(index).path_in_schema == column
    ]
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray(Path(path).read_bytes())
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    Path(path).write_bytes(data)


PARTED = {
    "prompt_id": [f"r{number}" for number in range(30)],
    "prompt": [f"cat {number}" for number in range(30)],
    "note": [f"note {number}" for number in range(30)],
}
DAYS = [date(2026, 11, 1 + number // 10) for number in range(30)]
PUSHED: list[tuple[str, Any, str]] = [
    ("column:part", [f"p{number // 10}" for number in range(30)], "p1"),
    ("column:part", [number // 10 for number in range(30)], "1"),
    ("column:part", DAYS, "2026-11-02"),
    ("day:part", DAYS, "2026-11-02"),
    ("day:part", pa.array(DAYS, pa.date64()), "2026-11-02"),
    ("day:part", pa.array(DAYS).cast(pa.timestamp("ns")), "2026-11-02"),
    (
        "day:part",
        pa.array(DAYS).cast(pa.timestamp("us")).cast(pa.timestamp("us", "UTC")),
        "2026-11-02",
    ),
]


@pytest.mark.parametrize(("by", "values", "key"), PUSHED)
def test_only_the_row_groups_of_a_partition_are_read(
    write: Write, by: str, values: Any, key: str
) -> None:
    """Proved by spoiling the prompts of the other row groups."""
    path = write(PARTED | {"part": values}, row_group_size=10)
    table = PromptTable(path, parse_partition_by(by))
    for group in (0, 2):
        spoil(path, group, "prompt")
    rows = read_rows(table, [key])
    assert [row.prompt for row in rows.rows] == [f"cat {number}" for number in range(10, 20)]
    assert [row.row for row in rows.rows] == list(range(11, 21))
    assert rows.passthrough.column("note").to_pylist()[0] == "note 10"
    with pytest.raises(ConfigError, match=r"prompts\.parquet cannot be read"):
        read_rows(table)


def test_iso_texts_are_pushed_down_with_room_for_their_zones(write: Write) -> None:
    days = [f"2026-11-{1 + number:02d}T23:30:00-05:00" for number in range(30)]
    path = write(PARTED | {"part": days}, row_group_size=1)
    for group in (0, 1, 2, 20, 29):
        spoil(path, group, "prompt")
    (row,) = read_rows(PromptTable(path, parse_partition_by("day:part")), ["2026-11-11"]).rows
    assert row.row == 10


def test_many_keys_are_pushed_down_as_a_range(write: Write) -> None:
    """A day is 1 + its row; the wanted ones are every other of the rows 21 to 219."""
    first = date(2026, 1, 1)
    days = [first + timedelta(days=number) for number in range(300)]
    ids = [f"r{number}" for number in range(300)]
    columns = {"prompt_id": ids, "prompt": ["a"] * 300, "part": days}
    path = write(columns, row_group_size=2)
    for group in (0, 9, 110, 149):
        spoil(path, group, "prompt")
    wanted = [str(day) for day in days[20:220:2]]
    for by in ("day:part", "column:part"):
        rows = read_rows(PromptTable(path, parse_partition_by(by)), wanted).rows
        assert [row.row for row in rows] == list(range(21, 221, 2))


def test_only_the_columns_that_are_needed_are_read(write: Write) -> None:
    path = write(PARTED | {"part": ["p"] * 30})
    table = PromptTable(path, parse_partition_by("column:part"))
    spoil(path, 0, "note")
    assert table.versions()
    spoil(path, 0, "prompt")
    spoil(path, 0, "prompt_id")
    assert table.partition_keys() == ["p"]
    with pytest.raises(ConfigError):
        table.versions()


def test_the_row_of_a_problem_is_its_row_in_the_whole_table(write: Write, tmp_path: Path) -> None:
    sizes = ["1:1"] * 29 + ["?"]
    columns = PARTED | {
        "prompt_id": [f"s{number}" for number in range(30)],
        "part": ["p"] * 15 + ["q"] * 15,
    }
    write(PARTED | {"part": ["p"] * 30, "size": ["1:1"] * 30}, "t/a.parquet", row_group_size=4)
    write(columns | {"size": sizes}, "t/b.parquet", row_group_size=4)
    table = PromptTable(str(tmp_path / "t"), parse_partition_by("column:part"))
    with pytest.raises(PromptTableError) as caught:
        read_rows(table, ["q"])
    (problem,) = caught.value.problems
    assert (problem.row, problem.prompt_id) == (60, "s29")
    assert len(read_rows(table, ["p"]).rows) == 45


def test_a_large_row_group_streams_by_in_bounded_memory(write: Write) -> None:
    """60 MB of prompts and notes in one row group, of which Arrow holds a few MB at once."""
    rows = 40_000
    chance = random.Random(1)
    path = write(
        {
            "prompt_id": [f"row-{number}" for number in range(rows)],
            "prompt": [chance.randbytes(250).hex() for _ in range(rows)],
            "note": [chance.randbytes(500).hex() for _ in range(rows)],
        },
        row_group_size=rows,
        use_dictionary=False,
    )
    assert pq.read_metadata(path).num_row_groups == 1
    before = pa.total_allocated_bytes()
    peak = 0

    def count(_prompt: str) -> int:
        nonlocal peak
        peak = max(peak, pa.total_allocated_bytes() - before)
        return 1

    table = PromptTable(path, parse_partition_by("hash:8"), count_tokens=count)
    assert len(table.versions()) == 8
    assert 0 < peak < 20_000_000
    rows_read = read_rows(table, ["bucket-000"])
    assert 0 < len(rows_read.rows) < rows / 4
    assert peak < 25_000_000


# -- keys as names ------------------------------------------------------------------------------


def test_the_keys_of_a_table_become_names_of_files(open_table: Open, tmp_path: Path) -> None:
    values = ["Food & Drink", "..", "a/b", "雪" * 100, "."]
    table = open_table({"prompt": ["x"] * 5, "part": values}, "column:part")
    for key in table.partition_keys():
        (tmp_path / f"{safe_name(key)}.made").write_text(key)
    assert sorted(path.read_text() for path in tmp_path.glob("*.made")) == sorted(values)
