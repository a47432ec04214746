"""Exactly N accepted: what is bought, regenerated or held back, and why groups stay short."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from krea_dagster.curation.accepted.quota import (
    IS_ACCEPTED,
    IS_FAILED,
    IS_FIXED,
    IS_OPEN,
    IS_REFUSED,
    IS_UNDECIDED,
    SLOT_SCHEMA,
    QuotaDecision,
    WantedImages,
    decide,
    quota_totals,
    slot_states,
)
from krea_dagster.errors import ConfigError

NAMES = {
    "accepted": IS_ACCEPTED,
    "undecided": IS_UNDECIDED,
    "open": IS_OPEN,
    "refused": IS_REFUSED,
    "fixed": IS_FIXED,
    "failed": IS_FAILED,
}


def slot(prompt_id: str = "p", /, **values: Any) -> dict[str, Any]:
    plain = {
        "sample": 0,
        "attempt": 0,
        "seed": 5,
        "drawn": True,
        "partition_key": "bucket-000",
        "value": None,
        "status": "stored",
        "image_sha256": None,
        "error_code": None,
        "price_units": 4500,
        "bought_images": 1,
        "bought_units": 4500,
    }
    key = f"{prompt_id}/{values.get('sample', 0)}/{values.get('attempt', 0)}"
    return {"prompt_id": prompt_id, "request_key": key, **plain, **values}


def table(*slots: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(slots), SLOT_SCHEMA)


def decided(wanted: WantedImages | int, *stands: str, **columns: list[Any]) -> QuotaDecision:
    """Decide for one prompt whose samples have these states."""
    slots = [
        slot(
            sample=number,
            **{
                **({"bought_images": 0, "bought_units": 0} if one == "open" else {}),
                **{name: values[number] for name, values in columns.items()},
            },
        )
        for number, one in enumerate(stands)
    ]
    how = wanted if isinstance(wanted, WantedImages) else WantedImages(wanted)
    return decide(how, table(*slots), np.array([NAMES[one] for one in stands], np.int8))


def marks(decision: QuotaDecision) -> str:
    """Return a letter per slot: a asked, g another attempt, h held, - left alone."""
    letters = zip(decision.ask, decision.again, decision.held, strict=True)
    return "".join(
        "a" if ask else "g" if again else "h" if held else "-" for ask, again, held in letters
    )


# -- what is bought ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "stands", "expected"),
    [
        (3, "open open open", "aaa"),
        (2, "open open open", "aah"),
        (3, "accepted refused accepted", "-g-"),
        (3, "accepted refused refused", "-gg"),
        # An image that waits for a review or is at the server may still be accepted.
        (2, "undecided refused accepted", "---"),
        (2, "undecided refused refused", "-g-"),
        # A slot without an image comes before one whose image was refused.
        (2, "accepted refused open", "--a"),
        (1, "accepted refused open", "--h"),
        (0, "open refused", "h-"),
        # Neither would give another image.
        (2, "fixed failed", "--"),
    ],
)
def test_no_more_is_bought_than_is_missing(wanted: int, stands: str, expected: str) -> None:
    assert marks(decided(wanted, *stands.split())) == expected


def test_the_slot_with_the_fewest_attempts_is_asked_again_first() -> None:
    found = decided(1, "refused", "refused", "refused", attempt=[2, 1, 1])
    assert marks(found) == "-g-"


def test_a_group_without_a_number_is_bought_as_its_rows_say_and_never_again() -> None:
    wanted = WantedImages(None, "campaign", {"autumn": 1})
    slots = table(
        slot("a", value="spring"),
        slot("b", value="spring"),
        slot("c", value="autumn"),
        slot("d", value="autumn"),
    )
    found = decide(wanted, slots, np.array([IS_OPEN, IS_REFUSED, IS_OPEN, IS_OPEN], np.int8))
    assert marks(found) == "a-ah"
    assert [one.name for one in found.outcomes] == ["autumn"]


def test_values_of_a_column_are_counted_over_all_prompts_and_null_is_a_value() -> None:
    slots = table(slot("a", value=None), slot("b", value=""), slot("c", value="x"))
    found = decide(WantedImages(1, "column"), slots, np.full(3, IS_OPEN, np.int8))
    assert marks(found) == "aha"
    assert {one.name: one.asked for one in found.outcomes} == {"": 1, "x": 1}


def test_two_slots_that_share_a_request_count_as_one_image() -> None:
    wanted = WantedImages(2, "column")
    shared = {"value": "x", "request_key": "the same"}
    slots = table(slot("a", **shared), slot("b", **shared), slot("c", value="x"))
    accepted = decide(wanted, slots, np.array([IS_ACCEPTED, IS_ACCEPTED, IS_OPEN], np.int8))
    assert accepted.outcomes[0].accepted == 1
    assert marks(accepted) == "--a"
    # Bought for one, it is available for the other, which is not held back.
    fresh = decide(wanted, slots, np.full(3, IS_OPEN, np.int8))
    assert (marks(fresh), fresh.outcomes[0].asked) == ("aaa", 2)


def test_two_requests_of_a_group_that_gave_the_same_file_are_one_image() -> None:
    """As a server that ignores the seed does: the later of the two is requested again."""
    stands = ("accepted", "accepted", "accepted")
    files = ["f" * 64, "f" * 64, "e" * 64]
    found = decided(3, *stands, image_sha256=files)
    assert marks(found) == "-g-"
    assert (found.outcomes[0].accepted, found.outcomes[0].asked) == (2, 1)
    # Nothing is asked for where two are enough, and none where the seed is the table's.
    assert marks(decided(2, *stands, image_sha256=files)) == "---"
    fixed = decided(3, *stands, image_sha256=files, drawn=[True, False, True])
    assert marks(fixed) == "---"
    assert "1 refused with a seed in the table" in fixed.outcomes[0].why
    # In two groups each has its own.
    shared = {"image_sha256": "f" * 64}
    two = decide(
        WantedImages(1), table(slot("a", **shared), slot("b", **shared)), np.zeros(2, np.int8)
    )
    assert [one.accepted for one in two.outcomes] == [1, 1]


# -- budgets ----------------------------------------------------------------------------------


def test_the_budget_of_images_counts_all_that_were_bought() -> None:
    wanted = WantedImages(3, most_images=5)
    found = decided(wanted, "accepted", "refused", "refused", bought_images=[1, 1, 2])
    assert marks(found) == "-g-"
    (outcome,) = found.outcomes
    assert (outcome.short, outcome.why) == (1, "the candidate budget is spent at 5 images")


def test_the_budget_of_credits_leaves_out_what_does_not_fit() -> None:
    wanted = WantedImages(3, most_units=3 * 4500 + 4499)
    found = decided(wanted, "accepted", "refused", "refused")
    assert marks(found) == "---"
    assert "credits does not cover another" in found.outcomes[0].why
    wider = WantedImages(3, most_units=4 * 4500)
    assert marks(decided(wider, "accepted", "refused", "refused")) == "-g-"


def test_without_a_budget_four_candidates_are_bought_for_each_wanted_image() -> None:
    assert marks(decided(1, "refused", bought_images=[3])) == "g"
    assert marks(decided(1, "refused", bought_images=[4])) == "-"


def test_first_attempts_are_held_back_too_at_the_end_of_the_budget() -> None:
    assert marks(decided(WantedImages(3, most_images=2), "open", "open", "open")) == "aah"


# -- reasons ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "stands", "short", "why"),
    [
        (1, "accepted", 0, ""),
        (2, "accepted undecided", 0, ""),
        (2, "accepted refused", 0, ""),
        (2, "accepted fixed", 1, "1 refused with a seed in the table"),
        (2, "accepted failed", 1, "1 failed at the server (retry_errors"),
        (3, "accepted accepted", 1, "too few images (num_images)"),
        (3, "accepted fixed", 2, "num_images"),
    ],
)
def test_a_prompt_that_stays_short_has_a_reason(
    wanted: int, stands: str, short: int, why: str
) -> None:
    (outcome,) = decided(wanted, *stands.split()).outcomes
    assert outcome.short == short
    assert why in outcome.why
    assert bool(outcome.why) == bool(short)


def test_totals_count_no_more_accepted_than_are_wanted() -> None:
    found = quota_totals(decided(1, "accepted", "accepted").outcomes)
    assert (found["wanted"], found["accepted"], found["groups_reached"]) == (1, 1, 1)
    assert (found["candidates"], found["candidate_credits"]) == (2, 0.9)


# -- states of slots --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "reason", "stands"),
    [
        ({}, "accepted", "accepted"),
        ({}, "rejected", "refused"),
        ({}, "sharpness>=120", "refused"),
        ({}, "duplicate", "refused"),
        ({"drawn": False}, "rejected", "fixed"),
        ({"drawn": False}, "accepted", "accepted"),
        ({}, "flagged", "undecided"),
        ({}, "not reviewed", "undecided"),
        ({}, "not measured", "undecided"),
        ({"status": None}, "not stored", "open"),
        ({"status": "planned"}, "not stored", "open"),
        ({"status": "deferred"}, "not stored", "open"),
        ({"status": "submitting"}, "not stored", "undecided"),
        ({"status": "submitted"}, "not stored", "undecided"),
        ({"status": "completed"}, "not stored", "undecided"),
        ({"status": "unknown"}, "not stored", "undecided"),
        ({"status": "failed", "error_code": "x"}, "not stored", "failed"),
        ({"status": "failed", "error_code": "busy"}, "not stored", "open"),
        ({"status": "refused", "error_code": "busy"}, "not stored", "open"),
        # Every run retries this one, so another slot in its place would be one too many.
        ({"status": "failed", "error_code": "service_error"}, "not stored", "open"),
        ({"status": "refused", "error_code": "service_error"}, "not stored", "failed"),
        # Paid and lost: retry_errors does not buy it again.
        ({"status": "expired", "error_code": "busy"}, "not stored", "failed"),
    ],
)
def test_the_state_of_a_slot(values: dict[str, Any], reason: str, stands: str) -> None:
    found = slot_states(table(slot(**values)), pa.array([reason]), retry_errors=["busy"])
    assert found.tolist() == [NAMES[stands]]


# -- configuration ----------------------------------------------------------------------------


def test_wanted_images_are_parsed() -> None:
    assert WantedImages.parse([]) is None
    assert WantedImages.parse(["prompt=3"]) == WantedImages(3)
    found = WantedImages.parse(
        ["column:campaign=30", "column:campaign:au:tumn=50"], most_images=99, most_credits=1.5
    )
    assert found == WantedImages(30, "campaign", {"au:tumn": 50}, 99, 15_000)
    assert found.numbers(["spring", "au:tumn"]).tolist() == [30, 50]


@pytest.mark.parametrize(
    "texts",
    [
        ["3"], ["prompt"], ["prompt=-1"], ["prompt=1.5"], ["prompt:x=1"], ["column=1"],
        ["column:=1"], ["prompt=1", "prompt=2"], ["prompt=1", "column:a=2"],
        ["column:a=1", "column:b=1"], ["column:a:x=1", "column:a:x=2"],
    ],
)  # fmt: skip
def test_invalid_wanted_images_are_rejected(texts: list[str]) -> None:
    with pytest.raises(ConfigError):
        WantedImages.parse(texts)


def test_a_budget_without_a_number_is_rejected() -> None:
    with pytest.raises(ConfigError, match="needs a number of wanted images"):
        WantedImages.parse([], most_images=3)


# -- properties -------------------------------------------------------------------------------


@st.composite
def worlds(draw: st.DrawFn) -> tuple[WantedImages, list[dict[str, Any]], list[int]]:
    stands = draw(st.lists(st.sampled_from(sorted(NAMES.values())), max_size=40))
    slots = [
        slot(
            f"p{draw(st.integers(0, 4))}",
            sample=draw(st.integers(0, 9)),
            attempt=draw(st.integers(0, 3)),
            request_key=f"k{draw(st.integers(0, 60))}",
            price_units=draw(st.sampled_from([4500, 18_000])),
            bought_images=0 if one == IS_OPEN else draw(st.integers(1, 4)),
            bought_units=draw(st.integers(0, 50_000)),
        )
        for one in stands
    ]
    keys: dict[str, int] = {}  # slots that share a request have the same state
    stands = [
        keys.setdefault(one["request_key"], two) for one, two in zip(slots, stands, strict=True)
    ]
    wanted = WantedImages(
        draw(st.integers(0, 6)),
        most_images=draw(st.none() | st.integers(0, 12)),
        most_units=draw(st.none() | st.integers(0, 120_000)),
    )
    return wanted, slots, stands


@given(worlds())
def test_never_more_is_bought_than_is_missing_or_budgeted(
    world: tuple[WantedImages, list[dict[str, Any]], list[int]],
) -> None:
    wanted, slots, stands = world
    found = decide(wanted, table(*slots), np.array(stands, np.int8))
    number = wanted.number or 0
    most_images = 4 * number if wanted.most_images is None else wanted.most_images
    for outcome in found.outcomes:
        mine = [at for at, one in enumerate(slots) if one["prompt_id"] == outcome.name]
        asked = {slots[at]["request_key"] for at in mine if found.ask[at] or found.again[at]}
        assert len(asked) == outcome.asked
        assert not asked or outcome.accepted + outcome.undecided + len(asked) <= number
        assert not asked or outcome.images + len(asked) <= most_images
        prices: dict[str, int] = {}
        for at in mine:
            prices.setdefault(slots[at]["request_key"], slots[at]["price_units"])
        cost = sum(prices[key] for key in asked)
        assert not asked or wanted.most_units is None or outcome.units + cost <= wanted.most_units
        assert bool(outcome.why) == bool(outcome.short)
    for at, stand in enumerate(stands):
        assert bool(found.again[at]) <= (stand == IS_REFUSED)
        assert bool(found.ask[at]) + bool(found.held[at]) == (stand == IS_OPEN)


def test_a_hundred_thousand_prompts_are_decided_about_in_a_second_or_two() -> None:
    number = 300_000
    samples = np.arange(number) % 3
    names = [f"p{at // 3}" for at in range(number)]
    columns = {name: [value] * number for name, value in slot().items()}
    columns |= {
        "prompt_id": names,
        "request_key": [f"k{at}" for at in range(number)],
        "sample": samples.tolist(),
    }
    slots = pa.table(
        [pa.array(columns[one.name], one.type) for one in SLOT_SCHEMA], schema=SLOT_SCHEMA
    )
    stands = np.where(samples == 1, IS_REFUSED, IS_ACCEPTED).astype(np.int8)
    found = decide(WantedImages(3), slots, stands)
    assert int(found.again.sum()) == number // 3
    assert len(found.outcomes) == number // 3
