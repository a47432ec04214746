"""The sentences of a run: what it will do, how far it is, how it ended."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from krea_dagster.application.run_text import (
    cancel_line,
    duration_text,
    end_line,
    progress_line,
    quote_line,
    trial_line,
)
from krea_dagster.engine.run.report import Progress
from krea_dagster.prompts.trial import TrialRows
from krea_dagster.spend.quote import Quote, QuoteLine


def quote_of(counts: dict[str, Any], cap: str | None = None) -> Quote:
    others = (QuoteLine("bucket-000", "2K"), QuoteLine("bucket-001", "1K"))
    return Quote((QuoteLine("bucket-000", "1K", **counts), *others), {}, cap=cap)


@pytest.mark.parametrize(
    ("counts", "line"),
    [
        (
            {"asked": 600, "reused": 354, "to_buy": 246, "purchases": 246, "units": 1_107_000},
            "600 images in 2 partitions: 354 stored already, 246 to buy for at most 110.7 credits.",
        ),
        (
            {"asked": 2, "reused": 2},
            "2 images in 2 partitions: 2 stored already, none to buy.",
        ),
        (
            {"asked": 3, "to_buy": 3, "purchases": 2, "units": 9_000},
            (
                "3 images in 2 partitions: 0 stored already, 3 to buy in 2 purchases for at most "
                "0.9 credits."
            ),
        ),
        (
            {"asked": 5, "taken_up": 1, "refetched": 1, "held": 1, "ended": 2,
             "at_stake": 1, "at_stake_units": 4_500},
            (
                "5 images in 2 partitions: 0 stored already, none to buy, 2 paid for and to be "
                "fetched, 1 with an unknown outcome (at most 0.45 credits), 2 failed before and "
                "not bought again."
            ),
        ),
    ],
)  # fmt: skip
def test_the_first_line_says_what_will_be_bought_and_its_cost_at_most(
    counts: dict[str, int], line: str
) -> None:
    assert quote_line(quote_of(counts)) == line


def test_images_that_are_held_back_are_not_said_to_be_stored() -> None:
    line = quote_line(quote_of({"asked": 5, "reused": 5}), held=3)
    assert line == "5 images in 2 partitions: 2 stored already, none to buy, 3 held back."


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (2, "A trial: 2 of 3 rows. The same without limit and sample takes the others."),
        (3, "A trial: 3 of 3 rows."),
    ],
)
def test_a_trial_of_all_rows_leaves_no_others(rows: int, line: str) -> None:
    assert trial_line(TrialRows(rows, 3, np.ones(3, np.bool_), {})) == line


def test_the_first_line_names_the_cap_that_defers_purchases() -> None:
    counts = {"asked": 4, "to_buy": 4, "purchases": 4, "units": 18_000}
    deferred = {"deferred": 3, "deferred_units": 13_500}
    quote = quote_of({**counts, **deferred}, "the day's cap is used up")
    assert quote_line(quote).endswith(
        ", 3 purchases of 1.35 credits deferred: the day's cap is used up."
    )


def test_the_progress_has_the_rate_and_the_time_to_go() -> None:
    progress = Progress(
        total=600, reused=54, delivered=300, failed=3, left=2, in_flight=64, charged_units=1_350_000
    )
    assert progress_line(progress, 30.0) == (
        "359 of 600 images, about 24 s to go: 300 delivered, 54 reused, 64 in flight, "
        "10.0 images/s, 135 credits, 3 failed, 2 left for later"
    )


def test_without_a_delivery_no_time_is_guessed() -> None:
    line = progress_line(Progress(total=4, in_flight=4), 30.0)
    assert line == ("0 of 4 images: 0 delivered, 0 reused, 4 in flight, 0.0 images/s, 0 credits")


def test_the_last_line_says_what_was_delivered_spent_and_where_it_is() -> None:
    progress = Progress(total=600, reused=354, delivered=246, charged_units=1_107_000)
    assert end_line(progress, 41.2, "/data/krea") == (
        "600 of 600 images ended: 246 delivered, 354 reused. 110.7 credits, 41 s. "
        "Images are in /data/krea/images, manifests in /data/krea/manifest."
    )


@pytest.mark.parametrize(
    ("progress", "bought"),
    [
        (None, "nothing was bought"),
        (Progress(total=4, in_flight=4), "nothing was bought"),
        (
            Progress(total=4, delivered=2, charged_units=9_000),
            "this run delivered 2 images for 0.9 credits, which are stored",
        ),
    ],
)
def test_a_cancelled_run_says_what_is_safe_and_what_the_next_one_does(
    progress: Progress | None, bought: str
) -> None:
    assert cancel_line(progress, "4 images …") == (
        f"Cancelled: {bought}, and no image that is paid for is lost. "
        "The next run of these partitions continues from here. 4 images …"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.9, "9.9 s"), (61.4, "61 s"), (119.0, "119 s"), (150.0, "2 min"),
     (7_199.0, "120 min"), (9_000.0, "2.5 h")],
)  # fmt: skip
def test_a_duration_has_the_unit_that_a_person_would_use(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
