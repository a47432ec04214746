"""The rules of acceptance, and the choice where more are accepted than wanted."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from krea_dagster.curation.accepted.rules import (
    Evidence,
    Range,
    Rules,
    judge,
    limit_to_wanted,
    redundant_rows,
    row_names,
    verdict_table,
    verdict_version,
)
from krea_dagster.engine.journal.verdict_log import Verdict
from krea_dagster.errors import ConfigError

NOBODY = verdict_table([])


def sha(name: str) -> str:
    return (name.encode().hex() + "0" * 64)[:64]


def rows(*names: str, status: str | None = "stored", sample: int = 0) -> pa.Table:
    return pa.table(
        {
            "prompt_id": [f"p-{name}" for name in names],
            "sample": pa.array([sample] * len(names), pa.int32()),
            "request_key": [f"k-{name}" for name in names],
            "status": pa.array([status] * len(names), pa.string()),
            "image_sha256": pa.array(
                [sha(name) if status == "stored" else None for name in names], pa.string()
            ),
        }
    )


def said(**verdicts: str) -> pa.Table:
    """Return the verdicts of one reviewer on images with these names."""
    at = datetime(2026, 11, 22, tzinfo=timezone.utc)
    return verdict_table(
        Verdict(f"id-{name}", sha(name), verdict, "ann", f"k-{name}", f"p-{name}", 0, 0, "b", at=at)
        for name, verdict in verdicts.items()
    )


def reasons(table: pa.Table, rules: Rules, evidence: Evidence) -> list[str]:
    found: list[str] = judge(table, rules, evidence).to_pylist()
    return found


def test_without_a_review_every_stored_image_is_accepted() -> None:
    assert reasons(rows("a", "b"), Rules(), Evidence(NOBODY)) == ["accepted", "accepted"]


@pytest.mark.parametrize("status", ["planned", "failed", "unknown", "completed", None])
def test_a_row_that_is_not_stored_is_not_accepted(status: str | None) -> None:
    assert reasons(rows("a", status=status), Rules(), Evidence(NOBODY)) == ["not stored"]


def test_a_stored_row_without_a_hash_is_not_accepted() -> None:
    table = rows("a")
    table = table.set_column(4, "image_sha256", pa.nulls(1, pa.string()))
    assert reasons(table, Rules(), Evidence(NOBODY)) == ["not stored"]


def test_a_rejected_image_is_out_and_a_flagged_one_waits() -> None:
    verdicts = said(a="keep", b="reject", c="flag")
    found = reasons(rows("a", "b", "c", "d"), Rules(), Evidence(verdicts))
    assert found == ["accepted", "rejected", "flagged", "accepted"]


def test_with_require_keep_an_image_without_a_verdict_waits() -> None:
    verdicts = said(a="keep", b="reject", c="flag")
    found = reasons(rows("a", "b", "c", "d"), Rules(require_keep=True), Evidence(verdicts))
    assert found == ["accepted", "rejected", "flagged", "not reviewed"]


def test_a_keep_does_not_override_a_range() -> None:
    measures = pa.table(
        {"image_sha256": [sha("a"), sha("b"), sha("d")], "sharpness": [120.0, 10.0, None]}
    )
    rules = Rules.parse(["sharpness>=50"])
    found = reasons(rows("a", "b", "c", "d"), rules, Evidence(said(b="keep"), measures))
    assert found == ["accepted", "sharpness>=50", "not measured", "not measured"]


def test_a_failed_range_takes_precedence_over_a_missing_measure() -> None:
    measures = pa.table({"image_sha256": [sha("a")], "sharpness": [1.0], "own": [float("nan")]})
    rules = Rules.parse(["own>0.5", "sharpness>=50"])
    assert reasons(rows("a"), rules, Evidence(NOBODY, measures)) == ["sharpness>=50"]


@pytest.mark.parametrize(
    ("text", "operator", "bound"),
    [
        ("sharpness>=120", ">=", 120.0),
        (" own score <= 0.5 ", "<=", 0.5),
        ("entropy>1e-3", ">", 0.001),
        ("border_share<0.1", "<", 0.1),
    ],
)
def test_a_range_is_parsed(text: str, operator: str, bound: float) -> None:
    found = Range.parse(text)
    assert (found.operator, found.bound) == (operator, bound)
    assert Range.parse(str(found)) == found


@pytest.mark.parametrize(
    "text", ["", "sharpness", "sharpness=1", ">=1", "a>=b", "a>=nan", "a>=inf"]
)
def test_an_invalid_range_is_rejected_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="write MEASURE>=NUMBER"):
        Range.parse(text)


# -- near-duplicates -------------------------------------------------------------------------


def clusters(*members: tuple[str, str, bool, int]) -> pa.Table:
    """Return rows of near_duplicates: image, cluster, keep, distance."""
    names = [name for name, *_ in members]
    return pa.table(
        {
            **dict(zip(rows().column_names, rows(*names).columns, strict=True)),
            "cluster": [cluster for _, cluster, _, _ in members],
            "keep": [keep for _, _, keep, _ in members],
            "distance": pa.array([distance for *_, distance in members], pa.int32()),
        }
    )


ALIKE = clusters(
    ("a", "1", True, 0), ("b", "1", False, 9), ("c", "1", False, 3), ("d", "2", True, 0)
)


def duplicates(verdicts: pa.Table, **rules: Any) -> list[str]:
    spare = redundant_rows(ALIKE, verdicts, **rules)
    table = rows("a", "b", "c", "d", "e")
    return reasons(table, Rules(one_of_duplicates=True, **rules), Evidence(verdicts, None, spare))


def test_of_similar_images_the_one_to_keep_is_accepted() -> None:
    assert duplicates(NOBODY) == ["accepted", "duplicate", "duplicate", "accepted", "accepted"]


def test_where_the_one_to_keep_is_rejected_the_nearest_to_it_takes_its_place() -> None:
    assert duplicates(said(a="reject")) == [
        "rejected", "duplicate", "accepted", "accepted", "accepted",
    ]  # fmt: skip


def test_with_require_keep_the_kept_image_of_a_cluster_is_accepted() -> None:
    found = duplicates(said(b="keep", d="keep"), require_keep=True)
    assert found == ["duplicate", "accepted", "duplicate", "accepted", "not reviewed"]


def test_a_cluster_with_only_rejected_images_has_no_accepted_one() -> None:
    found = duplicates(said(a="reject", b="reject", c="reject"))
    assert found[:3] == ["rejected"] * 3


# -- as many as are wanted --------------------------------------------------------------------


def taken(table: pa.Table, groups: list[int], wanted: list[int], kept: list[bool]) -> list[str]:
    fine = pa.array(["accepted"] * table.num_rows)
    found = limit_to_wanted(fine, table, np.array(groups), np.array(wanted), kept=pa.array(kept))
    return [str(one) for one in found.to_pylist()]


def test_more_than_wanted_are_taken_by_keep_then_sample_then_prompt() -> None:
    table = pa.concat_tables([rows("b", sample=0), rows("a", sample=1), rows("c", sample=2)])
    assert taken(table, [0, 0, 0], [2], [False, False, True]) == [
        "accepted", "more than wanted", "accepted",
    ]  # fmt: skip
    same_sample = rows("z", "b", "a")
    assert taken(same_sample, [0, 0, 0], [2], [False] * 3) == [
        "more than wanted", "accepted", "accepted",
    ]  # fmt: skip


def test_the_choice_does_not_depend_on_the_order_of_rows() -> None:
    table = rows(*"abcdefgh")
    kept = [name in "gh" for name in "abcdefgh"]
    chosen = taken(table, [0] * 8, [3], kept)
    back = taken(table.take(list(range(7, -1, -1))), [0] * 8, [3], kept[::-1])
    assert back[::-1] == chosen
    assert chosen == ["accepted", *["more than wanted"] * 5, "accepted", "accepted"]


def test_each_group_has_its_own_number_and_one_without_takes_all() -> None:
    table = rows(*"abcdef")
    found = taken(table, [0, 0, 1, 1, 2, 2], [1, -1, 0], [False] * 6)
    assert found == [
        "accepted",
        "more than wanted",
        "accepted",
        "accepted",
        *["more than wanted"] * 2,
    ]


def test_an_image_that_two_rows_of_a_group_share_counts_once() -> None:
    table = pa.concat_tables([rows("a"), rows("a", sample=1), rows("b", sample=1)])
    assert taken(table, [0, 0, 0], [2], [False] * 3) == ["accepted", "same image", "accepted"]
    # Of different groups it counts in each.
    assert taken(table, [0, 1, 1], [2, 2], [False] * 3) == ["accepted"] * 3


def test_other_reasons_stay_unchanged() -> None:
    table = rows("a", "b", "c")
    before = pa.array(["rejected", "accepted", "accepted"])
    found = limit_to_wanted(
        before, table, np.zeros(3, np.int64), np.array([1]), kept=pa.array([None] * 3, pa.bool_())
    )
    assert found.to_pylist() == ["rejected", "accepted", "more than wanted"]


# -- versions ---------------------------------------------------------------------------------


def version(*names: str, verdicts: pa.Table) -> str:
    return verdict_version(pa.array([sha(name) for name in names], pa.string()), verdicts)


def numbered(**verdicts: tuple[str, int]) -> pa.Table:
    table = said(**{name: verdict for name, (verdict, _) in verdicts.items()})
    return table.set_column(
        table.schema.get_field_index("number"),
        "number",
        pa.array([number for _, number in verdicts.values()], pa.int64()),
    )


def test_a_version_depends_only_on_the_verdicts_of_its_images() -> None:
    one = numbered(a=("keep", 1))
    both = numbered(a=("keep", 1), z=("reject", 2))
    assert version("a", "b", verdicts=one) == version("b", "a", verdicts=both)
    assert version("a", "z", verdicts=one) != version("a", "z", verdicts=both)
    # Another image without a verdict changes nothing.
    assert version("a", verdicts=both) == version("a", "c", verdicts=both)
    assert version(verdicts=both) == version("c", verdicts=both)


def test_a_later_equal_verdict_gives_another_version() -> None:
    assert version("a", verdicts=numbered(a=("keep", 1))) != version(
        "a", verdicts=numbered(a=("keep", 2))
    )


def test_row_names_are_unique_for_rows_of_one_image() -> None:
    table = pa.concat_tables([rows("a"), rows("a", sample=1), rows("b")])
    assert len(set(row_names(table).to_pylist())) == 3
