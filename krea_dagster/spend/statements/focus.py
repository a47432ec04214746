"""Statements in the columns of FOCUS 1.2, the FinOps Open Cost and Usage Specification.

Purchases draw on prepaid credits: their rows (Usage) have an effective cost, and are billed with 0.
What is billed are the top-ups (Purchase). Promotions and refunds are Credit, corrections
Adjustment; their costs are those of the charges that they give back, and nothing is billed. What
changes an earlier billing period has the ChargeClass Correction.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from krea_dagster.models import MODEL
from krea_dagster.spend.statements.statement import STATEMENT_SCHEMA
from krea_dagster.spend.tables.measures import CREDITS, MONEY
from krea_dagster.spend.tables.sql import DuckDB, text_literal, units_of
from krea_dagster.spend.text import rounded

_TIME: Final = pa.timestamp("ms", tz="UTC")
_TEXT: Final = pa.string()
_NONE: Final = "NULL"
#: Not of an adjustment, whose quantity and unit price need not fit its cost.
_USED: Final = "category = 'Usage' AND NOT adjusts"
_BOUGHT: Final = "category = 'Purchase'"


def _if(condition: str, value: str, other: str = _NONE) -> str:
    return f"CASE WHEN {condition} THEN {value} ELSE {other} END"


_COST: Final = _if(_BOUGHT, "paid", "cost")
_UNIT: Final = _if(_BOUGHT, "unit_price", _if(_USED, "cost"))
_CREDIT_UNIT: Final = _if(_BOUGHT, "unit_price", _if(_USED, "credits_charged"))
_SKU: Final = _if(_BOUGHT, "'evolink-credits'", _if("category = 'Usage'", f"'{MODEL}-' || quality"))

#: Each column: its type, and its expression over the rows of statements. FOCUS's columns come
#: first, and then our own.
_COLUMNS: Final[Mapping[str, tuple[pa.DataType, str]]] = {
    "BilledCost": (MONEY, _if(_BOUGHT, "paid", "0")),
    "BillingAccountId": (_TEXT, "$account"),
    "BillingAccountName": (_TEXT, _NONE),
    "BillingCurrency": (_TEXT, _if(_BOUGHT, "paid_currency", "currency")),
    "BillingPeriodEnd": (_TIME, "CAST(billed_from + INTERVAL 1 MONTH AS TIMESTAMP)"),
    "BillingPeriodStart": (_TIME, "CAST(billed_from AS TIMESTAMP)"),
    "ChargeCategory": (_TEXT, "category"),
    "ChargeClass": (_TEXT, _if("adjusts OR of_month < statement", "'Correction'")),
    "ChargeDescription": (
        _TEXT,
        _if(
            "kind = 'purchase'",
            "'Image of ' || quality || ', ' || size",
            "upper(kind[1]) || kind[2:] || coalesce(': ' || note, '')",
        ),
    ),
    "ChargeFrequency": (_TEXT, _if("category = 'Usage'", "'Usage-Based'", "'One-Time'")),
    "ChargePeriodEnd": (_TIME, "CAST(day + INTERVAL 1 DAY AS TIMESTAMP)"),
    "ChargePeriodStart": (_TIME, "CAST(day AS TIMESTAMP)"),
    "ConsumedQuantity": (CREDITS, _if(_USED, "1")),
    "ConsumedUnit": (_TEXT, _if(_USED, "'Images'")),
    "ContractedCost": (MONEY, _COST),
    "ContractedUnitPrice": (MONEY, _UNIT),
    "EffectiveCost": (MONEY, _if(_BOUGHT, "0", "cost")),
    "InvoiceId": (_TEXT, _if(_BOUGHT, "reference")),
    "InvoiceIssuerName": (_TEXT, "'EvoLink'"),
    "ListCost": (MONEY, _COST),
    "ListUnitPrice": (MONEY, _UNIT),
    "PricingCategory": (_TEXT, _if("category IN ('Usage', 'Purchase')", "'Standard'")),
    "PricingCurrency": (_TEXT, _if(_BOUGHT, "paid_currency", "'Credits'")),
    "PricingCurrencyContractedUnitPrice": (MONEY, _CREDIT_UNIT),
    "PricingCurrencyEffectiveCost": (
        MONEY,
        _if(_BOUGHT, "0", "credits_charged - credits_refunded"),
    ),
    "PricingCurrencyListUnitPrice": (MONEY, _CREDIT_UNIT),
    "PricingQuantity": (CREDITS, _if(_BOUGHT, "credits_bought", _if(_USED, "1"))),
    "PricingUnit": (_TEXT, _if(_BOUGHT, "'Credits'", _if(_USED, "'Images'"))),
    "ProviderName": (_TEXT, "'EvoLink'"),
    "PublisherName": (_TEXT, "'Krea'"),
    "ServiceCategory": (_TEXT, "'AI and Machine Learning'"),
    "ServiceName": (_TEXT, "'Krea 2 Turbo'"),
    "ServiceSubcategory": (_TEXT, "'Generative AI'"),
    "SkuId": (_TEXT, _SKU),
    "SkuMeter": (_TEXT, _if(f"{_SKU} IS NULL", _NONE, _if(_BOUGHT, "'Credits'", "'Images'"))),
    "SkuPriceDetails": (_TEXT, _NONE),
    "SkuPriceId": (_TEXT, _if(f"{_BOUGHT} OR {_USED}", f"{_SKU} || '@' || {_CREDIT_UNIT}")),
    "Tags": (
        _TEXT,
        _if(
            "attributes IS NULL",
            "tags",
            _if(
                "tags IS NULL", "attributes", "CAST(json_merge_patch(tags, attributes) AS VARCHAR)"
            ),
        ),
    ),
    "x_Credits": (
        CREDITS,
        "credits_charged - credits_refunded - credits_bought - credits_given",
    ),
    "x_FactId": (_TEXT, "fact_id"),
    "x_Kind": (_TEXT, "kind"),
    "x_PartitionKey": (_TEXT, "partition_key"),
    "x_PromptId": (_TEXT, "prompt_id"),
    "x_Reference": (_TEXT, "reference"),
    "x_RunId": (_TEXT, "run_id"),
    "x_TaskId": (_TEXT, "task_id"),
}

FOCUS_SCHEMA: Final = pa.schema([pa.field(name, kind) for name, (kind, _) in _COLUMNS.items()])

_CATEGORY: Final = """
    CASE WHEN kind = 'purchase' THEN 'Usage' WHEN credits_bought <> 0 THEN 'Purchase'
    WHEN kind = 'correction' AND credits_given = 0 THEN 'Adjustment' ELSE 'Credit' END
"""


def focus_table(duck: DuckDB, statements: Mapping[str, pa.Table], account: str) -> pa.Table:
    """Return the rows of statements, by their months, in FOCUS's columns.

    Purchases without a known charge have no row, and neither has a top-up without a price. In
    ``duck`` tables are made for it.
    """
    months = [(month, rows) for month, rows in statements.items() if rows.num_rows]
    rows = pa.concat_tables(
        [
            STATEMENT_SCHEMA.append(pa.field("statement", _TEXT)).empty_table(),
            *(
                rows.append_column("statement", pa.repeat(pa.scalar(month), rows.num_rows))
                for month, rows in months
            ),
        ],
        promote_options="default",  # files of older versions lack columns
    )
    duck.register("statement_rows", rows)
    duck.register("unit_prices", _unit_prices(rows))
    columns = ", ".join(
        f"CAST({sql} AS {_SQL_TYPES[kind]}) AS {name}" for name, (kind, sql) in _COLUMNS.items()
    ).replace("$account", text_literal(account))
    found = duck.sql(
        f"""
        SELECT {columns} FROM (
            SELECT *, {_CATEGORY} AS category, CAST(statement || '-01' AS DATE) AS billed_from
            FROM statement_rows LEFT JOIN unit_prices USING (fact_id)
        )
        WHERE credits_charged <> 0 OR credits_refunded <> 0 OR credits_given <> 0
            OR (credits_bought <> 0 AND paid_currency IS NOT NULL)
        ORDER BY BillingPeriodStart, ChargePeriodStart, x_Kind, x_FactId
        """
    ).to_arrow_table()
    arrays = [column.cast(field.type) for column, field in zip(found, FOCUS_SCHEMA, strict=True)]
    return pa.table(arrays, schema=FOCUS_SCHEMA)


_SQL_TYPES: Final = {
    MONEY: "DECIMAL(38, 16)",
    CREDITS: "DECIMAL(18, 4)",
    _TEXT: "VARCHAR",
    _TIME: "TIMESTAMP_MS",
}


def _unit_prices(rows: pa.Table) -> pa.Table:
    """Return what a credit of each top-up cost, by its entry."""
    names = ("fact_id", "credits_bought", "paid")
    priced = {
        fact: rounded(Fraction(units_of(paid), units_of(bought)), MONEY.scale)
        for fact, bought, paid in zip(*(rows[name].to_pylist() for name in names), strict=True)
        if bought
    }
    return pa.table(
        {
            "fact_id": pa.array(list(priced), _TEXT),
            "unit_price": pa.array(list(priced.values()), MONEY),
        }
    )


def as_csv(table: pa.Table) -> bytes:
    """Return a table as CSV: exact decimals, times as FOCUS writes them, nothing for null."""
    columns = [_texts(column) for column in table.columns]
    sink = pa.BufferOutputStream()
    csv.write_csv(pa.table(columns, names=table.column_names), sink)
    return bytes(sink.getvalue())


def _texts(column: pa.ChunkedArray) -> pa.Array:
    if pa.types.is_timestamp(column.type):
        return pc.strftime(column.cast(pa.timestamp("s", tz="UTC")), "%Y-%m-%dT%H:%M:%SZ")
    if pa.types.is_decimal(column.type):
        return pa.array([None if one is None else f"{one:f}" for one in column.to_pylist()], _TEXT)
    return column
