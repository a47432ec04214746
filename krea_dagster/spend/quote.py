"""What a run would buy, and for how much: said beforehand, from the journal alone. Pure.

What becomes of each request is asked of ``engine.policy.next_action``, the very function that
the run asks, so that quote and run cannot disagree.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from datetime import datetime
from enum import Enum
from typing import Any, Final

from krea_dagster.engine.budget import (
    CREDITS_PER_USD,
    Caps,
    Commitment,
    admit,
    expected_units,
    scopes_of,
)
from krea_dagster.engine.policy import (
    Fetch,
    Leave,
    MarkUnknown,
    Policy,
    Poll,
    Replay,
    Requeue,
    RetryState,
    Submit,
    next_action,
)
from krea_dagster.engine.record import Record, StoredImage
from krea_dagster.engine.states import State
from krea_dagster.models import credits_from_units

#: No cap: everything may be bought.
_NO_CAPS: Final = Caps()


class ExpectedOutcome(str, Enum):
    """What the next run does about a request. The text is a field of ``QuoteLine``."""

    #: Stored, and its file is there: nothing.
    REUSED = "reused"
    #: Stored, and its file is gone: it is fetched again, for nothing.
    REFETCHED = "refetched"
    #: Paid by an earlier run: its task is read and its image fetched.
    TAKEN_UP = "taken_up"
    #: Outcome unknown: the same POST is repeated with the same Idempotency-Key.
    REPLAYED = "replayed"
    #: Outcome unknown: a person decides.
    HELD = "held"
    #: Failed, refused or lost, and not asked for again.
    ENDED = "ended"
    #: Bought.
    TO_BUY = "to_buy"


@dataclass(frozen=True)
class Price:
    """What an image of a quality is expected to cost at most, in units.

    ``published`` says that this account was not seen to pay for one yet.
    """

    units: int
    published: bool


@dataclass(frozen=True)
class QuoteLine:
    """One partition and quality. Counts are rows, each sample of a row being one.

    ``asked`` is the sum of the seven after it. ``purchases`` counts distinct requests: rows
    that want the same picture share one, and it is counted where the first of them stands.
    ``units`` is what these purchases cost at most. Of them, ``deferred`` would be kept back by a
    cap, with ``deferred_units``. ``at_stake`` are requests whose outcome is unknown, at most
    ``at_stake_units``, the oldest since ``at_stake_since``.
    """

    partition_key: str
    quality: str
    asked: int = 0
    reused: int = 0
    refetched: int = 0
    taken_up: int = 0
    replayed: int = 0
    held: int = 0
    ended: int = 0
    to_buy: int = 0
    purchases: int = 0
    units: int = 0
    deferred: int = 0
    deferred_units: int = 0
    at_stake: int = 0
    at_stake_units: int = 0
    at_stake_since: datetime | None = None

    def __add__(self, other: QuoteLine) -> QuoteLine:
        """Two lines together, under the names of the first."""
        sums = {name: getattr(self, name) + getattr(other, name) for name in _COUNTS}
        times = [at for at in (self.at_stake_since, other.at_stake_since) if at is not None]
        return replace(self, **sums, at_stake_since=min(times, default=None))


_COUNTS: Final = tuple(item.name for item in fields(QuoteLine) if item.default == 0)


@dataclass(frozen=True)
class Quote:
    """What the next run would do, by partition and quality, in their order.

    ``prices`` are those that were counted with, by quality. ``cap`` says which cap would be
    reached, and when it frees.
    """

    lines: tuple[QuoteLine, ...]
    prices: Mapping[str, Price]
    credits_per_usd: float = CREDITS_PER_USD
    cap: str | None = None

    @property
    def total(self) -> QuoteLine:
        """All lines together."""
        return self._sum("", "", self.lines)

    def by_quality(self) -> list[QuoteLine]:
        """One line for each quality, all partitions together."""
        names = dict.fromkeys(line.quality for line in self.lines)
        return [
            self._sum("", name, (line for line in self.lines if line.quality == name))
            for name in names
        ]

    def by_partition(self) -> dict[str, QuoteLine]:
        """One line for each partition, all qualities together."""
        parts: dict[str, QuoteLine] = {}
        for line in self.lines:
            known = parts.get(line.partition_key, QuoteLine(line.partition_key, ""))
            parts[line.partition_key] = known + line
        return parts

    def usd(self, units: int) -> float:
        """Units of credit in US dollars."""
        return credits_from_units(units) / self.credits_per_usd

    @staticmethod
    def _sum(partition_key: str, quality: str, lines: Iterable[QuoteLine]) -> QuoteLine:
        return sum(lines, QuoteLine(partition_key, quality))


@dataclass(frozen=True)
class ImageGroup:
    """Some images of one partition and quality that stand alike.

    ``rows`` counts them, and ``requests`` those of them that are the first to ask for their
    request. ``record`` is what the journal knows of that request, None where it has never seen
    it; a record stands for one request alone. ``at_hand`` says that they are stored and whole,
    and ``scopes`` what a purchase of theirs counts for beside its run, day, month and partition.
    """

    partition_key: str
    quality: str
    rows: int = 1
    requests: int = 1
    record: Record | None = None
    at_hand: bool = False
    scopes: tuple[str, ...] = ()


def quote(
    asked: Iterable[ImageGroup],
    *,
    prices: Mapping[str, int],
    now: datetime,
    policy: Policy,
    holds: Callable[[StoredImage], bool],
    caps: Caps = _NO_CAPS,
    committed: Callable[[str], Commitment] = lambda _: Commitment(),
    credits_per_usd: float = CREDITS_PER_USD,
    table_id: str = "",
) -> Quote:
    """Say what a run over these images would do now, and what it would cost at most.

    ``prices`` is the journal's highest price for each quality, in units; a quality without one
    costs the published price. ``holds`` tells whether a stored image's file is at hand.
    ``caps`` are counted from what each scope has ``committed`` already (nothing by default), in
    the order of the images, for the prompt table ``table_id``. An unknown price or a capped
    purchase is counted as dear as it may be; a task that fails is not foreseen.
    """
    budget = _BudgetSimulation(caps, committed, prices, now, table_id)
    lines: dict[tuple[str, str], QuoteLine] = {}
    for images in asked:
        names = (images.partition_key, images.quality)
        if images.at_hand:
            fate = ExpectedOutcome.REUSED
        elif images.record is None:
            fate = ExpectedOutcome.TO_BUY
        else:
            fate = expected_outcome(images.record, now=now, policy=policy, holds=holds)
        rows: dict[str, Any] = {"asked": images.rows, fate.value: images.rows}
        known = lines.get(names) or QuoteLine(*names)
        lines[names] = known + QuoteLine("", "", **rows) + _money(fate, images, budget)
    return Quote(
        lines=tuple(lines[names] for names in sorted(lines)),
        prices={
            quality: Price(expected_units(quality, prices), not prices.get(quality))
            for quality in dict.fromkeys(quality for _, quality in lines)
        },
        credits_per_usd=credits_per_usd,
        cap=budget.reached,
    )


def expected_outcome(
    record: Record, *, now: datetime, policy: Policy, holds: Callable[[StoredImage], bool]
) -> ExpectedOutcome:
    """What a run that begins now does about a request."""
    if record.state is State.STORED:
        at_hand = record.image is not None and holds(record.image)
        return ExpectedOutcome.REUSED if at_hand else ExpectedOutcome.REFETCHED
    match next_action(record, RetryState(), now, policy, buying=True):
        case Submit() | Requeue():
            return ExpectedOutcome.TO_BUY
        case Replay():
            return ExpectedOutcome.REPLAYED
        case MarkUnknown():
            unknown = replace(record, state=State.UNKNOWN)
            return expected_outcome(unknown, now=now, policy=policy, holds=holds)
        case Poll() | Fetch():
            return ExpectedOutcome.TAKEN_UP
        case Leave() if record.state is State.UNKNOWN:
            return ExpectedOutcome.HELD
        case _:
            return ExpectedOutcome.ENDED


class _BudgetSimulation:
    """Admits purchases one after the other, as the journal will."""

    def __init__(
        self,
        caps: Caps,
        committed: Callable[[str], Commitment],
        prices: Mapping[str, int],
        now: datetime,
        table_id: str,
    ) -> None:
        self._table_id = table_id
        self._caps = caps
        self._read = committed
        self._sums: dict[str, Commitment] = {}
        self._prices = prices
        self._now = now
        self.reached: str | None = None

    def price(self, quality: str) -> int:
        return expected_units(quality, self._prices)

    def takes(self, units: int, purchases: int, images: ImageGroup) -> int:
        """Commit as many purchases of one price as there is room for; return their number."""
        scopes = scopes_of(
            "", self._now, images.partition_key, images.scopes, table_id=self._table_id
        )
        if self._refusal(scopes, units, 1) is None and (
            self._refusal(scopes, units, purchases) is None
        ):
            taken = purchases
        else:
            # The first that is refused: behind it, all of this price are.
            taken = bisect_left(
                range(purchases),
                1,
                key=lambda taken: self._refusal(scopes, units, taken + 1) is not None,
            )
            self.reached = self.reached or str(self._refusal(scopes, units, taken + 1))
        for scope in scopes:
            self._sums[scope] = self._committed(scope).plus(units * taken)
        return taken

    def _committed(self, scope: str) -> Commitment:
        if scope not in self._sums:
            self._sums[scope] = self._read(scope)
        return self._sums[scope]

    def _refusal(self, scopes: tuple[str, ...], units: int, number: int) -> object | None:
        """Return why the n-th of several purchases of one price is refused, if it is."""
        before = units * (number - 1)
        return admit(
            self._caps, scopes, lambda scope: self._committed(scope).plus(before), units, self._now
        )


def _money(fate: ExpectedOutcome, images: ImageGroup, budget: _BudgetSimulation) -> QuoteLine:
    """What the requests of some images add to the sums of their line."""
    price = budget.price(images.quality)
    if not images.requests:
        return QuoteLine("", "")
    match fate:
        case ExpectedOutcome.TO_BUY:
            kept_back = images.requests - budget.takes(price, images.requests, images)
            return QuoteLine(
                "",
                "",
                purchases=images.requests,
                units=price * images.requests,
                deferred=kept_back,
                deferred_units=price * kept_back,
            )
        case ExpectedOutcome.HELD | ExpectedOutcome.REPLAYED if images.record is not None:
            at_most = images.record.committed_units or price
            since = images.record.sent_at
            return QuoteLine("", "", at_stake=1, at_stake_units=at_most, at_stake_since=since)
        case _:
            return QuoteLine("", "")
