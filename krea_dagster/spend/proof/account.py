"""Compare the credits that the account used with those that the journal explains. Pure.

Each run reads the account before and after. Between two readings the account must have used what
was charged between them. A purchase that was in flight while the account was read is known only
within bounds: whether the server counts credits when it reserves or when it settles them is not
documented. Nor is whether a refund lowers the use, and when: it may, on the days around its own.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, time, timedelta, timezone

from krea_dagster.engine.journal.entry_log import (
    CORRECTION,
    REFUND,
    AccountEntry,
    counted_kinds,
)
from krea_dagster.engine.journal.rows import AccountReading, Charge


@dataclass(frozen=True)
class AccountInterval:
    """Two readings, and the least and most units that the journal explains between them.

    ``refunded_units`` and ``corrected_units`` are by how much refunds, and corrections of charges
    that were too low, may have lowered and raised the use in addition.
    """

    before: AccountReading
    after: AccountReading
    low_units: int = 0
    high_units: int = 0
    refunded_units: int = 0
    corrected_units: int = 0

    @property
    def used_units(self) -> int:
        """The units that the account used."""
        return self.after.used_units - self.before.used_units

    @property
    def unexplained_units(self) -> int:
        """The units used beyond those that the journal explains; negative where fewer were used."""
        most = self.high_units + self.corrected_units
        least = self.low_units - self.refunded_units
        return max(0, self.used_units - most) + min(0, self.used_units - least)


@dataclass(frozen=True)
class AccountProof:
    """The comparison of the account with the journal.

    ``stretches`` go from a first to a last reading. There are several where the account's use fell,
    as it does with another key. ``gaps`` are the neighbouring readings whose difference is not
    explained.
    """

    readings: int
    stretches: Sequence[AccountInterval]
    gaps: Sequence[AccountInterval]

    @property
    def used_units(self) -> int:
        """The units that the account used."""
        return sum(stretch.used_units for stretch in self.stretches)

    @property
    def journal_units(self) -> int:
        """The units that the journal certainly explains."""
        return sum(stretch.low_units for stretch in self.stretches)

    @property
    def in_flight_units(self) -> int:
        """The units in flight while the account was read, which may be counted or not."""
        return sum(stretch.high_units - stretch.low_units for stretch in self.stretches)

    @property
    def unexplained_units(self) -> int:
        """The units that are not explained."""
        return sum(stretch.unexplained_units for stretch in self.stretches)


class AccountComparison:
    """Adds the journal's charges one by one; keeps two numbers for each pair of readings."""

    def __init__(
        self, readings: Sequence[AccountReading], entries: Sequence[AccountEntry] = ()
    ) -> None:
        self._readings = sorted(readings, key=lambda reading: reading.at)
        self._times = [reading.at for reading in self._readings]
        ends = [
            number
            for number, (before, after) in enumerate(
                zip(self._readings, self._readings[1:], strict=False)
            )
            if after.used_units < before.used_units
        ]
        starts = [0, *(number + 1 for number in ends)]
        lasts = [*ends, len(self._readings) - 1]
        pairs = [(a, b) for a, b in zip(starts, lasts, strict=True) if a < b]
        self._stretches = [_IntervalSums(self._times[a], self._times[b], a, b) for a, b in pairs]
        self._gaps = [
            _IntervalSums(self._times[number], self._times[number + 1], number, number + 1)
            for number in range(len(self._readings) - 1)
            if number not in set(ends)
        ]
        kinds = counted_kinds(entries)
        for entry in entries:
            if kinds[entry.entry_id] in (REFUND, CORRECTION):
                for bounds in (*self._stretches, *self._gaps):
                    bounds.add_entry(entry)
        self._gap_starts = [gap.first for gap in self._gaps]
        self._gap_ends = [gap.last for gap in self._gaps]

    def add(self, charge: Charge) -> None:
        """Add a charge."""
        from_gap = bisect_left(self._gap_ends, charge.sent_at)
        settled = _settled_at(charge)
        to_gap = len(self._gaps) if settled is None else bisect_right(self._gap_starts, settled)
        for bounds in (*self._stretches, *self._gaps[from_gap:to_gap]):
            bounds.add(charge)

    def proof(self) -> AccountProof | None:
        """Return the comparison; None where no two readings can be compared."""
        if not self._stretches:
            return None
        gaps = [bounds.gap(self._readings) for bounds in self._gaps]
        return AccountProof(
            readings=len(self._readings),
            stretches=[bounds.gap(self._readings) for bounds in self._stretches],
            gaps=[gap for gap in gaps if gap.unexplained_units],
        )


class _IntervalSums:
    """The least and most that the charges between two times come to."""

    def __init__(self, first: datetime, last: datetime, before: int, after: int) -> None:
        self.first = first
        self.last = last
        self._before = before
        self._after = after
        self._low = 0
        self._high = 0
        self._refunded = 0
        self._corrected = 0

    def add_entry(self, entry: AccountEntry) -> None:
        day = datetime.combine(entry.day, time(), timezone.utc)
        if day - timedelta(days=1) <= self.last and self.first <= day + timedelta(days=2):
            self._refunded += max(0, entry.units)
            self._corrected += max(0, -entry.units)

    def add(self, charge: Charge) -> None:
        low, high = between(charge, self.first, self.last)
        self._low += low
        self._high += high

    def gap(self, readings: Sequence[AccountReading]) -> AccountInterval:
        return AccountInterval(
            readings[self._before],
            readings[self._after],
            self._low,
            self._high,
            self._refunded,
            self._corrected,
        )


def between(charge: Charge, first: datetime, last: datetime) -> tuple[int, int]:
    """Return the least and most by which a charge may have changed the account's use.

    It changes the use by its charge, at some time from its first POST to when it was seen settled;
    until then the account may count the reservation.
    """
    settled = _settled_at(charge)
    if charge.sent_at > last or (settled is not None and settled <= first):
        return 0, 0
    charged = charge.charged_units or 0
    held = max(charge.committed_units, charge.reserved_units or 0, charged)
    was_sent_before = charge.sent_at < first
    is_settled = settled is not None and settled <= last
    if is_settled and not was_sent_before:
        return charged, charged
    # The reservation of a task that failed is released.
    given_back = was_sent_before and charge.charged_units == 0
    return (-held if given_back else 0), (charged if is_settled else held)


def _settled_at(charge: Charge) -> datetime | None:
    """Return when a charge was seen settled; None while its cost is not known."""
    return None if charge.charged_units is None else charge.settled_at
