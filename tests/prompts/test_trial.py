"""A trial chooses rows of a plan: the first ones, or the same ones each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from krea_dagster.prompts import Plan, PromptTable, parse_partition_by
from krea_dagster.prompts.trial import Trial

Open = Callable[..., PromptTable]


def rows(count: int, **further: Any) -> dict[str, Any]:
    names = [f"row-{number}" for number in range(count)]
    return {"prompt_id": names, "prompt": names, **further}


def chosen(plan: Plan, trial: Trial) -> list[str]:
    """The prompt_ids of the images in a trial, in the order of the plan."""
    inside = trial.of(plan).inside
    found = [id_ for key in plan.keys for b in plan.batches(key) for id_ in b[0].to_pylist()]
    return [id_ for id_, is_in in zip(found, inside, strict=True) if is_in]


def test_the_first_rows_are_those_of_the_table_not_of_its_partitions(open_table: Open) -> None:
    with open_table(rows(50), "hash:8").plan() as plan:
        assert sorted(chosen(plan, Trial(3))) == ["row-0", "row-1", "row-2"]
        assert str(Trial(3).of(plan)) == "3 of 50 rows"


def test_a_row_is_taken_with_all_its_images(open_table: Open) -> None:
    with open_table(rows(3, num_images=[2, 3, 1]), "hash:2").plan() as plan:
        found = Trial(2).of(plan)
        assert sorted(chosen(plan, Trial(2))) == ["row-0"] * 2 + ["row-1"] * 3
        assert (found.rows, found.of) == (2, 3)
        assert sum(found.by_partition.values()) == 2


def test_more_rows_than_there_are_is_the_whole_table(open_table: Open) -> None:
    with open_table(rows(3), "hash:2").plan() as plan:
        assert Trial(10, sample=True).of(plan).inside.all()
        assert str(Trial(10).of(plan)) == "3 of 3 rows"


def test_a_table_without_rows_has_an_empty_trial(open_table: Open) -> None:
    with open_table({"prompt": [], "prompt_id": []}, "hash:2").plan() as plan:
        assert str(Trial(10).of(plan)) == "0 of 0 rows"


def test_a_sample_is_spread_over_the_table_and_is_the_same_in_another_order(
    open_table: Open,
) -> None:
    columns = rows(1000)
    with open_table(columns, "hash:8").plan() as plan:
        first = chosen(plan, Trial(20, sample=True))
        numbers = [int(name.removeprefix("row-")) for name in first]
        assert len(set(first)) == 20
        assert max(numbers) > 500
    turned = {name: values[::-1] for name, values in columns.items()}
    with open_table(turned, "hash:3").plan() as plan:
        assert sorted(chosen(plan, Trial(20, sample=True))) == sorted(first)


def test_a_row_that_is_added_replaces_at_most_one_row_of_a_sample(open_table: Open) -> None:
    with open_table(rows(300)).plan() as plan:
        before = set(chosen(plan, Trial(10, sample=True)))
        assert before < set(chosen(plan, Trial(11, sample=True)))
    with open_table(rows(330)).plan() as plan:
        after = set(chosen(plan, Trial(10, sample=True)))
    replaced = {name for name in after - before if int(name.removeprefix("row-")) >= 300}
    assert after - before == replaced


@settings(max_examples=20)
@given(st.integers(1, 12), st.booleans(), st.sets(st.integers(0, 3)))
def test_the_trials_of_parts_are_the_trial_of_the_whole(
    count: int, sample: bool, part: set[int]
) -> None:
    """So several runs can share the rows of a trial without knowing one another."""
    table = PromptTable(
        [{"prompt": f"{n}", "prompt_id": f"{n}"} for n in range(25)],
        parse_partition_by("hash:4"),
        name="t",
    )
    with table.plan() as plan:
        whole = Trial(count, sample).of(plan)
        keys = [f"bucket-00{number}" for number in sorted(part)]
        share = sum(whole.by_partition[key] for key in keys)
        mine = set(chosen(plan, Trial(count, sample)))
        with plan.part(keys) as some:
            of_part = chosen(some, Trial(share, sample))
            here = {id_ for key in keys for b in some.batches(key) for id_ in b[0].to_pylist()}
        assert set(of_part) == mine & here
