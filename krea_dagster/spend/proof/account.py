"""What the account says it used, held against what the journal can explain. Pure.

Each run reads the account before and after. Between two readings the account must have used
what was charged between them. A purchase that was on its way while the account was read is
known only within bounds: whether the server counts credits when it reserves or when it settles
them is not documented.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from krea_dagster.engine.journal.journal import AccountReading, Charge


@dataclass(frozen=True)
class AccountInterval:
    """Two readings one after the other, and what the journal explains between them, in units.

    ``low_units`` to ``high_units`` is what the account may have used.
    """

    before: AccountReading
    after: AccountReading
    low_units: int = 0
    high_units: int = 0

    @property
    def used_units(self) -> int:
        """What the account used."""
        return self.after.used_units - self.before.used_units

    @property
    def unexplained_units(self) -> int:
        """What it used beyond what the journal explains; negative where it used less."""
        return max(0, self.used_units - self.high_units) + min(0, self.used_units - self.low_units)


@dataclass(frozen=True)
class AccountProof:
    """The account's use against the journal, in units.

    ``stretches`` go from a first to a last reading; more than one where the account's use fell
    in between, as it does with another key. ``gaps`` are the pairs of readings that are not
    explained.
    """

    readings: int
    stretches: Sequence[AccountInterval]
    gaps: Sequence[AccountInterval]

    @property
    def used_units(self) -> int:
        """What the account used."""
        return sum(stretch.used_units for stretch in self.stretches)

    @property
    def journal_units(self) -> int:
        """What the journal certainly explains."""
        return sum(stretch.low_units for stretch in self.stretches)

    @property
    def in_flight_units(self) -> int:
        """What was on its way while the account was read, so that it may be in or not."""
        return sum(stretch.high_units - stretch.low_units for stretch in self.stretches)

    @property
    def unexplained_units(self) -> int:
        """What is left."""
        return sum(stretch.unexplained_units for stretch in self.stretches)


class AccountComparison:
    """Takes the journal's charges one by one; keeps two numbers for each pair of readings."""

    def __init__(self, readings: Sequence[AccountReading]) -> None:
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
        self._gap_starts = [gap.first for gap in self._gaps]
        self._gap_ends = [gap.last for gap in self._gaps]

    def add(self, charge: Charge) -> None:
        """Count a charge."""
        from_gap = bisect_left(self._gap_ends, charge.sent_at)
        settled = _settled_at(charge)
        to_gap = len(self._gaps) if settled is None else bisect_right(self._gap_starts, settled)
        for bounds in (*self._stretches, *self._gaps[from_gap:to_gap]):
            bounds.add(charge)

    def proof(self) -> AccountProof | None:
        """The comparison; None where no two readings can be compared."""
        if not self._stretches:
            return None
        gaps = [bounds.gap(self._readings) for bounds in self._gaps]
        return AccountProof(
            readings=len(self._readings),
            stretches=[bounds.gap(self._readings) for bounds in self._stretches],
            gaps=[gap for gap in gaps if gap.unexplained_units],
        )


class _IntervalSums:
    """What the charges between two times come to."""

    def __init__(self, first: datetime, last: datetime, before: int, after: int) -> None:
        self.first = first
        self.last = last
        self._before = before
        self._after = after
        self._low = 0
        self._high = 0

    def add(self, charge: Charge) -> None:
        low, high = between(charge, self.first, self.last)
        self._low += low
        self._high += high

    def gap(self, readings: Sequence[AccountReading]) -> AccountInterval:
        return AccountInterval(readings[self._before], readings[self._after], self._low, self._high)


def between(charge: Charge, first: datetime, last: datetime) -> tuple[int, int]:
    """By how much a charge may have moved the account's use between two times: least and most.

    A purchase moves it at some time from its first POST to when it was seen settled, by what
    was charged; until then the account may count what it holds for it.
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
    # What was held for a task that failed is given back.
    given_back = was_sent_before and charge.charged_units == 0
    return (-held if given_back else 0), (charged if is_settled else held)


def _settled_at(charge: Charge) -> datetime | None:
    """When it was seen settled; None while what it cost is not known."""
    return None if charge.charged_units is None else charge.settled_at
