"""Money, days and names of columns as text."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date
from decimal import ROUND_HALF_UP, Context, Decimal
from fractions import Fraction
from typing import Final

from krea_dagster.models import UNITS_PER_CREDIT

CENT_UNITS: Final = UNITS_PER_CREDIT // 100


def amount(units: int, places: int = 2) -> str:
    """Return units as credits, exactly: ``1,234.45``, with four decimals where they are needed.

    ``places`` 4 aligns a column.
    """
    needed = 2 if units % CENT_UNITS == 0 else 4
    return f"{Decimal(units) / UNITS_PER_CREDIT:,.{max(needed, places)}f}"


def rough(units: int) -> str:
    """Return an estimate as credits, without decimals that would not be known: ``2,727``."""
    credits = units / UNITS_PER_CREDIT
    return f"{credits:,.0f}" if credits >= 100 else f"{credits:,.2f}"


def credits_words(units: int) -> str:
    """Return units as credits in a sentence: ``1,234.45 credits``."""
    return f"{amount(units)} credits"


def day_words(day: date) -> str:
    """Return a day as text: ``7 May 2026``."""
    return f"{day.day} {day:%b %Y}"


def rounded(exact: Fraction, places: int) -> Decimal:
    """Return an exact amount, rounded once."""
    digits = Context(prec=80)
    quotient = digits.divide(Decimal(exact.numerator), Decimal(exact.denominator))
    return quotient.quantize(Decimal(1).scaleb(-places), ROUND_HALF_UP, digits)


def unique_names(names: Iterable[str]) -> list[str]:
    """Return the names of a result's columns, each different from the others in any case.

    The first keeps its name; a later one gets the next free number: ``day``, ``day_2``, ``Day_3``.
    """
    taken: set[str] = set()
    found = []
    for name in names:
        unique, number = name, 2
        while unique.lower() in taken:
            unique, number = f"{name}_{number}", number + 1
        taken.add(unique.lower())
        found.append(unique)
    return found
