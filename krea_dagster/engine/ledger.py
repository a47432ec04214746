"""Within one transaction of the journal: what runs and days have committed, and who may buy."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Final

from krea_dagster.engine.budget import Caps, Commitment, admit, committed_after, expected_units
from krea_dagster.engine.changes import Change, Step
from krea_dagster.engine.record import Record
from krea_dagster.engine.statements import Cursor, Statements
from krea_dagster.engine.states import Event
from krea_dagster.errors import RunStopped

#: How long the account's stop holds for the other shards of a launch: long enough that all of
#: them see it, short enough that a launch which is taken up again after topping up may buy.
STOP_HOLDS_S: Final = 300.0


class Ledger:
    """The sums that a batch of changes reads and moves.

    ``run_id`` and ``launch`` name the run that writes, and the launch whose shard it is.
    """

    def __init__(
        self,
        cursor: Cursor,
        statements: Statements,
        caps: Caps,
        *,
        run_id: str,
        launch: str,
    ) -> None:
        self._cursor = cursor
        self._statements = statements
        self._caps = caps
        self._capped = caps != Caps()
        self._run_id = run_id
        self._launch = launch
        self._deltas: dict[str, Commitment] = {}
        self._found: dict[str, Commitment] = {}
        self._prices: dict[str, int] | None = None
        self._new_prices: dict[str, tuple[int, datetime]] = {}
        self._stop: RunStopped | None = None
        self._stop_read = False

    def admit(self, change: Change, before: Record) -> int:
        """What a purchase may cost and commits, in units. Raises BuyingClosed where it may not."""
        at = change.at
        if (stop := self._stopped(at)) is not None:
            raise stop
        units = expected_units(before.request.quality, self._highest())
        if self._capped:
            run, day = self._committed(f"run:{self._run_id}"), self._committed(_day(at))
            if (reached := admit(self._caps, run, day, units, at)) is not None:
                raise reached
        return units

    def settle(self, change: Change, before: Record) -> int:
        """What the request's submission commits, in units, after an event made it certain."""
        if change.event is Event.ACCEPTED:
            self._price_seen(change, before.request.quality)
        return committed_after(change.event, before.state, before.committed_units, change.values)

    def move(self, step: Step) -> None:
        """Move the sums by what a step commits and spends."""
        after = step.after
        committed = after.committed_units - step.before.committed_units
        spent = 0
        if step.change.event is Event.COMPLETED:
            spent = step.change.values.get("charged_units") or 0
        if (committed or spent) and after.sent_at is not None:
            for scope in (f"run:{after.run_id}", _day(after.sent_at)):
                delta = self._deltas.get(scope, Commitment())
                self._deltas[scope] = delta.plus(committed, spent)

    def write(self) -> None:
        """Write the sums and the prices that have moved."""
        moved = [
            {
                "scope": scope,
                "committed_units": delta.committed_units,
                "spent_units": delta.spent_units,
            }
            for scope, delta in sorted(self._deltas.items())
            if delta != Commitment()
        ]
        if moved:
            self._statements.commitment_sum.execute(self._cursor, moved)
        seen = [
            {
                "quality": quality,
                "highest_units": max(units, (self._prices or {}).get(quality, 0)),
                "latest_units": units,
                "seen_at": at,
            }
            for quality, (units, at) in sorted(self._new_prices.items())
        ]
        if seen:
            self._statements.price_seen.execute(self._cursor, seen)

    def _committed(self, scope: str) -> Commitment:
        if scope not in self._found:
            # Written before it is read, so that writers of one scope follow one another.
            nothing = {"scope": scope, "committed_units": 0, "spent_units": 0}
            self._statements.commitment_sum.execute(self._cursor, [nothing])
            (row,) = self._statements.commitment.find(self._cursor, {"wanted": scope})
            self._found[scope] = Commitment(*row)
        delta = self._deltas.get(scope, Commitment())
        return self._found[scope].plus(delta.committed_units, delta.spent_units)

    def _highest(self) -> dict[str, int]:
        if self._prices is None:
            self._prices = dict(self._statements.prices.find(self._cursor))
        return self._prices

    def _price_seen(self, change: Change, quality: str) -> None:
        units = change.values.get("reserved_units")
        if isinstance(units, int) and units > 0:
            highest = self._highest()
            self._new_prices[quality] = (units, change.at)
            highest[quality] = max(units, highest.get(quality, 0))

    def _stopped(self, at: datetime) -> RunStopped | None:
        if not self._stop_read:
            self._stop_read = True
            since = at - timedelta(seconds=STOP_HOLDS_S)
            wanted = {"wanted": self._launch, "since": since}
            found = self._statements.stop.find(self._cursor, wanted)
            self._stop = RunStopped(*found[0]) if found else None
        return self._stop


def _day(at: datetime) -> str:
    day = at.astimezone(timezone.utc)
    return f"day:{day.year:04}-{day.month:02}-{day.day:02}"
