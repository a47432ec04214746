"""Another image in place of a refused one: requested once by any number of runs."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import datetime, timezone

from krea_dagster.engine.journal.journal import Journal

AT = datetime(2026, 11, 22, tzinfo=timezone.utc)
TABLE = "a table"


def test_replace_raises_only_the_given_attempt(journal: Journal) -> None:
    def replace(*samples: tuple[str, int, int]) -> list[tuple[str, int]]:
        return journal.attempts(TABLE).replace(samples, raised_by="run", at=AT)

    assert replace(("a", 0, 0), ("b", 1, 0)) == [("a", 0), ("b", 1)]
    assert journal.attempts(TABLE).current() == {("a", 0): 1, ("b", 1): 1}
    # Asked again by the same run, or by another that has read the same: nothing.
    assert replace(("a", 0, 0), ("b", 1, 0)) == []
    assert replace(("a", 0, 1), ("b", 1, 2), ("c", 0, 1)) == [("a", 0)]
    assert journal.attempts(TABLE).current() == {("a", 0): 2, ("b", 1): 1}


def test_replace_and_raise_work_together(journal: Journal) -> None:
    journal.attempts(TABLE).raise_attempts([("a", 0)], raised_by="a person's run", at=AT)
    assert journal.attempts(TABLE).replace([("a", 0, 0)], raised_by="run", at=AT) == []
    assert journal.attempts(TABLE).replace([("a", 0, 1)], raised_by="run", at=AT) == [("a", 0)]
    journal.attempts(TABLE).close_slots([("a", 0, 2)], at=AT)
    journal.attempts(TABLE).raise_attempts([("a", 0)], raised_by="another", at=AT)
    assert journal.attempts(TABLE).current() == {("a", 0): 3}


def test_tables_have_separate_attempts(journal: Journal) -> None:
    journal.attempts("one").raise_attempts([("a", 0)], raised_by="run", at=AT, draw=True)
    assert journal.attempts("other").current() == {}
    assert journal.attempts("other").drawn() == frozenset()
    assert journal.attempts("other").raise_attempts([("a", 0)], raised_by="run", at=AT) == [
        ("a", 0)
    ]
    assert journal.attempts("one").current() == {("a", 0): 1}
    assert journal.attempts("one").drawn() == {("a", 0)}


def test_an_open_attempt_is_continued_until_a_run_ends_with_it(journal: Journal) -> None:
    log = journal.attempts(TABLE)
    slots = [("a", 0)]
    assert log.raise_attempts(slots, raised_by="killed", at=AT) == slots
    assert log.raise_attempts(slots, raised_by="repeated", at=AT) == []
    assert log.open_slots() == {("a", 0)}
    log.close_slots([("a", 0, 0)], at=AT)
    assert log.open_slots() == {("a", 0)}, "a run that began before the wish has ended without it"
    log.close_slots([("a", 0, 1)], at=AT)
    assert log.open_slots() == set()
    assert log.raise_attempts(slots, raised_by="a new wish", at=AT) == slots
    assert log.current() == {("a", 0): 2}


def test_an_attempt_that_is_not_settled_is_not_raised(
    journal: Journal,
) -> None:
    found = journal.attempts(TABLE).raise_attempts(
        [("a", 0), ("b", 0)],
        raised_by="run",
        at=AT,
        settled=lambda slot, attempt: (slot, attempt) == (("b", 0), 0),
    )
    assert found == [("b", 0)]


def test_a_run_that_is_executed_again_raises_nothing(
    journal: Journal,
) -> None:
    def again(run: str, *slots: tuple[str, int]) -> list[tuple[str, int]]:
        return journal.attempts(TABLE).raise_attempts(slots, raised_by=run, at=AT)

    assert again("first", ("a", 0), ("b", 0)) == [("a", 0), ("b", 0)]
    assert journal.attempts(TABLE).replace([("a", 0, 1)], raised_by="second", at=AT) == [("a", 0)]
    assert again("first", ("a", 0), ("b", 0), ("c", 0)) == [("c", 0)]
    assert again("third", ("b", 0), ("b", 0)) == []  # the first has not come to its end
    journal.attempts(TABLE).close_slots([("b", 0, 1)], at=AT)
    assert again("third", ("b", 0), ("b", 0)) == [("b", 0)]
    assert again("first", ("b", 0)) == []
    assert journal.attempts(TABLE).current() == {("a", 0): 2, ("b", 0): 2, ("c", 0): 1}


def test_of_concurrent_raises_of_a_row_one_counts(journal_url: str) -> None:
    """Two people raise them, and one of their runs is executed twice: one image each."""
    slots = [(f"p{number}", 0) for number in range(40)]

    def run(number: int) -> list[tuple[str, int]]:
        with closing(Journal(journal_url)) as own:
            order = slots if number % 2 else slots[::-1]
            return own.attempts(TABLE).raise_attempts(order, raised_by=f"run-{number // 2}", at=AT)

    with closing(Journal(journal_url)) as journal, ThreadPoolExecutor(3) as pool:
        raised = Counter(slot for found in pool.map(run, range(3)) for slot in found)
        assert journal.attempts(TABLE).current() == dict.fromkeys(slots, 1)
    assert raised == Counter(slots)


def test_each_slot_is_raised_by_one_of_concurrent_runs(journal_url: str) -> None:
    samples = [(f"p{number}", number % 3, 0) for number in range(60)]

    def run(number: int) -> list[tuple[str, int]]:
        with closing(Journal(journal_url)) as own:
            order = samples if number % 2 else samples[::-1]
            return own.attempts(TABLE).replace(order, raised_by=f"run-{number}", at=AT)

    with closing(Journal(journal_url)), ThreadPoolExecutor(4) as pool:
        raised = Counter(sample for found in pool.map(run, range(4)) for sample in found)
    assert raised == Counter((prompt_id, sample) for prompt_id, sample, _ in samples)
