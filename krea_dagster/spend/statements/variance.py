"""Why a month cost more or less than the one before: price, volume and mix, exactly. Pure.

Volume is what the change of the number of charged purchases costs at the earlier prices and shares
of each quality, mix what the change of these shares costs, and price what the change of the price
of a purchase costs. A quality that is new has no earlier price: its cost is mix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from krea_dagster.spend.text import rounded


@dataclass(frozen=True)
class QualityCharge:
    """The purchases of a quality in a month that were charged, and their charge in units."""

    purchases: int = 0
    units: int = 0

    @property
    def price(self) -> Fraction:
        """Units per purchase; 0 without any."""
        return Fraction(self.units, self.purchases) if self.purchases else Fraction(0)


@dataclass(frozen=True)
class VarianceLine:
    """The change of a quality's charge, in units: the three parts are the difference."""

    quality: str
    before: QualityCharge
    after: QualityCharge
    volume_units: int
    mix_units: int
    price_units: int


def variance(
    before: Mapping[str, QualityCharge], after: Mapping[str, QualityCharge]
) -> Sequence[VarianceLine]:
    """Return the change of each quality from one month to the next."""
    all_before = sum(one.purchases for one in before.values())
    all_after = sum(one.purchases for one in after.values())
    lines = []
    for quality in sorted({*before, *after}):
        old, new = before.get(quality, QualityCharge()), after.get(quality, QualityCharge())
        share, price = Fraction(0), old.price if old.purchases else new.price
        if all_before:
            share = Fraction(old.purchases, all_before)
        elif all_after:  # nothing was bought before: all of it is volume
            share = Fraction(new.purchases, all_after)
        volume = _units((all_after - all_before) * share * price)
        by_price = _units(new.purchases * (new.price - price))
        mix = new.units - old.units - volume - by_price
        lines.append(VarianceLine(quality, old, new, volume, mix, by_price))
    return lines


def _units(exact: Fraction) -> int:
    return int(rounded(exact, 0))
