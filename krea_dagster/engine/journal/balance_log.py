"""The balances that the accounts reported, and what was committed with their keys.

An account is the set of its API keys. A reading whose key is not known belongs to the account if
there is only one; else it is left out, so that balances of different accounts are never mixed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Final

from sqlalchemy import BigInteger, Connection, func, select, type_coerce

from krea_dagster.engine.journal.database import DatabaseLog
from krea_dagster.engine.journal.entry_log import read_entries
from krea_dagster.engine.journal.purchase_reads import DAY_US
from krea_dagster.engine.journal.rows import AccountReading
from krea_dagster.engine.journal.schema import (
    account_readings,
    api_keys,
    microseconds,
    submissions,
    time_of,
)


@dataclass(frozen=True)
class AccountHistory:
    """An account's balance over time, in units.

    Attributes:
        account: The fingerprint of one of its keys.
        readings: What it reported, in order; at least one reading.
        committed: What was committed with its keys, by UTC day.
        since_units: What of it was committed after the last reading.
        entered_units: Credits that a person entered for days after that of the last reading.
    """

    account: str
    readings: Sequence[AccountReading]
    committed: Mapping[date, int]
    since_units: int = 0
    entered_units: int = 0


class BalanceLog(DatabaseLog):
    """The balances in a journal's database."""

    def accounts(self) -> list[AccountHistory]:
        """Return the accounts that were read, the one read last first. Raises JournalError.

        Reads the money of all purchases once for each account.
        """
        with self._database.read() as connection:
            readings, of_keys = _readings(connection)
            is_one = len(readings) < 2
            entries = read_entries(connection) if is_one else []
            found = []
            for account, of_account in readings.items():
                last = of_account[-1].at
                keys = None if is_one else [key for key, of in of_keys.items() if of == account]
                committed, since_units = _committed(connection, keys, microseconds(last))
                entered = sum(one.units for one in entries if one.day > last.date())
                found.append(AccountHistory(account, of_account, committed, since_units, entered))
        return sorted(found, key=lambda one: one.readings[-1].at, reverse=True)


def _readings(
    connection: Connection,
) -> tuple[dict[str, list[AccountReading]], Mapping[str, str]]:
    """Return the readings by account, and the account of each key."""
    of_keys = {row.fingerprint: row.account for row in connection.execute(_KEYS)}
    accounts = set(of_keys.values())
    only = next(iter(accounts), "") if len(accounts) < 2 else None
    found: defaultdict[str, list[AccountReading]] = defaultdict(list)
    for row in connection.execute(_READINGS):
        account = of_keys.get(row.api_key or "", only)
        if account is not None:
            found[account].append(AccountReading(*row))
    return found, of_keys


def _committed(
    connection: Connection, keys: Sequence[str] | None, last_us: int
) -> tuple[dict[date, int], int]:
    """Return what was committed with some keys, or all (None): by day, and after a time."""
    sent_at: Any = type_coerce(submissions.c.sent_at, BigInteger)
    day, is_later = (sent_at - sent_at % DAY_US).label("day"), (sent_at > last_us).label("later")
    units = func.sum(submissions.c.committed_units).label("units")
    query = select(day, is_later, units).group_by(day, is_later)
    if keys is not None:
        query = query.where(submissions.c.api_key.in_(keys))
    by_day: defaultdict[date, int] = defaultdict(int)
    since_units = 0
    for row in connection.execute(query):
        by_day[time_of(int(row.day)).date()] += int(row.units)
        since_units += int(row.units) if row.later else 0
    return dict(by_day), since_units


_KEYS: Final = select(api_keys.c.fingerprint, api_keys.c.account)
_READINGS: Final = select(
    account_readings.c.at,
    account_readings.c.run_id,
    account_readings.c.used_units,
    account_readings.c.remaining_units,
    account_readings.c.api_key,
).order_by(account_readings.c.at, account_readings.c.id)
