"""The balance of the accounts over time: the view ``balance``."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from itertools import pairwise
from typing import Final

import pyarrow as pa

from krea_dagster.engine.journal.balance_log import AccountHistory
from krea_dagster.models import UNITS_PER_CREDIT
from krea_dagster.spend.tables.measures import CREDITS

_COLUMNS: Final[tuple[tuple[str, pa.DataType, str], ...]] = (
    ("account", pa.string(), "Fingerprint of one of the account's API keys"),
    ("read_at", pa.timestamp("us", tz="UTC"), "When a run read the account, UTC"),
    ("run_id", pa.string(), "Run that read it"),
    ("credits_remaining", CREDITS, "Credits that were left"),
    (
        "credits_risen",
        CREDITS,
        "Rise since the reading before: a top-up, or credits that were reserved and returned",
    ),
)

BALANCE_SCHEMA: Final = pa.schema([pa.field(name, kind) for name, kind, _ in _COLUMNS])

#: What each column means, by name.
BALANCE_DESCRIPTIONS: Final = {name: text for name, _, text in _COLUMNS}


def balance_table(accounts: Sequence[AccountHistory]) -> pa.Table:
    """Return one row for each reading of each account, in order."""
    rows = [
        {
            "account": one.account,
            "read_at": reading.at,
            "run_id": reading.run_id,
            "credits_remaining": Decimal(reading.remaining_units) / UNITS_PER_CREDIT,
            "credits_risen": Decimal(risen) / UNITS_PER_CREDIT,
        }
        for one in accounts
        for reading, risen in zip(one.readings, rises(one), strict=True)
    ]
    return pa.Table.from_pylist(rows, BALANCE_SCHEMA)


def rises(account: AccountHistory) -> list[int]:
    """Return by how many units the balance has risen at each reading."""
    units = [reading.remaining_units for reading in account.readings]
    return [0, *(max(0, after - before) for before, after in pairwise(units))]
