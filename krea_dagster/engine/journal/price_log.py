"""The prices that EvoLink has reported, and a person's decision about an implausible one."""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection, select, update

from krea_dagster.engine.journal.claim_log import ClaimLog
from krea_dagster.engine.journal.database import Database, DatabaseLog
from krea_dagster.engine.journal.rows import CHARGES, Charge, charge_from_row, scopes_of_charge
from krea_dagster.engine.journal.schema import commitments, prices, requests, submissions
from krea_dagster.engine.states import State
from krea_dagster.errors import ConfigError

#: States after which a purchase has its final charge.
_SETTLED: Final = (State.COMPLETED, State.STORED, State.EXPIRED)


class PriceLog(DatabaseLog):
    """The price of each quality in a journal's database, in units."""

    def __init__(self, database: Database, claims: ClaimLog) -> None:
        super().__init__(database)
        self._claims = claims

    def highest(self) -> dict[str, int]:
        """Return the highest plausible price of each quality."""
        rows = self._database.fetch(select(prices.c.quality, prices.c.highest_units))
        return {row.quality: row.highest_units for row in rows}

    def accept(self, quality: str, at: datetime) -> tuple[int, int]:
        """Accept the implausible price of a quality; return it, and how many purchases it settles.

        Raises ConfigError if there is no such price, or if a run works with such purchases.
        """

        def write(connection: Connection) -> tuple[int, int]:
            units = connection.execute(
                select(prices.c.doubted_units).where(prices.c.quality == quality).with_for_update()
            ).scalar()
            if units is None:
                raise ConfigError(
                    f"no price of {quality} waits to be accepted in the journal "
                    f"{self._database.where}"
                )
            connection.execute(
                update(prices)
                .where(prices.c.quality == quality)
                .values(
                    highest_units=units, latest_units=units, doubted_units=None, doubted_in_row=0
                )
            )
            waiting = CHARGES.where(
                requests.c.quality == quality,
                submissions.c.reserved_units == units,
                submissions.c.charged_units.is_(None),
                submissions.c.replayed.is_(False),
            )
            charges = [charge_from_row(row) for row in connection.execute(waiting)]
            if self._claims.any_alive(connection, [charge.request_key for charge in charges]):
                raise ConfigError(
                    "a run is working with purchases at that price. Nothing was changed. Wait "
                    "until it has ended"
                )
            _settle(connection, charges, units, at)
            return units, sum(charge.state in _SETTLED for charge in charges)

        return self._database.write("accept a price in", write)

    def dismiss(self, quality: str) -> None:
        """Forget the implausible price of a quality, because it was a mistake."""
        forgotten = (
            update(prices)
            .where(prices.c.quality == quality)
            .values(doubted_units=None, doubted_in_row=0)
        )
        self._database.write("dismiss a price in", lambda connection: connection.execute(forgotten))


def _settle(connection: Connection, charges: list[Charge], units: int, at: datetime) -> None:
    """Write the price into these purchases and into the sums of their scopes."""
    committed: Counter[str] = Counter()
    spent: Counter[str] = Counter()
    for charge in charges:
        values: dict[str, Any] = {"committed_units": units, "expected_units": units}
        if charge.state in _SETTLED:
            values |= {"charged_units": units, "settled_at": at}
        connection.execute(
            update(submissions)
            .where(submissions.c.idempotency_key == charge.idempotency_key)
            .values(values)
        )
        for scope in scopes_of_charge(charge):
            committed[scope] += units - charge.committed_units
            spent[scope] += units if charge.state in _SETTLED else 0
    for scope in sorted(committed):
        connection.execute(
            update(commitments)
            .where(commitments.c.scope == scope)
            .values(
                committed_units=commitments.c.committed_units + committed[scope],
                spent_units=commitments.c.spent_units + spent[scope],
            )
        )
