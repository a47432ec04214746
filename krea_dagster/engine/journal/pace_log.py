"""What the runs of a journal have learned about the rate limits of their accounts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from sqlalchemy import Connection, literal_column, select, update

from krea_dagster.engine.journal.database import DatabaseLog
from krea_dagster.engine.journal.schema import POSTGRES_NOW_US, api_keys, pace_leases, paces
from krea_dagster.engine.journal.sql import insertion
from krea_dagster.engine.pace_sharing import (
    LEASE_S,
    Lease,
    PaceEvent,
    PaceExchange,
    dump_history,
    load_history,
)

_SECOND_US: Final = 1_000_000


class PaceLog(DatabaseLog):
    """The paces and leases in a journal's database."""

    def exchange(
        self,
        api_key: str,
        mine: Lease,
        untold: Sequence[PaceEvent],
        monotonic: Callable[[], float],
    ) -> PaceExchange:
        """Share this run's answers and its lease with the other runs, and return theirs.

        ``api_key`` is a fingerprint. Keys of one account share one pace.
        """

        def write(connection: Connection) -> PaceExchange:
            key = select(api_keys.c.account).where(api_keys.c.fingerprint == api_key)
            account = connection.execute(key).scalar() or api_key
            new = insertion(connection, paces).values(account=account, kept="", at_us=0)
            connection.execute(new.on_conflict_do_nothing())
            this = paces.c.account == account
            row = connection.execute(select(paces).where(this).with_for_update()).one()
            now_us, now_s = self._now_us(connection, monotonic), monotonic()
            told = load_history(row.kept, (now_us - row.at_us) / _SECOND_US, now_s)
            columns = pace_leases.c
            others = connection.execute(
                select(columns.owner, columns.in_flight, columns.wants)
                .where(columns.account == account, columns.owner != mine.owner)
                .where(columns.at_us.between(now_us - int(LEASE_S * _SECOND_US), now_us))
            )
            found = tuple(Lease(*row) for row in others)
            told = told.among((mine, *found)).with_events(untold, now_s)
            kept = {"kept": dump_history(told, now_s), "at_us": now_us}
            connection.execute(update(paces).where(this).values(kept))
            lease = {
                "account": account,
                "in_flight": mine.in_flight,
                "wants": mine.wants,
                "at_us": now_us,
            }
            own = insertion(connection, pace_leases).values(owner=mine.owner, **lease)
            connection.execute(own.on_conflict_do_update(index_elements=["owner"], set_=lease))
            return PaceExchange(told.learned(), mine, found, len(untold), now_us / _SECOND_US)

        return self._database.write("share the pace in", write)

    def _now_us(self, connection: Connection, monotonic: Callable[[], float]) -> int:
        """Return the time of a clock that all runs share: the server's, or that of their host."""
        if self._database.sqlite:
            return int(monotonic() * _SECOND_US)
        now: Any = connection.execute(select(literal_column(POSTGRES_NOW_US))).scalar_one()
        return int(now)
