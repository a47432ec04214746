"""Within one transaction of the journal: what runs and days have committed, and who may buy."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any, Final

from sqlalchemy import Connection, select
from sqlalchemy.dialects import postgresql, sqlite

from krea_dagster.engine.budget import Caps, Commitment, admit, committed_after, expected_units
from krea_dagster.engine.changes import Step
from krea_dagster.engine.schema import commitments, prices, stops
from krea_dagster.engine.states import Event
from krea_dagster.errors import RunStopped

#: How long the account's stop holds for the other shards of a launch: long enough that all of
#: them see it, short enough that a launch which is taken up again after topping up may buy.
STOP_HOLDS_S: Final = 300.0


class Ledger:
    """The sums that a batch of changes reads and moves.

    ``run_id`` and ``launch`` name the run that writes, and the launch whose shard it is.
    """

    def __init__(self, connection: Connection, caps: Caps, *, run_id: str, launch: str) -> None:
        self._connection = connection
        self._caps = caps
        self._run_id = run_id
        self._launch = launch
        self._sqlite = connection.dialect.name == "sqlite"
        self._deltas: dict[str, Commitment] = {}
        self._found: dict[str, Commitment] = {}
        self._prices: dict[str, int] | None = None
        self._new_prices: dict[str, tuple[int, datetime]] = {}
        self._stop: RunStopped | None = None
        self._stop_read = False

    def admit(self, step: Step) -> Step:
        """Let a purchase commit what it may cost. Raises BuyingClosed where it may not."""
        if (stop := self._stopped(step.change.at)) is not None:
            raise stop
        units = expected_units(step.before.quality, self._highest())
        at = step.change.at
        run, day = self._committed(f"run:{self._run_id}"), self._committed(_day(at))
        if (reached := admit(self._caps, run, day, units, at)) is not None:
            raise reached
        after = replace(
            step.after,
            committed_units=units,
            expected_units=units,
            bought_by=self._run_id,
            sent_at=at,
        )
        return self._moved(replace(step, after=after))

    def settle(self, step: Step) -> Step:
        """Move the sums by what an event made certain."""
        change, before = step.change, step.before
        committed = committed_after(
            change.event, before.state, before.committed_units, change.values
        )
        if change.event is Event.ACCEPTED:
            self._price_seen(step)
        return self._moved(replace(step, after=replace(step.after, committed_units=committed)))

    def write(self) -> None:
        """Write the sums and the prices that have moved."""
        for scope, delta in sorted(self._deltas.items()):
            if delta != Commitment():
                self._add(scope, delta)
        for quality, (units, at) in self._new_prices.items():
            insert = self._insert()(prices).values(
                quality=quality, highest_units=units, latest_units=units, seen_at=at
            )
            highest = max(units, (self._prices or {}).get(quality, 0))
            self._connection.execute(
                insert.on_conflict_do_update(
                    index_elements=["quality"],
                    set_={"highest_units": highest, "latest_units": units, "seen_at": at},
                )
            )

    def _moved(self, step: Step) -> Step:
        before, after = step.before, step.after
        committed = after.committed_units - before.committed_units
        spent = 0
        if step.change.event is Event.COMPLETED:
            spent = step.change.values.get("charged_units") or 0
        if (committed or spent) and after.sent_at is not None:
            for scope in (f"run:{after.bought_by}", _day(after.sent_at)):
                delta = self._deltas.get(scope, Commitment())
                self._deltas[scope] = delta.plus(committed, spent)
        return step

    def _committed(self, scope: str) -> Commitment:
        if self._caps == Caps():
            return Commitment()
        if scope not in self._found:
            # Written before it is read, so that writers of one scope follow one another.
            self._add(scope, Commitment())
            row = self._connection.execute(
                select(commitments.c.committed_units, commitments.c.spent_units).where(
                    commitments.c.scope == scope
                )
            ).one()
            self._found[scope] = Commitment(*row)
        delta = self._deltas.get(scope, Commitment())
        return self._found[scope].plus(delta.committed_units, delta.spent_units)

    def _add(self, scope: str, delta: Commitment) -> None:
        insert = self._insert()(commitments).values(
            scope=scope,
            committed_units=delta.committed_units,
            spent_units=delta.spent_units,
        )
        self._connection.execute(
            insert.on_conflict_do_update(
                index_elements=["scope"],
                set_={
                    "committed_units": commitments.c.committed_units
                    + insert.excluded.committed_units,
                    "spent_units": commitments.c.spent_units + insert.excluded.spent_units,
                },
            )
        )

    def _highest(self) -> dict[str, int]:
        if self._prices is None:
            rows = self._connection.execute(select(prices.c.quality, prices.c.highest_units))
            self._prices = {row.quality: row.highest_units for row in rows}
        return self._prices

    def _price_seen(self, step: Step) -> None:
        units = step.change.values.get("reserved_units")
        if isinstance(units, int) and units > 0:
            quality = step.before.quality
            highest = self._highest()
            self._new_prices[quality] = (units, step.change.at)
            highest[quality] = max(units, highest.get(quality, 0))

    def _stopped(self, at: datetime) -> RunStopped | None:
        if not self._stop_read:
            self._stop_read = True
            row = self._connection.execute(
                select(stops.c.error_code, stops.c.error_message).where(
                    stops.c.launch == self._launch,
                    stops.c.at >= at - timedelta(seconds=STOP_HOLDS_S),
                )
            ).first()
            self._stop = None if row is None else RunStopped(row.error_code, row.error_message)
        return self._stop

    def _insert(self) -> Any:
        return sqlite.insert if self._sqlite else postgresql.insert


def _day(at: datetime) -> str:
    return f"day:{at.astimezone(timezone.utc):%Y-%m-%d}"
