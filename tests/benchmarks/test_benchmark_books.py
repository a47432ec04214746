"""What a server's books are read as: makespan, reads, refusals, shares."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.books import figures_of, most_at_once, shares_of


def books(*creates: tuple[float, str, str], late_s: float = 0.0, **more: Any) -> dict[str, Any]:
    """Books of these create calls; every task takes 2 s and is downloaded ``late_s`` later."""
    taken = [create for create in creates if create[1] == "accepted"]
    return {
        "limits": {"rate": None, "burst": 20, "limiter": "bucket", "concurrent": None},
        "first_post_s": creates[0][0],
        "last_download_s": max(at_s for at_s, _, _ in taken) + 2.0 + late_s,
        "single_reads": 0,
        "batch_reads": 0,
        "creates": [
            {"at_s": at_s, "outcome": outcome, "worker": worker}
            for at_s, outcome, worker in creates
        ],
        "tasks": [
            {
                "number": number,
                "created_s": at_s,
                "latency_s": 2.0,
                "done_s": at_s + 2.0,
                "downloaded_s": at_s + 2.0 + late_s,
            }
            for number, (at_s, _, _) in enumerate(taken)
        ],
        **more,
    }


def test_the_makespan_is_from_the_first_post_to_the_last_image() -> None:
    found = figures_of(
        books((100.0, "429", "w"), (101.0, "accepted", "w"), (105.0, "accepted", "w"), late_s=1.0),
        images=2,
    )
    assert found.makespan_s == 8.0
    assert found.bound_s == 2.0
    assert found.ratio == 4.0


def test_refusals_count_overall_and_after_the_first_ten_seconds() -> None:
    found = figures_of(
        books(
            (0.0, "429", "w"),
            (9.0, "429", "w"),
            (10.5, "accepted", "w"),
            (11.0, "429", "w"),
            (12.0, "accepted", "w"),
            (13.0, "accepted", "w"),
        ),
        images=3,
    )
    assert found.turned_away == pytest.approx(3 / 6)
    assert found.turned_away_later == pytest.approx(1 / 4)


def test_reads_are_counted_per_image() -> None:
    both = books((0.0, "accepted", "w"), (0.0, "accepted", "w"), single_reads=3, batch_reads=1)
    found = figures_of(both, images=2)
    assert (found.single_reads, found.batch_reads) == (1.5, 0.5)


def test_a_run_that_bought_twice_or_lost_an_image_has_no_figures() -> None:
    twice = books((0.0, "accepted", "w"), (0.0, "accepted", "w"))
    with pytest.raises(ValueError, match="2 tasks were created for 1 images"):
        figures_of(twice, images=1)
    twice["tasks"][1]["downloaded_s"] = None
    with pytest.raises(ValueError, match="1 of 2 images were never downloaded"):
        figures_of(twice, images=2)


def test_shares_count_only_while_every_worker_had_something_to_submit() -> None:
    alone_before = [(float(at), "accepted", "first") for at in range(10)]
    together = [(10.0, "429", "second"), (11.0, "accepted", "first"), (12.0, "accepted", "second")]
    together += [(13.0, "accepted", "second"), (14.0, "accepted", "first")]
    alone_after = [(float(at), "accepted", "second") for at in range(20, 30)]
    found = shares_of(books(*alone_before, *together, *alone_after))
    assert found == {"first": 0.5, "second": 0.5}


def test_the_most_at_once_counts_tasks_that_overlap() -> None:
    at = [0.0, 1.0, 1.5, 2.0, 9.0]
    assert most_at_once(books(*((at_s, "accepted", "w") for at_s in at))) == 3
