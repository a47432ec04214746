"""The quote: what a run would buy, and its cost at most, from the journal alone. Pure.

The next step of each request comes from ``engine.policy.next_action``, which the run uses too, so
quote and run cannot disagree.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from datetime import datetime
from enum import Enum
from typing import Any, Final

from krea_dagster.engine.budget import (
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
from krea_dagster.spend.prices import PUBLISHED, CreditPrice

#: No cap: everything may be bought.
_NO_CAPS: Final = Caps()


class ExpectedOutcome(str, Enum):
    """What the next run does with a request. The text is a field of ``QuoteLine``."""

    #: Stored, and its file exists: nothing.
    REUSED = "reused"
    #: Stored, and its file is missing: it is fetched again, free of charge.
    REFETCHED = "refetched"
    #: Paid by an earlier run: its task is read and its image fetched.
    TAKEN_UP = "taken_up"
    #: Outcome unknown: the same POST is sent again with the same Idempotency-Key.
    REPLAYED = "replayed"
    #: Outcome unknown: a person decides.
    HELD = "held"
    #: Failed, refused or lost, and not requested again.
    ENDED = "ended"
    #: Bought.
    TO_BUY = "to_buy"


@dataclass(frozen=True)
class Price:
    """The most that an image of a quality is expected to cost, in units.

    ``published`` is the published price: this account has not paid for such an image yet.
    """

    units: int
    published: bool


@dataclass(frozen=True)
class QuoteLine:
    """The sums of one partition and quality. Counts are of rows; each sample of a row is one.

    ``asked`` is the sum of the seven counts after it. ``purchases`` counts distinct requests: rows
    with the same request share one, which belongs to the first of them. ``units`` is the cost of
    these purchases at most. Of them, a cap would defer ``deferred``, which cost ``deferred_units``.
    ``at_stake`` requests have an unknown outcome; they cost at most ``at_stake_units``, and the
    oldest was sent at ``at_stake_since``.
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
        """Return the sum of two lines, with the names of the first."""
        sums = {name: getattr(self, name) + getattr(other, name) for name in _COUNTS}
        times = [at for at in (self.at_stake_since, other.at_stake_since) if at is not None]
        return replace(self, **sums, at_stake_since=min(times, default=None))


_COUNTS: Final = tuple(item.name for item in fields(QuoteLine) if item.default == 0)


@dataclass(frozen=True)
class Quote:
    """What the next run would do, by partition and quality, in their order.

    ``prices`` are those that were used, by quality. ``cap`` says which cap would be reached, and
    when it has room again.
    """

    lines: tuple[QuoteLine, ...]
    prices: Mapping[str, Price]
    credit_price: CreditPrice = PUBLISHED.steps[0][1]
    cap: str | None = None

    @property
    def total(self) -> QuoteLine:
        """The sum of all lines."""
        return sum(self.lines, QuoteLine("", ""))

    def by_quality(self) -> list[QuoteLine]:
        """Return the sums of each quality, over all partitions."""
        sums: dict[str, QuoteLine] = {}
        for line in self.lines:
            sums[line.quality] = sums.get(line.quality, QuoteLine("", line.quality)) + line
        return list(sums.values())

    def by_partition(self) -> dict[str, QuoteLine]:
        """Return the sums of each partition, over all qualities."""
        sums: dict[str, QuoteLine] = {}
        for line in self.lines:
            key = line.partition_key
            sums[key] = sums.get(key, QuoteLine(key, "")) + line
        return sums

    def cost(self, units: int) -> float:
        """Return units in the currency of the price of a credit."""
        return float(self.credit_price.cost(units))


@dataclass(frozen=True)
class ImageGroup:
    """Rows of one partition and quality for which the next run does the same.

    ``rows`` counts them, and ``requests`` those that are the first with their request. ``record``
    is the journal's record of that request, None where it has none; a group with a record is one
    request. ``intact`` says that the images are stored and complete, and ``scopes`` are the budgets
    that a purchase counts for, in addition to its run, day, month and partition.
    """

    partition_key: str
    quality: str
    rows: int = 1
    requests: int = 1
    record: Record | None = None
    intact: bool = False
    scopes: tuple[str, ...] = ()


def quote(
    groups: Iterable[ImageGroup],
    *,
    prices: Mapping[str, int],
    now: datetime,
    policy: Policy,
    holds: Callable[[StoredImage], bool],
    caps: Caps = _NO_CAPS,
    committed: Callable[[str], Commitment] = lambda _: Commitment(),
    credit_price: CreditPrice = PUBLISHED.steps[0][1],
    table_id: str = "",
) -> Quote:
    """Return what a run over these images would do now, and its cost at most.

    ``prices`` is the journal's highest price for each quality, in units; a quality without one
    costs the published price. ``holds`` says whether a stored image's file exists. ``caps`` are
    compared with what each scope has ``committed`` already (nothing by default), in the order of
    the images, for the prompt table ``table_id``. Failures are not predicted: every purchase counts
    at its highest price.
    """
    budget = _BudgetSimulation(caps, committed, prices, now, table_id)
    lines: dict[tuple[str, str], QuoteLine] = {}
    for images in groups:
        names = (images.partition_key, images.quality)
        if images.intact:
            outcome = ExpectedOutcome.REUSED
        elif images.record is None:
            outcome = ExpectedOutcome.TO_BUY
        else:
            outcome = expected_outcome(images.record, now=now, policy=policy, holds=holds)
        rows: dict[str, Any] = {"asked": images.rows, outcome.value: images.rows}
        known = lines.get(names) or QuoteLine(*names)
        lines[names] = known + QuoteLine("", "", **rows) + _money(outcome, images, budget)
    return Quote(
        lines=tuple(lines[names] for names in sorted(lines)),
        prices={
            quality: Price(expected_units(quality, prices), not prices.get(quality))
            for quality in dict.fromkeys(quality for _, quality in lines)
        },
        credit_price=credit_price,
        cap=budget.reached,
    )


def expected_outcome(
    record: Record, *, now: datetime, policy: Policy, holds: Callable[[StoredImage], bool]
) -> ExpectedOutcome:
    """Return what a run that begins now does with a request."""
    if record.state is State.STORED:
        intact = record.image is not None and holds(record.image)
        return ExpectedOutcome.REUSED if intact else ExpectedOutcome.REFETCHED
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
            # After the first refused purchase, all of this price are refused.
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
        """Return why the n-th of several purchases of one price is refused; None if it is not."""
        before = units * (number - 1)
        return admit(
            self._caps, scopes, lambda scope: self._committed(scope).plus(before), units, self._now
        )


def _money(outcome: ExpectedOutcome, images: ImageGroup, budget: _BudgetSimulation) -> QuoteLine:
    """Return what the requests of a group add to the sums of their line."""
    price = budget.price(images.quality)
    if not images.requests:
        return QuoteLine("", "")
    match outcome:
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
