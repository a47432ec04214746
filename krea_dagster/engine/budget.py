"""Reserve before buying: what a purchase may cost, and whether the caps leave room for it. Pure.

Credits are committed when the intent to buy is written: first what the purchase is expected to
cost at most, then what the server says it reserved, at last what was charged; nothing, once it
is certain that it cost nothing. Caps bound what is committed, so that runs which share a
journal cannot pass them together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from types import MappingProxyType
from typing import Final

from krea_dagster.engine.states import Event, State
from krea_dagster.errors import CapReached
from krea_dagster.models import credits_from_units

#: Published prices, in units: 0.45 credits for 1K and 1.8 for 2K, per call.
PUBLISHED_UNITS: Final[Mapping[str, int]] = MappingProxyType({"1K": 4_500, "2K": 18_000})

#: Published: 68 credits cost one US dollar.
CREDITS_PER_USD: Final = 68.0


@dataclass(frozen=True)
class Caps:
    """The most that may be committed, in units; None where there is no cap.

    ``run_units`` bounds one run, ``day_units`` all runs of a UTC day together.
    """

    run_units: int | None = None
    day_units: int | None = None


@dataclass(frozen=True)
class Commitment:
    """What a run or a day has committed, and how much of that was charged for good. In units."""

    committed_units: int = 0
    spent_units: int = 0

    @property
    def reserved_units(self) -> int:
        """What is committed and not yet charged."""
        return self.committed_units - self.spent_units

    def plus(self, committed_units: int, spent_units: int = 0) -> Commitment:
        """With this much more; less where negative."""
        return Commitment(self.committed_units + committed_units, self.spent_units + spent_units)


def expected_units(quality: str, highest_seen: Mapping[str, int]) -> int:
    """The most that an image of a quality is expected to cost, in units.

    The highest price that this account was seen to pay; before its first answer, the
    published one. Never 0: a quality of unknown price is taken for the dearest.
    """
    return highest_seen.get(quality) or PUBLISHED_UNITS.get(quality, max(PUBLISHED_UNITS.values()))


def admit(
    caps: Caps, run: Commitment, day: Commitment, units: int, now: datetime
) -> CapReached | None:
    """None where a purchase of so many units fits under the caps, else the reason why not."""
    if caps.run_units is not None and run.committed_units + units > caps.run_units:
        return _reached(
            "run", caps.run_units, run, units, "frees when what it reserved is returned"
        )
    if caps.day_units is not None and day.committed_units + units > caps.day_units:
        return _reached(
            "day", caps.day_units, day, units, f"frees at {next_day(now):%Y-%m-%d %H:%M} UTC"
        )
    return None


def _reached(name: str, cap_units: int, found: Commitment, units: int, frees: str) -> CapReached:
    return CapReached(
        f"{name}_cap_reached",
        f"the {name} cap of {credits_from_units(cap_units):g} credits leaves no room for "
        f"{credits_from_units(units):g} more: {credits_from_units(found.spent_units):g} spent, "
        f"{credits_from_units(found.reserved_units):g} reserved; it {frees}",
    )


def next_day(now: datetime) -> datetime:
    """When the next UTC day begins."""
    today = now.astimezone(timezone.utc).replace(hour=0, minute=0, second=0, microsecond=0)
    return today + timedelta(days=1)


def committed_after(
    event: Event, before: State, committed_units: int, values: Mapping[str, object]
) -> int:
    """What a submission has committed after an event, in units.

    ``values`` are the columns that the event sets. What is not known stays committed.
    """
    match event:
        case Event.ACCEPTED:
            reserved = values.get("reserved_units")
            return reserved if isinstance(reserved, int) else committed_units
        case Event.TURNED_AWAY | Event.REFUSED | Event.RELEASED:
            return 0
        case Event.DEFERRED:
            return 0 if before is State.SUBMITTING else committed_units
        case Event.FAILED:
            charged = values.get("charged_units")
            return charged if isinstance(charged, int) else committed_units
        case Event.COMPLETED:
            charged = values.get("charged_units")
            return charged if isinstance(charged, int) else committed_units
        case _:
            return committed_units
