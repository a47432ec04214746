"""Budgets: what a purchase may cost, and whether the caps leave room for it. Pure.

Credits are committed when the intent to buy is written: first the highest expected cost, then the
amount that the server reserved, finally the charge, or nothing once it is certain that the purchase
cost nothing. Caps bound the committed credits, so that runs which share a journal cannot pass them
together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from types import MappingProxyType
from typing import Final

from krea_dagster.engine.states import Event, State
from krea_dagster.errors import CapReached, ConfigError
from krea_dagster.models import credits_from_units, parse_cap

#: Published prices, in units: 0.45 credits for 1K and 1.8 for 2K, per call.
PUBLISHED_UNITS: Final[Mapping[str, int]] = MappingProxyType({"1K": 4_500, "2K": 18_000})

#: The kinds of budgets. Every purchase counts for a scope of each kind except ``column``.
KINDS: Final = ("run", "day", "month", "partition", "column")

#: Characters of a scope, and of the start of a longer one that is kept in front of its hash.
_MAX_SCOPE: Final = 300
_KEPT_START: Final = 200

#: How many times higher or lower than every known price a plausible price may be.
DOUBTFUL_TIMES: Final = 4

#: The column that sets the committed credits, by the event that sets it.
_SETTLED_BY: Final[Mapping[Event, str]] = MappingProxyType(
    {
        Event.ACCEPTED: "reserved_units",
        Event.FAILED: "charged_units",
        Event.COMPLETED: "charged_units",
        Event.FOUND: "charged_units",
    }
)


@dataclass(frozen=True)
class Budget:
    """The most that a scope may commit, in units.

    ``kind`` is one of ``KINDS``. Without a ``value`` it bounds each run, day, month, partition, or
    value of the column ``name`` separately; with one, only that partition or value.
    """

    kind: str
    units: int
    name: str = ""
    value: str | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Parse ``SCOPE=CREDITS``, such as ``month=900`` or ``column:campaign:autumn=100``.

        The scope is ``run``, ``day``, ``month``, ``partition``, ``partition:KEY``,
        ``column:NAME`` (each value) or ``column:NAME:VALUE``. Raises ConfigError.
        """
        scope, equals, credits = text.rpartition("=")
        kind, colon, rest = scope.partition(":")
        name, value = "", rest if colon else None
        if kind == "column":
            name, colon, rest = rest.partition(":")
            value = rest if colon else None
        dated = kind in ("run", "day", "month") and value is not None
        known = kind in KINDS and not dated and (kind != "column" or 0 < len(name) <= 100)
        wrong = ""
        if equals and known:
            try:
                return cls(kind, parse_cap(credits, "its amount"), name, value)
            except ConfigError as error:
                wrong = f"; {error}"
        raise ConfigError(
            f"budget {text!r} is invalid; use SCOPE=CREDITS with the scope day, month, partition, "
            "partition:KEY, column:NAME or column:NAME:VALUE, such as month=900 or "
            f"column:campaign:autumn=100{wrong}"
        )

    def bounds(self, scope: str) -> bool:
        """Whether the budget bounds a scope."""
        prefix = f"{self.kind}:{self.name}:" if self.kind == "column" else f"{self.kind}:"
        if self.kind == "partition" and scope.startswith("table:"):
            # A run checks its budgets only against purchases of its own table.
            prefix = scope[: scope.index(":", len("table:")) + 1] + prefix
        if self.value is None:
            return scope.startswith(prefix)
        return scope == scope_name(f"{prefix}{self.value}")


def scope_name(text: str) -> str:
    """Return a scope as the journal keeps it: bounded, and valid text in every database."""
    if not text.isascii():
        text = text.encode("utf-8", "replace").decode("utf-8")
    text = text.replace("\x00", "\ufffd")
    if len(text) <= _MAX_SCOPE:
        return text
    return f"{text[:_KEPT_START]}~{hashlib.sha256(text.encode()).hexdigest()}"


def column_scope(name: str, value: str | None) -> str:
    """Return the scope of a value of a column; a null counts as the empty text."""
    return scope_name(f"column:{name}:{value or ''}")


def partition_scope(table_id: str, partition_key: str) -> str:
    """Return the scope of a partition of a prompt table."""
    prefix = f"table:{table_id}:" if table_id else ""
    return scope_name(f"{prefix}partition:{partition_key}")


def scopes_of(
    run_id: str,
    sent_at: datetime,
    partition_key: str,
    further: Iterable[str] = (),
    *,
    table_id: str = "",
) -> tuple[str, ...]:
    """Return the scopes of a purchase: its run, UTC day and month, its partition, and others.

    The partition's scope names its prompt table: tables that share a journal may have equal keys.
    """
    day = sent_at.astimezone(timezone.utc)
    month = f"{day.year:04}-{day.month:02}"
    return (
        f"run:{run_id}",
        f"day:{month}-{day.day:02}",
        f"month:{month}",
        partition_scope(table_id, partition_key),
        *further,
    )


@dataclass(frozen=True)
class Caps:
    """The most that may be committed, in units; None means no cap.

    ``run_units`` bounds one run, ``day_units`` all runs of a UTC day together. ``budgets`` count
    all runs that share the journal.
    """

    run_units: int | None = None
    day_units: int | None = None
    budgets: tuple[Budget, ...] = ()

    def limits(self, scope: str) -> Iterator[tuple[str, int]]:
        """Yield each limit of a scope as its name (``cap`` or ``budget``) and its units."""
        if self.run_units is not None and scope.startswith("run:"):
            yield "cap", self.run_units
        if self.day_units is not None and scope.startswith("day:"):
            yield "cap", self.day_units
        for budget in self.budgets:
            if budget.bounds(scope):
                yield "budget", budget.units


@dataclass(frozen=True)
class Commitment:
    """The units that a scope has committed, and how many of them are finally charged."""

    committed_units: int = 0
    spent_units: int = 0

    @property
    def reserved_units(self) -> int:
        """Units that are committed and not yet charged."""
        return self.committed_units - self.spent_units

    def plus(self, committed_units: int, spent_units: int = 0) -> Commitment:
        """Return the sum with these units, which may be negative."""
        return Commitment(self.committed_units + committed_units, self.spent_units + spent_units)


def expected_units(quality: str, highest_seen: Mapping[str, int]) -> int:
    """Return the highest expected price of an image of a quality, in units.

    The highest price that this account has paid; before its first answer, the published one. Never
    0: an unknown quality counts as the most expensive one.
    """
    return highest_seen.get(quality) or PUBLISHED_UNITS.get(quality, max(PUBLISHED_UNITS.values()))


def is_doubtful(units: int, quality: str, highest_seen: Mapping[str, int]) -> bool:
    """Whether a price is far from the published one and from all that were paid before.

    It counts as a mistake until a person accepts it: caps do not use it, and it is not remembered.
    """
    known = [PUBLISHED_UNITS.get(quality, 0), highest_seen.get(quality, 0)]
    known = [price for price in known if price > 0] or [expected_units(quality, {})]
    return units > DOUBTFUL_TIMES * max(known) or units * DOUBTFUL_TIMES < min(known)


def admit(
    caps: Caps,
    scopes: Iterable[str],
    committed: Callable[[str], Commitment],
    units: int,
    now: datetime,
) -> CapReached | None:
    """Return why a purchase does not fit under the caps, None if it does.

    ``scopes`` are those of the purchase. ``committed`` returns the commitment of a scope; it is
    called only for scopes with a limit.
    """
    for scope in scopes:
        for limit, limit_units in caps.limits(scope):
            found = committed(scope)
            if found.committed_units + units > limit_units:
                return _reached(limit, limit_units, scope, found, units=units, now=now)
    return None


def _reached(
    limit: str, limit_units: int, scope: str, found: Commitment, *, units: int, now: datetime
) -> CapReached:
    # People do not know the id of a table.
    shown = scope.split(":", 2)[2] if scope.startswith("table:") else scope
    kind = shown.partition(":")[0]
    frees = {
        "day": f"frees at {next_day(now):%Y-%m-%d %H:%M} UTC",
        "month": f"frees at {next_month(now):%Y-%m-%d %H:%M} UTC",
        "run": "frees when what it reserved is returned",
    }.get(kind, "frees when what is reserved is returned, or the budget is raised")
    name = f"the {kind} cap"
    if limit == "budget":
        of_kind = {"run": "a run", "partition": shown, "column": shown}
        name = f"the budget of {of_kind.get(kind, shown.replace(':', ' ', 1))}"
    return CapReached(
        f"{kind}_{limit}_reached",
        f"{name} of {credits_from_units(limit_units):g} credits leaves no room for "
        f"{credits_from_units(units):g} more: {credits_from_units(found.spent_units):g} spent, "
        f"{credits_from_units(found.reserved_units):g} reserved; it {frees}",
        scope,
        shown,
    )


def next_month(now: datetime) -> datetime:
    """Return when the next UTC month begins."""
    first = now.astimezone(timezone.utc).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return first.replace(year=first.year + first.month // 12, month=first.month % 12 + 1)


def next_day(now: datetime) -> datetime:
    """Return when the next UTC day begins."""
    today = now.astimezone(timezone.utc).replace(hour=0, minute=0, second=0, microsecond=0)
    return today + timedelta(days=1)


def committed_after(
    event: Event, before: State, committed_units: int, values: Mapping[str, object]
) -> int:
    """Return the units that a submission has committed after an event.

    ``values`` are the columns that the event sets. An amount that is not known stays committed.
    """
    if event in (Event.TURNED_AWAY, Event.REFUSED, Event.RELEASED) or (
        event is Event.DEFERRED and before is State.SUBMITTING
    ):
        return 0
    units = values.get(_SETTLED_BY.get(event, ""))
    return units if isinstance(units, int) else committed_units
