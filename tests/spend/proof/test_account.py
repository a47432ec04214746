"""The account's use compared with the journal, with purchases in flight."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from krea_dagster.engine.journal.entry_log import AccountEntry
from krea_dagster.engine.journal.rows import AccountReading, Charge
from krea_dagster.engine.states import State
from krea_dagster.spend.proof.account import AccountComparison, AccountProof

START = datetime(2026, 1, 1, tzinfo=timezone.utc)
UNITS = 4500


def at(second: float) -> datetime:
    return START + timedelta(seconds=second)


def reading(second: float, used_units: int) -> AccountReading:
    return AccountReading(at(second), f"run-{second:g}", used_units, 0)


def charge(sent_s: float, settled_s: float | None, charged: int | None = UNITS) -> Charge:
    """A purchase; where it is not settled, what it cost is not known."""
    known = charged if settled_s is not None else None
    fields: dict[str, Any] = {
        "committed_units": UNITS if known is None else known,
        "reserved_units": UNITS,
        "charged_units": known,
        "settled_at": None if settled_s is None else at(settled_s),
    }
    return Charge(
        idempotency_key=f"k-{sent_s}-{settled_s}",
        request_key="r",
        number=1,
        run_id="run",
        partition_key="p",
        quality="1K",
        sent_at=at(sent_s),
        posts=1,
        task_id="t",
        submitted_at=at(sent_s),
        expected_units=UNITS,
        state=State.STORED,
        **fields,
    )


def compared(readings: list[AccountReading], *charges: Charge) -> AccountProof | None:
    comparison = AccountComparison(readings)
    for one in charges:
        comparison.add(one)
    return comparison.proof()


def certain(readings: list[AccountReading], *charges: Charge) -> AccountProof:
    proof = compared(readings, *charges)
    assert proof is not None
    return proof


def test_fewer_than_two_readings_prove_nothing() -> None:
    assert compared([]) is None
    assert compared([reading(0, 0)], charge(1, 2)) is None


def test_what_settled_between_the_readings_is_explained_and_no_more() -> None:
    readings = [reading(10, 700), reading(20, 700 + UNITS)]
    before, inside, after = charge(1, 9), charge(11, 19), charge(21, 25)
    assert certain(readings, before, inside, after).unexplained_units == 0
    missing = certain(readings, before, after)
    assert missing.unexplained_units == UNITS
    assert [gap.unexplained_units for gap in missing.gaps] == [UNITS]
    too_many = certain(readings, before, inside, charge(12, 18), after)
    assert too_many.unexplained_units == -UNITS


def test_what_was_on_its_way_at_a_reading_may_be_in_or_not() -> None:
    for used in (0, UNITS):
        readings = [reading(10, 0), reading(20, used)]
        for straddling in (charge(9, 11), charge(19, 21), charge(15, None), charge(5, None)):
            proof = certain(readings, straddling)
            assert proof.unexplained_units == 0
            assert (proof.journal_units, proof.in_flight_units) == (0, UNITS)
    assert certain([reading(10, 0), reading(20, 2 * UNITS)], charge(9, 11)).unexplained_units > 0


def test_a_failure_whose_reservation_was_counted_may_lower_the_use() -> None:
    failed = charge(9, 11, charged=0)
    later = charge(12, 13)
    for used in (0, UNITS):
        assert certain([reading(10, 0), reading(20, used)], failed, later).unexplained_units == 0
    assert certain([reading(8, 0), reading(20, 0)], failed, later).unexplained_units == -UNITS
    # But it cannot raise it: it was given back before the second reading.
    too_much = [reading(10, 0), reading(20, 2 * UNITS)]
    assert certain(too_much, failed, later).unexplained_units == UNITS


def test_where_the_use_falls_a_new_stretch_begins() -> None:
    readings = [reading(0, 0), reading(10, UNITS), reading(20, 0), reading(30, UNITS)]
    proof = certain(readings, charge(1, 2), charge(21, 22))
    assert len(proof.stretches) == 2
    assert proof.used_units == proof.journal_units == 2 * UNITS
    assert proof.unexplained_units == 0
    assert certain(readings, charge(21, 22)).unexplained_units == UNITS


def test_a_refund_may_have_lowered_the_use_or_not_around_its_day_and_by_no_more() -> None:
    refund = AccountEntry("refund", START.date(), 3000, entry_id="r")
    for used, unexplained in ((UNITS, 0), (UNITS - 3000, 0), (UNITS - 3001, -1), (UNITS + 1, 1)):
        comparison = AccountComparison([reading(0, 0), reading(20, used)], [refund])
        comparison.add(charge(1, 2))
        proof = comparison.proof()
        assert proof is not None
        assert proof.unexplained_units == unexplained
        assert proof.in_flight_units == 0, "a refund is not in flight"
    old = AccountEntry("refund", START.date() - timedelta(days=9), 3000, entry_id="r")
    given = AccountEntry("promotion", START.date(), 3000, entry_id="p")
    comparison = AccountComparison([reading(0, 0), reading(20, 0)], [old, given])
    comparison.add(charge(1, 2))
    proof = comparison.proof()
    assert proof is not None
    assert proof.unexplained_units == -UNITS


_TIMES = st.integers(0, 1000)


@given(
    st.lists(st.tuples(_TIMES, _TIMES, _TIMES, st.booleans()), max_size=30),
    st.lists(_TIMES, min_size=2, max_size=6, unique=True),
    st.integers(0, 10) | st.integers(-10, 0),
)
def test_an_honest_account_is_always_explained_and_a_difference_never_hidden_by_settled_charges(
    purchases: list[tuple[int, int, int, bool]], readings_at: list[int], extra_images: int
) -> None:
    """The account counts each purchase at some time between its POST and its settlement."""
    charges = []
    counted: list[tuple[float, int]] = []
    for one, two, three, settled in purchases:
        sent, moved, seen = sorted((one, two, three))
        charges.append(charge(sent - 0.5, seen + 0.25 if settled else None))
        counted.append((moved - 0.25, UNITS))

    def used(second: int) -> int:
        return 100_000 + sum(units for moved, units in counted if moved < second)

    honest = [reading(second, used(second)) for second in sorted(readings_at)]
    proof = certain(honest, *charges)
    assert proof.unexplained_units == 0
    assert proof.gaps == []
    assert proof.used_units - proof.journal_units <= proof.in_flight_units

    last = honest[-1]
    forged = [*honest[:-1], reading(max(readings_at), last.used_units + extra_images * UNITS)]
    if forged[-1].used_units >= forged[-2].used_units:
        found = certain(forged, *charges).unexplained_units
        slack = proof.in_flight_units
        assert abs(extra_images * UNITS - found) <= slack
