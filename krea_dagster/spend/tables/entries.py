"""The account's entries, and the refunds and corrections among them next to the purchases.

A refund or correction that names a purchase is attributed as that purchase is (partition, run,
columns), on its own day. One that names none belongs to a day only.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Final

import pyarrow as pa
from sqlalchemy import Connection

from krea_dagster.engine.journal.entry_log import counted_kinds, read_entries
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.models import UNITS_PER_CREDIT
from krea_dagster.spend.prices import CreditPrices
from krea_dagster.spend.tables.ledger import write_table
from krea_dagster.spend.tables.measures import CHANGES_CHARGE, CREDITS
from krea_dagster.spend.tables.sql import quoted

ENTRIES_NAME: Final = "spend/entries/entries.parquet"

_COLUMNS: Final[tuple[tuple[str, pa.DataType, str], ...]] = (
    ("entry_id", pa.string(), "Identity of the entry"),
    ("day", pa.date32(), "Day that it was entered for"),
    ("kind", pa.string(), "top-up, promotion, refund or correction"),
    ("counts_as", pa.string(), "The kind; of a reversal that of the entry that it reverses"),
    ("credits", CREDITS, "Credits; negative where they were taken"),
    ("paid", CREDITS, "What was paid for them, in the currency"),
    ("currency", pa.string(), "Currency of paid"),
    ("reference", pa.string(), "Reference of the document, such as an invoice's number"),
    ("note", pa.string(), "Note of the person who entered it"),
    ("idempotency_key", pa.string(), "Purchase that it belongs to; or null"),
    ("credit_price", pa.string(), "Price of a credit on its day, as in the ledger"),
    ("reverses", pa.string(), "Entry that it reverses; or null"),
    ("entered_at", pa.timestamp("us", tz="UTC"), "When it was entered, UTC"),
)

ENTRIES_SCHEMA: Final = pa.schema([pa.field(name, kind) for name, kind, _ in _COLUMNS])

#: What each column means, by name.
ENTRIES_DESCRIPTIONS: Final = {name: text for name, _, text in _COLUMNS}


def write_entries(storage: Storage, connection: Connection, prices: CreditPrices) -> None:
    """Write the journal's entries to their file, unless there are none."""
    entries = read_entries(connection)
    if not entries and storage.size_bytes(ENTRIES_NAME) is None:
        return
    kinds = counted_kinds(entries)
    rows = [
        {
            **vars(one),
            "counts_as": kinds[one.entry_id],
            "credit_price": str(prices.on(one.day)),
            "credits": _decimal(one.units),
            "paid": None if one.paid_units is None else _decimal(one.paid_units),
        }
        for one in entries
    ]
    table = pa.Table.from_pylist(rows, ENTRIES_SCHEMA)
    write_table(storage, ENTRIES_NAME, ENTRIES_SCHEMA, iter([table]))


def _decimal(units: int) -> Decimal:
    return Decimal(units) / UNITS_PER_CREDIT


#: What a refund has of its purchase: all that sums can be grouped by.
_OF_PURCHASE: Final = (
    *("run_id", "partition_key", "prompt_table", "table_id", "prompt_id", "sample"),
    *("attribution", "attributes", "asset", "job", "backfill", "user", "tags", "attempt"),
    *("request_key", "task_id", "model", "quality", "size", "seed", "billing_rule", "user_group"),
)


def charges_sql(*, has_refunds: bool) -> str:
    """Return the definition of the view ``charges``: purchases, and what changed their charges."""
    if not has_refunds:
        return "SELECT *, CAST(0 AS DECIMAL(18, 4)) AS credits_refunded FROM ledger"
    of_purchase = ", ".join(f"ledger.{quoted(name)}" for name in _OF_PURCHASE)
    return f"""
        SELECT *, CAST(0 AS DECIMAL(18, 4)) AS credits_refunded FROM ledger
        UNION ALL BY NAME
        SELECT entries.day, entries.idempotency_key, {of_purchase},
            entries.credits AS credits_refunded,
            coalesce(ledger.credit_price, entries.credit_price) AS credit_price
        FROM entries LEFT JOIN ledger USING (idempotency_key)
        WHERE {CHANGES_CHARGE}
    """
