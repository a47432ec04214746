"""Another picture in place of a refused one: asked for once, however many runs want it."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import datetime, timezone

from krea_dagster.engine.journal import Journal

AT = datetime(2026, 11, 22, tzinfo=timezone.utc)


def test_an_attempt_is_raised_only_where_it_is_the_one_that_was_refused(journal: Journal) -> None:
    def replace(*samples: tuple[str, int, int]) -> list[tuple[str, int]]:
        return journal.attempts.replace(samples, raised_by="run", at=AT)

    assert replace(("a", 0, 0), ("b", 1, 0)) == [("a", 0), ("b", 1)]
    assert journal.attempts.present() == {("a", 0): 1, ("b", 1): 1}
    # Asked again by the same run, or by another that has read the same: nothing.
    assert replace(("a", 0, 0), ("b", 1, 0)) == []
    assert replace(("a", 0, 1), ("b", 1, 2), ("c", 0, 1)) == [("a", 0)]
    assert journal.attempts.present() == {("a", 0): 2, ("b", 1): 1}


def test_it_goes_together_with_a_persons_wish_for_another(journal: Journal) -> None:
    journal.attempts.ask_again([("a", 0)], raised_by="a person's run", at=AT)
    assert journal.attempts.replace([("a", 0, 0)], raised_by="run", at=AT) == []
    assert journal.attempts.replace([("a", 0, 1)], raised_by="run", at=AT) == [("a", 0)]
    journal.attempts.ask_again([("a", 0)], raised_by="another", at=AT)
    assert journal.attempts.present() == {("a", 0): 3}


def test_a_run_that_is_executed_again_asks_for_nothing_whoever_has_asked_in_between(
    journal: Journal,
) -> None:
    def again(run: str, *slots: tuple[str, int]) -> list[tuple[str, int]]:
        return journal.attempts.ask_again(slots, raised_by=run, at=AT)

    assert again("first", ("a", 0), ("b", 0)) == [("a", 0), ("b", 0)]
    assert journal.attempts.replace([("a", 0, 1)], raised_by="second", at=AT) == [("a", 0)]
    assert again("first", ("a", 0), ("b", 0), ("c", 0)) == [("c", 0)]
    assert again("third", ("b", 0), ("b", 0)) == [("b", 0)]
    assert again("first", ("b", 0)) == []
    assert journal.attempts.present() == {("a", 0): 2, ("b", 0): 2, ("c", 0): 1}


def test_of_wishes_at_the_same_time_each_is_met_once(journal_url: str) -> None:
    """Two people wish for the same rows, and one of their runs is there twice."""
    slots = [(f"p{number}", 0) for number in range(40)]

    def run(number: int) -> list[tuple[str, int]]:
        with closing(Journal(journal_url)) as own:
            order = slots if number % 2 else slots[::-1]
            return own.attempts.ask_again(order, raised_by=f"run-{number // 2}", at=AT)

    with closing(Journal(journal_url)) as journal, ThreadPoolExecutor(3) as pool:
        raised = Counter(slot for found in pool.map(run, range(3)) for slot in found)
        assert journal.attempts.present() == dict.fromkeys(slots, 2)
    assert raised == Counter(dict.fromkeys(slots, 2))


def test_of_runs_at_the_same_time_one_raises_each(journal_url: str) -> None:
    samples = [(f"p{number}", number % 3, 0) for number in range(60)]

    def run(number: int) -> list[tuple[str, int]]:
        with closing(Journal(journal_url)) as own:
            order = samples if number % 2 else samples[::-1]
            return own.attempts.replace(order, raised_by=f"run-{number}", at=AT)

    with closing(Journal(journal_url)), ThreadPoolExecutor(4) as pool:
        raised = Counter(sample for found in pool.map(run, range(4)) for sample in found)
    assert raised == Counter((prompt_id, sample) for prompt_id, sample, _ in samples)
