"""What scopes such as a day have committed, and whether a purchase is admitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final

from sqlalchemy import Connection

from krea_dagster.engine.budget import (
    Caps,
    Commitment,
    admit,
    committed_after,
    expected_units,
    is_doubtful,
    scopes_of,
)
from krea_dagster.engine.journal.changes import AppliedChange, Change
from krea_dagster.engine.journal.sql import (
    active_stop,
    add_to_commitments,
    commitment_of,
    known_prices,
    upsert_prices,
)
from krea_dagster.engine.policy import PRICE_DOUBTED
from krea_dagster.engine.record import Record
from krea_dagster.engine.states import Event
from krea_dagster.errors import RunStopped
from krea_dagster.models import credits_text


class CommitmentLedger:
    """The sums that a batch of changes reads and updates, in one transaction.

    ``launch`` is the launch that the run ``run_id`` is a shard of.
    """

    def __init__(
        self,
        connection: Connection,
        caps: Caps,
        *,
        run_id: str,
        launch: str,
    ) -> None:
        self._connection = connection
        self._caps = caps
        self._capped = caps != Caps()
        self._run_id = run_id
        self._launch = launch
        self._deltas: dict[str, Commitment] = {}
        self._found: dict[str, Commitment] = {}
        self._prices: dict[str, int] | None = None
        self._new_prices: dict[str, tuple[int, int | None, int, datetime]] = {}
        self._doubts: dict[str, RunStopped] = {}
        self._stop: RunStopped | None = None
        self._stop_read = False

    def lock(self, changes: Sequence[Change], present: Mapping[str, Record]) -> None:
        """Lock the sums that these changes read or update.

        All at once and in order, so that two writers with different caps do not deadlock.
        """
        if not self._capped:
            return  # then they are only updated, which happens in order
        scopes: set[str] = set()
        for change in changes:
            before = present.get(change.request_key)
            if change.event is Event.SUBMITTING:
                scopes.update(self._scopes_of_intent(change))
            elif before is not None:
                scopes.update(_scopes_of(before))
        # Written before they are read, so that writers of one scope wait for each other.
        nothing = [
            {"scope": scope, "committed_units": 0, "spent_units": 0} for scope in sorted(scopes)
        ]
        if nothing:
            add_to_commitments(self._connection, nothing)

    def admit(self, change: Change, before: Record) -> int:
        """Return the units that a purchase commits. Raises BuyingClosed if it is not admitted."""
        at = change.at
        if (stop := self._stopped(at)) is not None:
            raise stop
        units = expected_units(before.request.quality, self._highest())
        if (doubt := self._doubts.get(before.request.quality)) is not None:
            raise doubt
        if self._capped:
            scopes = self._scopes_of_intent(change)
            if (reached := admit(self._caps, scopes, self._committed, units, at)) is not None:
                raise reached
        return units

    def settle(self, change: Change, before: Record) -> int:
        """Return the units that the request's submission commits after an event."""
        if change.values.get("replayed"):
            return 0  # another journal has bought it, and counts it
        units = change.values.get("reserved_units")
        told = units if change.event is Event.ACCEPTED and isinstance(units, int) else 0
        if told > 0 and not self._is_plausible(told, before.request.quality, change.at):
            return before.committed_units
        return committed_after(change.event, before.state, before.committed_units, change.values)

    def move(self, step: AppliedChange) -> None:
        """Add what a step commits and spends to the sums."""
        after = step.after
        # From the submission's row: one that ended without a known charge stays committed.
        columns = step.opens or step.submission
        earlier = 0 if step.opens else step.before.committed_units
        committed = columns.get("committed_units", earlier) - earlier
        spent = 0
        if step.change.event in (Event.COMPLETED, Event.FOUND):
            spent = step.change.values.get("charged_units") or 0
        if committed or spent:
            # An event that ends the submission leaves the request without one: use the one before.
            for scope in _scopes_of(after) or _scopes_of(step.before):
                delta = self._deltas.get(scope, Commitment())
                self._deltas[scope] = delta.plus(committed, spent)

    def write(self) -> None:
        """Write the sums and the prices that have changed."""
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
            add_to_commitments(self._connection, moved)
        seen = [
            {
                "quality": quality,
                "highest_units": self._highest().get(quality, 0) or expected_units(quality, {}),
                "latest_units": units,
                "doubted_units": doubted,
                "doubted_in_row": in_row,
                "seen_at": at,
            }
            for quality, (units, doubted, in_row, at) in sorted(self._new_prices.items())
        ]
        if seen:
            upsert_prices(self._connection, seen)

    def _scopes_of_intent(self, change: Change) -> tuple[str, ...]:
        values = change.values
        own = values.get("scopes", ())
        return scopes_of(
            self._run_id,
            change.at,
            values.get("partition_key", ""),
            own,
            table_id=values.get("table_id", ""),
        )

    def _committed(self, scope: str) -> Commitment:
        if scope not in self._found:
            self._found[scope] = Commitment(*commitment_of(self._connection, scope))
        delta = self._deltas.get(scope, Commitment())
        return self._found[scope].plus(delta.committed_units, delta.spent_units)

    def _highest(self) -> dict[str, int]:
        if self._prices is None:
            self._prices = {}
            for quality, highest, doubted, in_row in known_prices(self._connection):
                self._prices[quality] = highest
                if doubted is not None and in_row >= DOUBTED_IN_ROW:
                    self._doubts[quality] = price_doubted(quality, doubted, in_row)
        return self._prices

    def _is_plausible(self, units: int, quality: str, at: datetime) -> bool:
        """Note a price, and return whether it is plausible (``budget.is_doubtful``)."""
        highest = self._highest()
        latest, doubted, in_row, _ = self._new_prices.get(
            quality, (highest.get(quality, 0), None, 0, at)
        )
        if is_doubtful(units, quality, highest):
            self._new_prices[quality] = (latest, units, in_row + 1, at)
            return False
        self._new_prices[quality] = (units, doubted, 0, at)
        highest[quality] = max(units, highest.get(quality, 0))
        return True

    def _stopped(self, at: datetime) -> RunStopped | None:
        if not self._stop_read:
            self._stop_read = True
            found = active_stop(self._connection, self._launch, at)
            self._stop = None if found is None else RunStopped(*found)
        return self._stop


def _scopes_of(record: Record) -> tuple[str, ...]:
    """Return the scopes of a request's present submission, if it has one."""
    if record.sent_at is None:
        return ()
    return scopes_of(
        str(record.run_id),
        record.sent_at,
        record.bought_for or "",
        record.scopes,
        table_id=record.bought_for_table,
    )


#: Implausible prices in a row after which buying stops.
DOUBTED_IN_ROW: Final = 3


def price_doubted(quality: str, units: int, in_row: int) -> RunStopped:
    """Return the error that stops buying a quality until a person has checked its price."""
    return RunStopped(
        PRICE_DOUBTED,
        f"EvoLink has reported a price far from the expected one for a {quality} image {in_row} "
        f"times in a row, most recently {credits_text(units)} credits. If the price is right, run "
        f"`krea-dagster accept price {quality}`; otherwise run the same command with --dismiss",
    )
