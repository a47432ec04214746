"""The check of charges against prices and a limit."""

from __future__ import annotations

import functools

import pytest

from krea_dagster.plugin.checks import (
    build_spend_check,
)
from tests.plugin.checks.stored_manifests import (
    ERROR,
    WARN,
    StoredManifests,
    named,
    number,
)

pytestmark = pytest.mark.filterwarnings("ignore::dagster.BetaWarning")  # backfill_policy is beta


def test_an_image_above_its_price_and_a_charge_without_an_image_are_warnings(
    stored: StoredManifests,
) -> None:
    stored.write(
        [
            stored.row(0),
            stored.row(1, credits_charged=0.5),
            stored.row(2, credits_charged=1.8, quality="2K"),
            {**stored.failed(3), "credits_charged": 0.45},
            stored.row(4, credits_charged=None),
        ]
    )
    check = stored.check(build_spend_check)
    assert (check.passed, check.severity) == (False, WARN)
    assert named(check) == {
        "row-0001": "0.5 credits charged instead of 0.45 for 1K",
        "row-0003": "0.45 credits charged, but it failed",
    }
    assert number(check, "credits_charged") == pytest.approx(0.45 + 0.5 + 1.8 + 0.45)
    assert number(check, "credits_expected") == pytest.approx(0.45 * 3 + 1.8)
    assert number(check, "charges_unknown") == 1
    allowed = functools.partial(build_spend_check, tolerance=0.2)
    assert set(named(stored.check(allowed))) == {"row-0003"}


def test_a_partition_above_its_most_is_an_error_and_twins_count_once(
    stored: StoredManifests,
) -> None:
    stored.write([stored.row(0), {**stored.row(0), "prompt_id": "twin"}])
    stored.write([stored.row(1), stored.row(2), stored.row(3)], "c")
    limit = functools.partial(build_spend_check, most_credits=0.9)
    assert stored.check(limit, "a").passed
    check = stored.check(limit)
    assert (check.passed, check.severity) == (False, ERROR)
    assert "partition c cost 1.35 credits, more than 0.9" in (check.description or "")
    assert number(check, "credits_charged") == pytest.approx(4 * 0.45)


def test_other_prices_can_be_agreed_on(stored: StoredManifests) -> None:
    stored.write(
        [stored.row(0, credits_charged=0.3), stored.row(1, credits_charged=9.0, quality="8K")]
    )
    check = stored.check(functools.partial(build_spend_check, prices={"1K": 0.25}))
    assert set(named(check)) == {"row-0000", "row-0001"}
