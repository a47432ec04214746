"""The statement of a month: what the ledger and the account's entries say, against what was stated.

A statement has a row for each purchase and entry of its month, and one for each earlier fact that
is now different from all earlier statements together: an adjustment. So the sum of the statements
is what the ledger says when the last of them is made, however facts and closes come.
"""

from __future__ import annotations

import hashlib
import io
from calendar import monthrange
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from krea_dagster.spend.prices import CreditPrice
from krea_dagster.spend.statements.variance import QualityCharge
from krea_dagster.spend.tables.measures import CHANGES_CHARGE, CREDITS, MONEY
from krea_dagster.spend.tables.sql import DuckDB, units_of
from krea_dagster.spend.text import rounded

_TEXTS: Final = (
    *("task_id", "prompt_id", "partition_key", "run_id", "quality", "size", "outcome"),
    *("attributes", "tags", "reference", "note", "paid_currency", "of_month"),
)
_MEANINGS: Final = {
    "reference": "Reference of the entry",
    "note": "Note of the entry",
    "paid_currency": "Currency of paid",
    "of_month": "UTC month of the purchase that it is, or that an entry belongs to",
}
_COLUMNS: Final[tuple[tuple[str, pa.DataType, str], ...]] = (
    ("month", pa.string(), "UTC month that the row is about, such as 2026-10"),
    ("adjusts", pa.bool_(), "Whether it changes what earlier statements say of an earlier month"),
    ("kind", pa.string(), "purchase, top-up, promotion, refund or correction"),
    ("fact_id", pa.string(), "Idempotency-Key of the purchase, or id of the entry"),
    ("day", pa.date32(), "UTC day of the purchase; day of the entry"),
    *((name, pa.string(), _MEANINGS.get(name, "As in the ledger")) for name in _TEXTS),
    ("credits_charged", CREDITS, "Credits charged; of an adjustment the change"),
    ("credits_refunded", CREDITS, "Credits refunded, and corrections; or the change"),
    ("credits_bought", CREDITS, "Credits bought"),
    ("credits_given", CREDITS, "Credits given"),
    ("credits_unknown", CREDITS, "Credits that may still be charged, when the month was closed"),
    ("paid", CREDITS, "What credits_bought cost, in paid_currency"),
    ("credit_price", pa.string(), "Price of a credit, as in the ledger"),
    ("currency", pa.string(), "Currency of cost"),
    ("cost", MONEY, "Charged minus refunded, at that price"),
)

STATEMENT_SCHEMA: Final = pa.schema([pa.field(name, kind) for name, kind, _ in _COLUMNS])

#: What each column means, by name.
STATEMENT_DESCRIPTIONS: Final = {name: text for name, _, text in _COLUMNS}

#: The columns that later statements may change.
_AMOUNTS: Final = (
    *("credits_charged", "credits_refunded", "credits_bought", "credits_given", "paid"),
)

#: All that statements are about: purchases and entries.
_FACTS: Final = f"""
    SELECT strftime(day, '%Y-%m') AS month, 'purchase' AS kind, idempotency_key AS fact_id, day,
        task_id, prompt_id, partition_key, run_id, quality, size, outcome, attributes, tags,
        credits_charged, credits_unknown, credit_price, strftime(day, '%Y-%m') AS of_month
    FROM ledger
    UNION ALL BY NAME
    SELECT strftime(entries.day, '%Y-%m') AS month, kind, entry_id AS fact_id, entries.day,
        task_id, prompt_id, partition_key, run_id, quality, size, attributes, tags,
        strftime(ledger.day, '%Y-%m') AS of_month, reference, note, paid,
        entries.currency AS paid_currency,
        if({CHANGES_CHARGE}, credits, 0) AS credits_refunded,
        if(counts_as = 'top-up', credits, 0) AS credits_bought,
        if(counts_as = 'promotion', credits, 0) AS credits_given,
        coalesce(ledger.credit_price, entries.credit_price) AS credit_price
    FROM entries LEFT JOIN ledger USING (idempotency_key)
"""


@dataclass(frozen=True)
class StatementSums:
    """The sums of a statement in units: of its month, and what it changes of earlier ones."""

    purchases: int
    charged_units: int
    refunded_units: int
    at_stake_units: int
    adjusted_charged_units: int
    adjusted_refunded_units: int


def months_of_facts(duck: DuckDB) -> list[str]:
    """Return the months with a purchase or an entry."""
    found = duck.sql(f"SELECT DISTINCT month FROM ({_FACTS}) ORDER BY month").fetchall()
    return [row[0] for row in found]


def statement_rows(duck: DuckDB, month: str, earlier: Sequence[pa.Table]) -> pa.Table:
    """Return the rows of a month's statement, after the ``earlier`` statements.

    ``duck`` has the views of the spend tables in UTC. Months that had no statement
    of their own before the last one are adjusted by this one.
    """
    stated = pa.concat_tables([STATEMENT_SCHEMA.empty_table(), *earlier], promote_options="default")
    duck.register("stated_rows", stated)
    described = [one for one in STATEMENT_SCHEMA.names if one not in (*_KEYS, *_AMOUNTS, *_MADE)]
    keys = ", ".join(_KEYS)
    sums = ", ".join(f"sum({name}) AS {name}" for name in _AMOUNTS)
    described_then = ", ".join(f"any_value({name}) AS {name}" for name in described)
    described_now = ", ".join(
        f"coalesce(any_value({name}) FILTER (is_now), any_value({name})) AS {name}"
        for name in described
    )
    changes = ", ".join(
        f"coalesce(sum({name}) FILTER (is_now), 0) - "
        f"coalesce(sum({name}) FILTER (NOT is_now), 0) AS {name}"
        for name in _AMOUNTS
    )
    found = duck.execute(
        f"""
        SELECT *, month < $month AS adjusts FROM (
            SELECT {keys}, {described_now}, {changes} FROM (
                SELECT *, true AS is_now FROM ({_FACTS}) WHERE month <= $month
                UNION ALL BY NAME
                SELECT {keys}, {sums}, {described_then}, false AS is_now
                FROM stated_rows GROUP BY {keys}
            ) GROUP BY {keys}
        ) WHERE month = $month OR {" OR ".join(f"{name} <> 0" for name in _AMOUNTS)}
        ORDER BY adjusts, month, day, kind, fact_id, credit_price
        """,
        {"month": month},
    ).to_arrow_table()
    duck.unregister("stated_rows")
    return _with_costs(found)


#: What a row is about. A fact whose price of a credit changed has a row at each price.
_KEYS: Final = ("month", "kind", "fact_id", "credit_price")
_MADE: Final = ("adjusts", "currency", "cost")


def _with_costs(rows: pa.Table) -> pa.Table:
    columns: dict[str, pa.Array] = {name: rows[name] for name in rows.column_names}
    prices = rows["credit_price"].to_pylist()
    amounts = zip(
        prices,
        rows["credits_charged"].to_pylist(),
        rows["credits_refunded"].to_pylist(),
        strict=True,
    )
    costs = [
        rounded(CreditPrice.parse(price).cost(units_of(charged) - units_of(refunded)), MONEY.scale)
        for price, charged, refunded in amounts
    ]
    columns["cost"] = pa.array(costs, MONEY)
    columns["currency"] = pa.array([price.partition("/")[2] for price in prices], pa.string())
    arrays = [columns[field.name].cast(field.type) for field in STATEMENT_SCHEMA]
    return pa.table(arrays, schema=STATEMENT_SCHEMA)


def sums_of(rows: pa.Table) -> StatementSums:
    """Return the sums of a statement's rows."""
    figures = dict.fromkeys(["charged", "refunded", "unknown"], 0)
    adjusted = dict(figures)
    names = ("credits_charged", "credits_refunded", "credits_unknown")
    purchases = 0
    columns = (rows[name].to_pylist() for name in ("adjusts", "kind", *names))
    for adjusts, kind, *amounts in zip(*columns, strict=True):
        into = adjusted if adjusts else figures
        for name, amount in zip(figures, amounts, strict=True):
            into[name] += units_of(amount)
        purchases += kind == "purchase" and not adjusts
    return StatementSums(
        purchases,
        figures["charged"],
        figures["refunded"],
        figures["unknown"],
        adjusted["charged"],
        adjusted["refunded"],
    )


def charges_by_quality(rows: pa.Table) -> Mapping[str, QualityCharge]:
    """Return the charged purchases of a statement's own month by quality."""
    found: dict[str, QualityCharge] = {}
    names = ("adjusts", "kind", "quality", "credits_charged")
    for adjusts, kind, quality, charged in zip(
        *(rows[name].to_pylist() for name in names), strict=True
    ):
        if kind == "purchase" and not adjusts and charged:
            known = found.get(quality, QualityCharge())
            found[quality] = QualityCharge(known.purchases + 1, known.units + units_of(charged))
    return found


def statement_file(rows: pa.Table, month: str) -> tuple[bytes, str]:
    """Return the Parquet file of a statement, and its SHA-256."""
    file = io.BytesIO()
    pq.write_table(rows.replace_schema_metadata({"statement": month}), file)
    data = file.getvalue()
    return data, hashlib.sha256(data).hexdigest()


def last_day(month: str) -> date:
    """Return the last day of a month."""
    first = date.fromisoformat(f"{month}-01")
    return first.replace(day=monthrange(first.year, first.month)[1])
