"""The quote: what it says is what the next run then does, by the emulator's own expected."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from krea_dagster.emulator import Emulator
from krea_dagster.engine.budget import PUBLISHED_UNITS, Caps, Commitment
from krea_dagster.engine.policy import Policy
from krea_dagster.engine.record import Record, StoredImage
from krea_dagster.engine.states import State
from krea_dagster.errors import ConfigError
from krea_dagster.models import ImageRequest
from krea_dagster.spend.prices import CreditPrice
from krea_dagster.spend.quote import (
    ExpectedOutcome,
    ImageGroup,
    Price,
    Quote,
    QuoteLine,
    expected_outcome,
    quote,
)
from tests.spend.project_harness import ProjectHarness

ONE_K = 4500
TWO_K = 18_000


def files_fetched(project: ProjectHarness) -> int:
    return int(project.emulator.stats(tasks=False)["file_gets"])


# -- against real runs ------------------------------------------------------------------------


def test_before_the_first_run_all_is_to_buy_at_the_published_price(project: ProjectHarness) -> None:
    project = project.with_rows("ash", "birch", "cedar").with_rows("large", quality="2K")
    project = project.with_rows(
        "twin-0", "twin-1", seed=5, prompt=f"twins of {project.folder.name}"
    )
    said = project.quote()
    assert not (project.folder / "krea").exists()  # neither a journal nor a folder for it
    total = said.total
    assert (total.asked, total.to_buy, total.purchases) == (6, 6, 5)
    assert total.units == 4 * ONE_K + TWO_K
    assert said.prices == {"1K": Price(ONE_K, True), "2K": Price(TWO_K, True)}
    assert said.cost(total.units) == pytest.approx(3.6 / 68)
    project.buy()
    assert project.paid_units() == total.units


def test_what_is_done_costs_nothing_and_needs_no_network(tmp_path: Path) -> None:
    with Emulator(latency_s=0.02, latency_jitter=0.0) as emulator:
        project = ProjectHarness(tmp_path, emulator, "emulator").with_rows("ash", "birch", "cedar")
        project.buy()
        address = emulator.url
    # The emulator is gone, and no address answers.
    stranded = project.with_settings(emulator=False)
    assert stranded.krea.settings.base_url == address
    said = stranded.quote()
    assert (said.total.asked, said.total.reused) == (3, 3)
    assert (said.total.to_buy, said.total.units) == (0, 0)
    assert said.prices == {"1K": Price(ONE_K, False)}


def test_after_a_run_with_faults_the_quote_is_what_the_next_run_buys(
    project: ProjectHarness,
) -> None:
    name = project.folder.name
    project = project.with_rows("lost answer", "blocked", "black", "kept", "deleted")
    project = project.with_rows("refused", prompt=f"[emulator: refuse] of {name}")
    project = project.with_settings(on_unknown="hold")
    world = project.emulator.world
    world.script("drop_before_create", match=f"lost answer of {name}")
    world.script("fail", match=f"blocked of {name}", arg="content_policy_violation")
    world.script("black", 9, match=f"black of {name}")
    try:
        project.buy()
    finally:
        world.forget_scripts()
    project.file_of("deleted").unlink()
    project = project.with_rows("new-0", "new-1").with_rows("new-2", quality="2K")

    said = project.quote()
    total = said.total
    assert (total.asked, total.reused, total.refetched, total.taken_up) == (9, 1, 1, 0)
    assert (total.held, total.replayed, total.ended, total.to_buy) == (1, 0, 3, 3)
    assert total.units == 2 * ONE_K + TWO_K
    assert (total.at_stake, total.at_stake_units) == (1, ONE_K)
    assert total.at_stake_since == project.records()["lost answer"].sent_at
    assert said.prices == {"1K": Price(ONE_K, False), "2K": Price(TWO_K, True)}

    paid, fetched = project.paid_units(), files_fetched(project)
    project.buy("run-2")
    assert project.paid_units() - paid == total.units
    assert files_fetched(project) - fetched == total.to_buy + total.refetched + total.taken_up
    assert project.records()["lost answer"].state is State.UNKNOWN

    # A person wants the blocked row again, and lets the unknown one be repeated.
    final = project.with_settings(on_unknown="replay")
    said = final.quote(ask_again=["content_policy_violation"])
    total = said.total
    assert (total.reused, total.replayed, total.held, total.ended) == (5, 1, 0, 1)
    assert (total.to_buy, total.units) == (2, 2 * ONE_K)  # the blocked row, and the refused one
    assert (total.at_stake, total.at_stake_units) == (1, ONE_K)
    paid = project.paid_units()
    final.buy("run-3", ask_again=["content_policy_violation"])
    # The refused row is refused again, which costs nothing; the replay costs what was at stake.
    assert final.paid_units() - paid == total.units - ONE_K + total.at_stake_units
    assert final.quote().total.to_buy == 0


def test_a_cap_says_what_would_be_deferred_and_the_run_defers_it(project: ProjectHarness) -> None:
    project = project.with_rows(*(f"row-{number}" for number in range(5)))
    project = project.with_settings(run_credits=1.0)
    said = project.quote()
    assert (said.total.purchases, said.total.deferred) == (5, 3)
    assert said.total.deferred_units == 3 * ONE_K
    assert said.cap is not None
    assert said.cap.startswith("the run cap of 1 credits leaves no room for 0.45 more")
    project.buy()
    states = Counter(record.state for record in project.records().values())
    assert states == {State.STORED: 2, State.DEFERRED: 3}
    assert project.paid_units() == said.total.units - said.total.deferred_units

    # The day remembers what was committed, in any run.
    days = project.with_settings(run_credits=None, day_credits=1.4)
    said = days.quote()
    assert (said.total.purchases, said.total.deferred) == (3, 2)
    days.buy("run-2")
    assert days.paid_units() == 3 * ONE_K


def test_a_partition_that_is_not_there_is_refused_by_name(project: ProjectHarness) -> None:
    from krea_dagster.application.quotes import quote_partitions  # noqa: PLC0415

    project = project.with_rows("ash")
    with pytest.raises(
        ConfigError, match="unknown partition 'bucket-007'; the partitions are bucket"
    ):
        quote_partitions(project.krea, project.table, ["bucket-007"])
    only = quote_partitions(project.krea, project.table, ["bucket-000"])
    both = quote_partitions(project.krea, project.table, ["bucket-000", "bucket-001"])
    assert only.partitions == ["bucket-000"]
    assert both.quote.total.asked == 1
    assert both.quote == quote_partitions(project.krea, project.table).quote


# -- the decisions ----------------------------------------------------------------------------

NOW = datetime(2026, 1, 2, tzinfo=timezone.utc)
IMAGE = StoredImage("images/a.png", "0" * 64, 10, "PNG", 704, 1472)


def request(number: int = 0, quality: str = "1K") -> ImageRequest:
    return ImageRequest(f"{number:064x}", f"prompt {number}", "1:2", quality, 7, False, 0)


def record(state: State, number: int = 0, quality: str = "1K", **fields: Any) -> Record:
    sent = NOW - timedelta(hours=1)
    known: dict[str, Any] = {"sent_at": sent, "submitted_at": sent, "completed_at": sent}
    known |= {"result_url": "https://a", "task_id": "task-unified-1", "submission": 1}
    if state is State.STORED:
        known["image"] = IMAGE
    return Record(request(number, quality), state, "p", **{**known, **fields})


def fate(found: Record, policy: Policy | None = None, *, at_hand: bool = True) -> ExpectedOutcome:
    return expected_outcome(found, now=NOW, policy=policy or Policy(), holds=lambda _: at_hand)


def test_each_state_has_its_fate() -> None:
    fates = {state: fate(record(state)) for state in State}
    assert fates == {
        State.PLANNED: ExpectedOutcome.TO_BUY,
        State.DEFERRED: ExpectedOutcome.TO_BUY,
        State.SUBMITTING: ExpectedOutcome.REPLAYED,  # a process died before the answer
        State.UNKNOWN: ExpectedOutcome.REPLAYED,
        State.SUBMITTED: ExpectedOutcome.TAKEN_UP,
        State.COMPLETED: ExpectedOutcome.TAKEN_UP,
        State.STORED: ExpectedOutcome.REUSED,
        State.FAILED: ExpectedOutcome.ENDED,
        State.REFUSED: ExpectedOutcome.ENDED,
        State.EXPIRED: ExpectedOutcome.TAKEN_UP,  # read once more, which is free
    }


def test_the_policy_decides_what_is_held_and_what_is_bought_again() -> None:
    hold = Policy(on_unknown="hold")
    assert fate(record(State.UNKNOWN), hold) is ExpectedOutcome.HELD
    assert fate(record(State.SUBMITTING), hold) is ExpectedOutcome.HELD
    old = record(State.UNKNOWN, sent_at=NOW - timedelta(hours=24))
    assert fate(old) is ExpectedOutcome.HELD  # too old for a repeat under the same key
    assert fate(record(State.STORED), at_hand=False) is ExpectedOutcome.REFETCHED
    assert fate(record(State.FAILED, error_code="service_error")) is ExpectedOutcome.TO_BUY
    blocked = record(State.REFUSED, error_code="content_policy_violation")
    assert fate(blocked) is ExpectedOutcome.ENDED
    wished = Policy(retry_codes=frozenset({"content_policy_violation"}))
    assert fate(blocked, wished) is ExpectedOutcome.TO_BUY


# -- the sums ---------------------------------------------------------------------------------

_ROWS = st.lists(
    st.tuples(
        st.integers(0, 12),  # which request
        st.sampled_from(["bucket-000", "bucket-001", "bucket-002"]),
    ),
    max_size=40,
)
_STATES = st.dictionaries(st.integers(0, 12), st.sampled_from(list(State)))
_CAPS = st.builds(Caps, st.none() | st.integers(0, 60_000), st.none() | st.integers(0, 60_000))


def quality_of(number: int) -> str:
    return "2K" if number % 3 == 0 else "1K"


@given(_ROWS, _STATES, _CAPS, st.booleans(), st.booleans())
def test_lines_add_up_to_the_totals_and_every_row_has_one_fate(
    rows: list[tuple[int, str]], states: dict[int, State], caps: Caps, hold: bool, at_hand: bool
) -> None:
    records = {
        number: record(state, number, quality_of(number)) for number, state in states.items()
    }
    numbers = [number for number, _ in rows]
    asked = [
        ImageGroup(
            partition,
            quality_of(number),
            requests=int(number not in numbers[:row]),
            record=records.get(number),
        )
        for row, (number, partition) in enumerate(rows)
    ]
    said = quote(
        asked,
        prices={"2K": 20_000},
        now=NOW,
        policy=Policy(on_unknown="hold" if hold else "replay"),
        holds=lambda _: at_hand,
        caps=caps,
        committed=_committed,
    )
    total = said.total
    assert total.asked == len(rows)
    for line in [*said.lines, total, *said.by_quality(), *said.by_partition().values()]:
        assert line.asked == (
            line.reused
            + line.refetched
            + line.taken_up
            + line.replayed
            + line.held
            + line.ended
            + line.to_buy
        )
        assert line.deferred <= line.purchases <= line.to_buy
        assert line.deferred_units <= line.units
    assert sum(said.by_partition().values(), QuoteLine("", "")) == total
    assert sum(said.by_quality(), QuoteLine("", "")) == total
    assert [(line.partition_key, line.quality) for line in said.lines] == sorted(
        {(partition, quality_of(number)) for number, partition in rows}
    )
    to_buy = {
        number for number, _ in rows if states.get(number) in (None, State.PLANNED, State.DEFERRED)
    }
    assert total.purchases == len(to_buy)
    price = {"1K": PUBLISHED_UNITS["1K"], "2K": 20_000}
    assert total.units == sum(price[quality_of(number)] for number in to_buy)
    taken = total.units - total.deferred_units
    assert caps.run_units is None or taken <= caps.run_units
    assert caps.day_units is None or taken == 0 or taken + 9000 <= caps.day_units
    assert (said.cap is None) == (total.deferred == 0)


def _committed(scope: str) -> Commitment:
    """What the day had committed before; nothing else had."""
    return Commitment(9000 if scope.startswith("day:") else 0)


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.booleans(), st.sampled_from(["1K", "2K"])), max_size=8
    ),
    _CAPS,
)
def test_a_group_of_images_is_quoted_like_its_images_one_by_one(
    groups: list[tuple[int, bool, str]], caps: Caps
) -> None:
    """A large table is quoted by how its images stand, thousands at once."""

    def said(asked: list[ImageGroup]) -> Quote:
        return quote(
            asked,
            prices={"2K": 20_000},
            now=NOW,
            policy=Policy(),
            holds=lambda _: True,
            caps=caps,
            committed=_committed,
        )

    together = [
        ImageGroup("p", quality, rows=rows, requests=rows, intact=done)
        for rows, done, quality in groups
        if rows
    ]
    alone = [replace(one, rows=1, requests=1) for one in together for _ in range(one.rows)]
    assert said(together) == said(alone)


def test_the_cost_follows_the_price_of_a_credit() -> None:
    line = QuoteLine("p", "1K", asked=1, to_buy=1, purchases=1, units=ONE_K)
    said = Quote((line,), {"1K": Price(ONE_K, True)}, credit_price=CreditPrice.parse("45/EUR"))
    assert said.cost(said.total.units) == pytest.approx(0.01)
    assert replace(said, credit_price=CreditPrice.parse("68/USD")).cost(68 * 10_000) == 1.0
