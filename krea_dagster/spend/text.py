"""Money and days as text for people."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
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
