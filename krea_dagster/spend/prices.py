"""What a credit costs in a currency, from a day on. Pure.

A purchase has the price of its day, so that a new price moves no past month. Amounts of two
currencies are never added up.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from fractions import Fraction
from functools import cache
from typing import Final

from krea_dagster.errors import ConfigError
from krea_dagster.models import UNITS_PER_CREDIT

_FORM: Final = re.compile(r"(?:(\d{4}-\d{2}-\d{2})=)?(\d{1,9}(?:\.\d{1,9})?)/([A-Z]{3})")


@dataclass(frozen=True)
class CreditPrice:
    """How many credits one unit of a currency buys. As text ``68/USD``."""

    credits: Decimal
    currency: str

    @classmethod
    @cache
    def parse(cls, text: str) -> CreditPrice:
        """Parse ``68/USD``. Raises ConfigError."""
        ((_, price),) = CreditPrices.parse([text]).steps
        return price

    def __str__(self) -> str:
        return f"{self.credits.normalize():f}/{self.currency}"

    def cost(self, units: int) -> Fraction:
        """Return units in the currency, exactly."""
        return Fraction(units, UNITS_PER_CREDIT) / Fraction(self.credits)


@dataclass(frozen=True)
class CreditPrices:
    """Prices by the day from which each counts. The first counts for all earlier days, too."""

    steps: tuple[tuple[date, CreditPrice], ...]

    @classmethod
    def parse(cls, texts: Sequence[str]) -> CreditPrices:
        """Parse ``[DATE=]CREDITS/CURRENCY`` texts. Raises ConfigError, which names a wrong one."""
        steps: list[tuple[date, CreditPrice]] = []
        for text in texts:
            match = _FORM.fullmatch(text.strip())
            try:
                since = date.fromisoformat((match and match[1]) or "0001-01-01")
            except ValueError:
                match = None
            if match is None or not Decimal(match[2]):
                raise ConfigError(
                    f"{text[:60]!r} is not a price; use CREDITS/CURRENCY, such as 68/USD, and from "
                    "the second on with its first day, such as 2026-10-01=60/EUR"
                )
            if steps and since <= steps[-1][0]:
                raise ConfigError(f"the price {text!r} needs a day later than those before it")
            steps.append((since, CreditPrice(Decimal(match[2]), match[3])))
        if not steps:
            raise ConfigError("there is no price of a credit; use one such as 68/USD")
        return cls(tuple(steps))

    def __str__(self) -> str:
        first, *others = self.steps
        return ", ".join([str(first[1]), *(f"{since}={price}" for since, price in others)])

    @property
    def words(self) -> str:
        """The prices in a sentence: ``1 USD is 68 credits``."""
        said = [
            f"{f'from {since} ' if number else ''}1 {price.currency} is "
            f"{price.credits.normalize():f} credits"
            for number, (since, price) in enumerate(self.steps)
        ]
        return ", ".join(said)

    def on(self, day: date) -> CreditPrice:
        """Return the price of a day."""
        counting = [price for since, price in self.steps if since <= day]
        return counting[-1] if counting else self.steps[0][1]

    def of_month(self, month: str) -> str:
        """Return the prices of the days of a month (``YYYY-MM``) as text."""
        first = date.fromisoformat(f"{month}-01")
        later = [step for step in self.steps[1:] if step[0] > first and f"{step[0]:%Y-%m}" == month]
        return str(CreditPrices(((first, self.on(first)), *later)))

    def sql(self, day: str) -> str:
        """Return an expression of DuckDB: the price of the day that an expression says, as text."""
        others = "".join(
            f"WHEN {day} >= DATE '{since}' THEN '{price}' " for since, price in self.steps[:0:-1]
        )
        return f"CASE {others}WHEN true THEN '{self.steps[0][1]}' END"


#: EvoLink's published price.
PUBLISHED: Final = CreditPrices.parse(["68/USD"])
