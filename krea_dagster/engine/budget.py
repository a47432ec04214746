"""Reserve before buying: what a purchase may cost, and whether the caps leave room for it. Pure.

Credits are committed when the intent to buy is written: first what the purchase is expected to
cost at most, then what the server says it reserved, at last what was charged; nothing, once it
is certain that it cost nothing. Caps bound what is committed, so that runs which share a
journal cannot pass them together.
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

#: Published: 68 credits cost one US dollar.
CREDITS_PER_USD: Final = 68.0


#: What a budget may be of; each of them is a scope of every purchase, but for ``column``.
KINDS: Final = ("run", "day", "month", "partition", "column")

#: Characters of a scope, and of its beginning where it is longer.
_MOST: Final = 300
_BEGINNING: Final = 200


@dataclass(frozen=True)
class Budget:
    """The most that a scope may commit, in units.

    ``kind`` is one of ``KINDS``. Without a ``value`` it bounds each run, day, month, partition, or
    value of the column ``name`` for itself; with one, only that partition or value.
    """

    kind: str
    units: int
    name: str = ""
    value: str | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``SCOPE=CREDITS``, such as ``month=900`` or ``column:campaign:autumn=100``.

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
            f"the budget {text!r} cannot be read; write SCOPE=CREDITS, with one of day, month, "
            "partition, partition:KEY, column:NAME or column:NAME:VALUE as the scope, such as "
            f"month=900 or column:campaign:autumn=100{wrong}"
        )

    def bounds(self, scope: str) -> bool:
        """Whether a scope is one of those that it bounds."""
        begin = f"{self.kind}:{self.name}:" if self.kind == "column" else f"{self.kind}:"
        table = ""
        if self.kind == "partition" and scope.startswith("table:"):
            # Only purchases of its own table are ever held against a budget.
            table = scope[: scope.index(":", len("table:")) + 1]
        if self.value is None:
            return scope.startswith(f"{table}{begin}")
        return scope == scope_name(f"{table}{begin}{self.value}")


def scope_name(text: str) -> str:
    """Return a scope as the journal has it: of bounded length, and as every database takes it."""
    if not text.isascii():
        text = text.encode("utf-8", "replace").decode("utf-8")
    text = text.replace("\x00", "\ufffd")
    if len(text) <= _MOST:
        return text
    return f"{text[:_BEGINNING]}~{hashlib.sha256(text.encode()).hexdigest()}"


def column_scope(name: str, value: str | None) -> str:
    """Return the scope of a value of a column; a null counts as the empty text."""
    return scope_name(f"column:{name}:{value or ''}")


def partition_scope(table_id: str, partition_key: str) -> str:
    """Return the scope of a partition of a prompt table."""
    begin = f"table:{table_id}:" if table_id else ""
    return scope_name(f"{begin}partition:{partition_key}")


def scopes_of(
    run_id: str,
    sent_at: datetime,
    partition_key: str,
    further: Iterable[str] = (),
    *,
    table_id: str = "",
) -> tuple[str, ...]:
    """Return all that a purchase counts for: its run, UTC day and month, its partition, further.

    A partition is one of a prompt table: two tables that share a journal may have the same keys.
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
    """The most that may be committed, in units; None where there is no cap.

    ``run_units`` bounds one run, ``day_units`` all runs of a UTC day together; ``budgets`` bound
    what they say, over all runs that share the journal.
    """

    run_units: int | None = None
    day_units: int | None = None
    budgets: tuple[Budget, ...] = ()

    def limits(self, scope: str) -> Iterator[tuple[str, int]]:
        """Yield what bounds a scope: what it is called, and how many units there may be."""
        if self.run_units is not None and scope.startswith("run:"):
            yield "cap", self.run_units
        if self.day_units is not None and scope.startswith("day:"):
            yield "cap", self.day_units
        for budget in self.budgets:
            if budget.bounds(scope):
                yield "budget", budget.units


@dataclass(frozen=True)
class Commitment:
    """What a scope has committed, and how much of that was charged for good. In units."""

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


#: How many times dearer or cheaper than every known price a price may be and be believed.
DOUBTFUL_TIMES: Final = 4


def is_doubtful(units: int, quality: str, highest_seen: Mapping[str, int]) -> bool:
    """Whether a price is far from what is published and from what was paid before.

    Such a one is a mistake until a person accepts it: it is not reserved by, nor remembered.
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
    """None where a purchase of so many units fits under the caps, else the reason why not.

    ``scopes`` are those of the purchase, and ``committed`` says what one has committed; it is
    asked only about scopes that something bounds.
    """
    for scope in scopes:
        for what, limit_units in caps.limits(scope):
            found = committed(scope)
            if found.committed_units + units > limit_units:
                said = f"{credits_from_units(limit_units):g} credits leaves no room for "
                said += f"{credits_from_units(units):g} more"
                return _reached(what, scope, found, said, now)
    return None


def _reached(what: str, scope: str, found: Commitment, said: str, now: datetime) -> CapReached:
    full = scope
    if scope.startswith("table:"):
        scope = scope.split(":", 2)[2]  # the id of a table says nothing to people
    kind = scope.partition(":")[0]
    frees = {
        "day": f"frees at {next_day(now):%Y-%m-%d %H:%M} UTC",
        "month": f"frees at {next_month(now):%Y-%m-%d %H:%M} UTC",
        "run": "frees when what it reserved is returned",
    }.get(kind, "frees when what is reserved is returned, or the budget is raised")
    name = f"the {kind} cap"
    if what == "budget":
        shown = scope if kind in ("partition", "column") else scope.replace(":", " ", 1)
        name = f"the budget of {shown}"
        if kind == "run":
            name = "the budget of a run"
    return CapReached(
        f"{kind}_{what}_reached",
        f"{name} of {said}: {credits_from_units(found.spent_units):g} spent, "
        f"{credits_from_units(found.reserved_units):g} reserved; it {frees}",
        full,
        scope,
    )


def next_month(now: datetime) -> datetime:
    """When the next UTC month begins."""
    first = now.astimezone(timezone.utc).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return first.replace(year=first.year + first.month // 12, month=first.month % 12 + 1)


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
        case Event.COMPLETED | Event.FOUND:
            charged = values.get("charged_units")
            return charged if isinstance(charged, int) else committed_units
        case _:
            return committed_units
