"""Simulated years of spend by day and partition, of accounts that are used in different ways.

A year is a function of its kind, size and seed. Nothing in it is wrong, unless it is planted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import date, timedelta
from typing import Final

import numpy as np

from krea_dagster.spend.warnings.history import DaySpend, PartitionSpend, PriceSeen, SpendHistory

FIRST: Final = date(2025, 1, 1)
DAYS: Final = 365

#: The kinds that the detector and its defaults were chosen with, and those that only judge it.
TUNED_KINDS: Final = ("smooth", "team", "bursty", "growing", "sparse")
HELD_OUT_KINDS: Final = ("monthly", "seasonal", "batches")
SIZES: Final = (2_000, 20_000, 200_000)

PARTITIONS: Final = 8
PRICES: Final = np.array([4_500, 18_000])
SHARE_2K: Final = 0.15

#: Days on which a team does not work, besides weekends.
_HOLIDAYS: Final = [
    date(2025, *day)
    for day in (
        *((1, 1), (4, 18), (4, 21), (5, 1), (5, 29), (6, 9), (10, 3), (11, 1)),
        *((12, 24), (12, 25), (12, 26)),
    )
]
_WEEKDAY: Final = (np.arange(DAYS) + FIRST.weekday()) % 7
_MONTH_DAY: Final = np.array([(FIRST + timedelta(days=day)).day for day in range(DAYS)])

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Counts = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True)
class Year:
    """The purchases of a year: units by day and partition, and the partitions' names."""

    kind: str
    purchases: int
    seed: int
    units: Counts

    @property
    def by_day(self) -> Counts:
        """The units of each day."""
        return np.asarray(self.units.sum(axis=1))

    def spent(self) -> dict[date, int]:
        """Return the units by day, without the days that cost nothing."""
        return {_day(day): int(units) for day, units in enumerate(self.by_day) if units}

    @staticmethod
    def day(number: int) -> date:
        """Return a day by its number, from 0."""
        return _day(number)

    def history(self) -> SpendHistory:
        """Return the year as warnings are found in it."""
        days = [DaySpend(day, units, asked=1) for day, units in self.spent().items()]
        parts = [
            PartitionSpend(_day(day), f"part-{part}", int(self.units[day, part]))
            for day, part in np.argwhere(self.units)
        ]
        prices = [PriceSeen(days[0].day, "2K", int(PRICES[1]), 1)] if days else []
        return SpendHistory(days, parts, prices)

    def with_times(self, day: int, times: float, part: int | None = None) -> Year:
        """Return the year with a day, or one partition of it, that costs more."""
        units = self.units.copy()
        cells = (day,) if part is None else (day, part)
        units[cells] = np.round(units[cells] * times)
        return replace(self, units=units)

    def with_level(self, day: int, times: float) -> Year:
        """Return the year with another level of spend from a day on; 0 is a stop."""
        factors = np.where(np.arange(DAYS) >= day, times, 1.0)
        return replace(self, units=np.round(self.units * factors[:, None]).astype(np.int64))


def simulate(kind: str, purchases: int, seed: int) -> Year:
    """Simulate a year of about ``purchases`` purchases."""
    chance = np.random.default_rng([seed, purchases, sum(map(ord, kind))])
    level, shares = _LEVELS[kind](chance)
    level = level / level.sum() * purchases
    counts = chance.poisson(level[:, None] * shares)
    dear = chance.binomial(counts, SHARE_2K)
    return Year(kind, purchases, seed, (counts - dear) * PRICES[0] + dear * PRICES[1])


def _day(number: int) -> date:
    return FIRST + timedelta(days=int(number))


def _noise(chance: np.random.Generator, sigma: float, memory: float) -> Floats:
    """Return factors by day; those of neighbouring days are alike."""
    steps = chance.normal(0, 1, DAYS)
    values = np.empty(DAYS)
    values[0] = steps[0]
    for day in range(1, DAYS):
        values[day] = memory * values[day - 1] + np.sqrt(1 - memory**2) * steps[day]
    return np.asarray(np.exp(sigma * values))


def _buckets(chance: np.random.Generator, sigma: float = 0.0) -> Floats:
    """Return the shares of partitions by hash, which differ by day by ``sigma``."""
    shares = chance.dirichlet(np.full(PARTITIONS, 8.0)) * np.exp(
        chance.normal(0, sigma, (DAYS, PARTITIONS))
    )
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))


def _topics(chance: np.random.Generator) -> Floats:
    """Return the shares of partitions by a column: topics that come and go over weeks."""
    parts = [_noise(chance, 0.8, 0.93) * chance.gamma(2.0) for _ in range(PARTITIONS)]
    weights = np.stack(parts, axis=1)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def _week(weekend: float, chance: np.random.Generator) -> Floats:
    days = np.where(np.arange(7) >= 5, weekend, chance.uniform(0.8, 1.2, 7))
    return np.asarray(days[_WEEKDAY])


def _growth(times: float) -> Floats:
    return np.asarray(times ** (np.arange(DAYS) / DAYS))


def _smooth(chance: np.random.Generator) -> tuple[Floats, Floats]:
    level = _week(chance.uniform(0.3, 0.8), chance) * _growth(chance.uniform(0.9, 1.8))
    return level * _noise(chance, 0.15, 0.3), _buckets(chance)


def _work(chance: np.random.Generator) -> Floats:
    """Return factors of a team: holidays, a slump in August, days without any work."""
    level = np.ones(DAYS)
    for day in _HOLIDAYS:
        level[(day - FIRST).days] = 0.02
    level[212:243] *= chance.uniform(0.5, 0.8)
    level[-7:] *= 0.3
    level[chance.random(DAYS) < 0.02] = 0.0
    return level


def _team(chance: np.random.Generator) -> tuple[Floats, Floats]:
    level = _week(chance.uniform(0.02, 0.15), chance) * _growth(chance.uniform(0.9, 2.5))
    return level * _work(chance) * _noise(chance, 0.33, 0.4), _buckets(chance, 0.2)


def _bursty(chance: np.random.Generator) -> tuple[Floats, Floats]:
    level = _week(chance.uniform(0.1, 0.5), chance) * _growth(chance.uniform(0.9, 2.0))
    for start in chance.choice(DAYS - 15, 9, replace=False):
        level[start : start + chance.integers(3, 15)] *= chance.uniform(1.5, 2.2)
    return level * _work(chance) * _noise(chance, 0.25, 0.4), _buckets(chance, 0.2)


def _growing(chance: np.random.Generator) -> tuple[Floats, Floats]:
    level = _week(chance.uniform(0.2, 0.6), chance) * _growth(chance.uniform(2.5, 6.0))
    return level * _noise(chance, 0.25, 0.4), _buckets(chance)


def _sparse(chance: np.random.Generator) -> tuple[Floats, Floats]:
    active = chance.random(DAYS) < chance.uniform(0.1, 0.3)
    return np.where(active, np.exp(chance.normal(0, 0.6, DAYS)), 0.0), _buckets(chance)


def _monthly(chance: np.random.Generator) -> tuple[Floats, Floats]:
    """A delivery that takes the last days of each month."""
    last = (chance.integers(22, 27) <= _MONTH_DAY) * chance.uniform(1.0, 2.0)
    level = _week(chance.uniform(0.1, 0.5), chance) * (1 + last) * _growth(chance.uniform(0.8, 2))
    return level * _noise(chance, 0.2, 0.4), _topics(chance)


def _seasonal(chance: np.random.Generator) -> tuple[Floats, Floats]:
    """A shop: a swing over the year, sales weeks, and noise with heavy tails."""
    swing = 1 + 0.5 * np.cos(2 * np.pi * (np.arange(DAYS) - 340) / DAYS)
    tails = np.exp(0.15 * chance.standard_t(4, DAYS))
    level = _week(chance.uniform(0.6, 1.3), chance) * swing * np.clip(tails, 0.2, 4.0)
    return level * _noise(chance, 0.15, 0.7), _buckets(chance)


def _batches(chance: np.random.Generator) -> tuple[Floats, Floats]:
    """One large batch a week, which is sometimes left out, late or followed by a second one."""
    level = np.zeros(DAYS)
    for start in range(int(chance.integers(0, 5)), DAYS, 7):
        for _ in range(chance.choice(3, p=[0.1, 0.75, 0.15])):
            level[min(DAYS - 1, start + chance.geometric(0.7) - 1)] += np.exp(chance.normal(0, 0.4))
    return level * _growth(chance.uniform(0.8, 2.0)), _topics(chance)


_LEVELS: Final = {
    "smooth": _smooth,
    "team": _team,
    "bursty": _bursty,
    "growing": _growing,
    "sparse": _sparse,
    "monthly": _monthly,
    "seasonal": _seasonal,
    "batches": _batches,
}
