"""Selections: conditions on any column, search and order."""

from __future__ import annotations

import json
from datetime import date, datetime, time, timezone
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from krea_dagster.curation.review.selection import ReviewSelection, empty_code, rows_of
from krea_dagster.engine.journal.verdict_log import VERDICTS
from krea_dagster.errors import InputError

TABLE = pa.table(
    {
        "prompt_id": ["a", "b", "c", "d"],
        "prompt": ["A red fox", "A blue whale", "The Red sea", "100% fox' OR 1=1 --"],
        "status": ["stored", "stored", "failed", "stored"],
        "seed": pa.array([7, 5, 5, None], pa.int32()),
        "sharpness": [0.5, float("nan"), None, 2.5],
        "earlier": [False, False, True, False],
        "stored_at": pa.array(
            [datetime(2026, 1, day, tzinfo=timezone.utc) for day in (1, 2, 3, 4)],
            pa.timestamp("us", tz="UTC"),
        ),
        "tags": [["x"], ["y", "z"], None, ["x"]],
        "big": pa.array([2**60 + 1, 2**60 + 2, 3, None], pa.uint64()),
        "day": pa.array([date(2026, 1, day) for day in (1, 2, 3, 4)], pa.date32()),
        "hour": pa.array([time(1), time(2), None, time(4)], pa.time64("us")),
    }
)
NO_VERDICTS = np.full(4, empty_code(), np.int8)


def found(codes: Any = NO_VERDICTS, **selection: Any) -> str:
    """Return the ids of the selected prompts, joined."""
    rows = rows_of(TABLE, ReviewSelection.parse(json.dumps(selection)), codes)
    return "".join(TABLE["prompt_id"].take(rows).to_pylist())


def test_no_selection_shows_everything_in_the_table_s_order() -> None:
    assert found() == "abcd"
    assert found(down=True) == "dcba"
    assert rows_of(TABLE, ReviewSelection.parse(""), NO_VERDICTS).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("condition", "shown"),
    [
        (["status", "is", "stored"], "abd"),
        (["status", "is", "stored", "failed"], "abcd"),
        (["status", "is not", "stored"], "c"),
        (["prompt", "contains", "RED"], "ac"),
        (["prompt", "contains", "fox' OR 1=1 --"], "d"),
        (["prompt", "contains", "%"], "d"),
        (["tags", "has", "x"], "ad"),
        (["tags", "has", "z", "x"], "abd"),
        (["tags", "has not", "x"], "bc"),
        (["seed", "is", "5"], "bc"),
        (["seed", "is not", "5"], "ad"),
        (["seed", "at least", "5.5"], "a"),
        (["seed", "at most", "5"], "bc"),
        (["seed", "is empty"], "d"),
        (["sharpness", "at least", "0.5"], "ad"),
        (["sharpness", "is empty"], "bc"),
        (["sharpness", "is not empty"], "ad"),
        (["big", "is", str(2**60 + 1)], "a"),
        (["big", "at least", str(2**60 + 2)], "b"),
        (["big", "at least", "3.5"], "ab"),
        (["big", "is not", "-1"], "abcd"),
        (["day", "at least", "2026-01-03T00:00"], "cd"),
        (["hour", "contains", "01:00"], "a"),
        (["earlier", "is", "true"], "c"),
        (["earlier", "is", "false"], "abd"),
        (["stored_at", "at least", "2026-01-03T00:00"], "cd"),
        (["stored_at", "at most", "2026-01-01"], "a"),
        (["tags", "contains", "z"], "b"),
        (["tags", "is not empty"], "abd"),
    ],
)
def test_a_condition_holds_for_any_kind_of_column(condition: list[str], shown: str) -> None:
    assert found(where=[condition]) == shown


def test_all_conditions_and_all_words_of_the_search_must_be_met() -> None:
    assert found(search="fox red") == "a"
    assert found(search="fox", where=[["seed", "is empty"]]) == "d"
    assert found(search="B") == "b", "an id is found as well"


def test_verdicts_select_rows_and_none_those_without_one() -> None:
    codes = np.array([VERDICTS.index(one) for one in ("keep", "none", "reject", "flag")], np.int8)
    assert found(codes, verdicts=["keep", "flag"]) == "ad"
    assert found(codes, verdicts=["none"]) == "b"
    assert found(codes, verdicts=[]) == found(codes, verdicts=list(VERDICTS)) == "abcd"


def test_equal_values_stay_in_order_and_empty_ones_come_last() -> None:
    assert found(sort="seed") == "bcad"
    assert found(sort="seed", down=True) == "abcd"
    assert found(sort="sharpness")[:2] == "ad"
    assert found(sort="tags") == "adbc"
    assert found(sort="earlier", down=True) == "cabd"


@pytest.mark.parametrize(
    ("selection", "said"),
    [
        ('{"where": [["nothing", "is", "1"]]}', "unknown column 'nothing'"),
        ('{"sort": "seed; drop table"}', "unknown column 'seed; drop table'"),
        ('{"where": [["seed", "contains", "1"]]}', "does not support 'contains'"),
        ('{"where": [["seed", "is", "many"]]}', "seed: 'many' is not a value of type"),
        ('{"where": [["earlier", "is", "perhaps"]]}', "earlier: 'perhaps'"),
        ('{"where": [["stored_at", "at least", "soon"]]}', "stored_at: 'soon'"),
        ('{"where": [["seed", "is"]]}', "the value is missing"),
        ('{"where": [["seed"]]}', "invalid filter"),
        ('{"verdicts": ["maybe"]}', "unknown verdict"),
        ("[1]", "invalid filter"),
        ("{", "invalid filter"),
        ("[" * 5000, "invalid filter"),
        ('"' + "x" * 30_000 + '"', "too long"),
    ],
)
def test_an_invalid_selection_is_rejected_with_the_reason(selection: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        rows_of(TABLE, ReviewSelection.parse(selection), NO_VERDICTS)
