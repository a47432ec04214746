"""The ledger: one row per purchase, a Parquet file per UTC month, made from the journal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import BinaryIO, Final

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from krea_dagster.engine.policy import REJECTED
from krea_dagster.engine.states import State
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.spend.prices import CreditPrice, CreditPrices
from krea_dagster.spend.tables.measures import CREDITS, MONEY
from krea_dagster.spend.tables.sql import at_purchase, quoted, units_of
from krea_dagster.spend.text import rounded

_TIME: Final = pa.timestamp("us", tz="UTC")

_COLUMNS: Final[tuple[tuple[str, pa.DataType, str], ...]] = (
    ("sent_at", _TIME, "When its first POST was about to be sent, UTC"),
    ("submitted_at", _TIME, "When EvoLink accepted it, UTC"),
    ("completed_at", _TIME, "When the task was first seen completed, UTC"),
    ("settled_at", _TIME, "When its charge was known, UTC"),
    ("day", pa.date32(), "UTC day of sent_at"),
    ("run_id", pa.string(), "Dagster run that bought it"),
    ("partition_key", pa.string(), "Dagster partition that it was bought for"),
    ("prompt_table", pa.string(), "Prompt table that it was bought for; null where not known"),
    ("table_id", pa.string(), "The prompt table's id in the journal; empty where not known"),
    ("prompt_id", pa.string(), "Row that it was bought for; null where it is not known"),
    ("sample", pa.int32(), "Which of the row's num_images this is, from 0"),
    ("attribution", pa.string(), "Where prompt_id is from: purchase, or today's manifest (today)"),
    ("attributes", pa.string(), "The row's columns of spend_by at the purchase, JSON; or null"),
    ("asset", pa.string(), "Dagster asset that bought it"),
    ("job", pa.string(), "Dagster job that bought it"),
    ("backfill", pa.string(), "Dagster backfill that bought it"),
    ("user", pa.string(), "User who launched the run, where known"),
    ("tags", pa.string(), "The run's tags of spend_tags, JSON; or null"),
    ("rows", pa.int32(), "Manifest rows that share it; 0 where no manifest lists it"),
    ("attempt", pa.int32(), "How often another image of this row was requested"),
    ("number", pa.int32(), "Which purchase of its request this is, from 1"),
    ("request_key", pa.string(), "Hash of everything that decides the image"),
    ("idempotency_key", pa.string(), "Idempotency-Key of the purchase"),
    ("task_id", pa.string(), "EvoLink's task"),
    ("model", pa.string(), "Model"),
    ("quality", pa.string(), "1K or 2K"),
    ("size", pa.string(), "Requested aspect ratio"),
    ("seed", pa.int32(), "Seed that was sent"),
    ("width", pa.int32(), "Width, pixels; null without a file"),
    ("height", pa.int32(), "Height, pixels; null without a file"),
    ("pixels", pa.int64(), "Width times height; null without a file"),
    ("status", pa.string(), "State of the request at the end of this purchase"),
    ("outcome", pa.string(), "What it bought: delivered, replaced, rejected, lost, failed, …"),
    ("verdict", pa.string(), "A reviewer's verdict on the image: keep, reject, flag, or null"),
    ("credits_reserved", CREDITS, "Credits that EvoLink reserved; null where it accepted nothing"),
    ("credits_charged", CREDITS, "Its cost, credits; null while not known"),
    ("credits_returned", CREDITS, "Reserved and not charged, credits; null while not settled"),
    ("credits_unknown", CREDITS, "Committed and not settled, credits; 0 where settled"),
    ("credit_price", pa.string(), "Credits per unit of a currency on its day, such as 68/USD"),
    ("currency", pa.string(), "That currency"),
    ("cost", MONEY, "Its cost in that currency; null while not known"),
    ("usd_charged", MONEY, "Its cost, US dollars; null in another currency"),
    ("billing_rule", pa.string(), "EvoLink's billing rule"),
    ("user_group", pa.string(), "EvoLink's user group"),
    ("error_code", pa.string(), "Error code of a purchase without an image"),
    ("latency_s", pa.float64(), "From submission to completion, seconds"),
)

LEDGER_SCHEMA: Final = pa.schema([pa.field(name, kind) for name, kind, _ in _COLUMNS])

#: What each column means, by name.
LEDGER_DESCRIPTIONS: Final = {name: text for name, _, text in _COLUMNS}

#: Error codes of a paid file that a check rejected.
REJECTED_CODES: Final = tuple(sorted(REJECTED))

_UNIQUE: Final = frozenset({"sent_at", "request_key", "idempotency_key", "task_id"})
_ROW_GROUP: Final = 50_000


def _sql(states: tuple[State, ...]) -> str:
    return ", ".join(f"'{state.value}'" for state in states)


#: States in which a purchase certainly cost nothing.
_FREE: Final = _sql((State.PLANNED, State.DEFERRED, State.REFUSED))


#: Whether a later attempt of the row that an image was bought for is stored, and no row of the
#: manifests still shows the image.
IS_REPLACED: Final = (
    "coalesce(later.attempt > stated.attempt AND NOT coalesce(shown, false), replaced, false)"
)


def make_month(duck: duckdb.DuckDBPyConnection, raw: str, by: Sequence[str] = ()) -> None:
    """Create the table ``month`` from ``raw`` (PURCHASE_SCHEMA).

    It is joined with ``listed``, ``reviewed``, and the tables of ``load_attribution``.

    The columns ``by`` follow those of the ledger: as they were at the purchase, or as the manifests
    have them where that is not known. Dollars come with the file.
    """
    codes = ", ".join(f"'{code}'" for code in REJECTED_CODES)
    duck.execute(
        f"""
        CREATE OR REPLACE TEMP TABLE month AS
        WITH stated AS (
            SELECT *,
                coalesce(state, if(task_id IS NULL, 'refused', 'failed')) AS status,
                coalesce(charged_units, if(status IN ({_FREE}), 0, NULL)) AS charged,
                coalesce(error_code,
                    nullif(json_extract_string(said, '$.error_code'), '')) AS code
            FROM {raw}
        )
        SELECT
            {", ".join(f"{_time(name)} AS {name}" for name in _TIMES)},
            CAST({_time("sent_at")} AS DATE) AS day,
            stated.run_id, stated.partition_key, stated.prompt_table,
            stated.table_id,
            coalesce(stated.prompt_id, listed.prompt_id) AS prompt_id,
            coalesce(stated.sample, listed.sample) AS sample,
            CASE WHEN stated.prompt_id IS NOT NULL THEN 'purchase'
                WHEN listed.prompt_id IS NOT NULL THEN 'today' END AS attribution,
            attributes, asset, job, backfill, user_name AS "user", tags,
            coalesce(rows, 0) AS rows,
            stated.attempt, number, request_key, idempotency_key, task_id, model, quality, size,
            seed, width, height, CAST(width AS BIGINT) * height AS pixels, status,
            CASE
                WHEN status = 'stored' AND ({IS_REPLACED}) THEN 'replaced'
                WHEN status = 'stored' THEN 'delivered'
                WHEN status = 'completed' AND code IN ({codes}) THEN 'rejected'
                WHEN status IN ('completed', 'submitted') THEN 'pending'
                WHEN status IN ('unknown', 'submitting') THEN 'unknown'
                WHEN status = 'expired' THEN 'lost'
                WHEN status = 'failed' THEN 'failed'
                ELSE 'refused'
            END AS outcome,
            CASE WHEN status = 'stored' THEN reviewed.verdict END AS verdict,
            {_credits("reserved_units")} AS credits_reserved,
            {_credits("charged")} AS credits_charged,
            if(charged IS NULL, NULL, {_credits("coalesce(reserved_units - charged, 0)")})
                AS credits_returned,
            {_credits("if(charged IS NULL, committed_units, 0)")} AS credits_unknown,
            billing_rule, user_group,
            CASE WHEN status IN ('stored', 'planned') THEN NULL ELSE code END AS error_code,
            epoch_us({_time("completed_at")} - {_time("submitted_at")}) / 1e6 AS latency_s,
            {"".join(f"{attributed(name)} AS {quoted(name)}," for name in by)}
        FROM stated LEFT JOIN listed USING (request_key) LEFT JOIN reviewed USING (request_key)
            LEFT JOIN attributions USING (attribution_id)
            LEFT JOIN buyers ON buyers.run_id = stated.run_id
                AND buyers.table_id = stated.table_id
            LEFT JOIN later ON later.table_id = stated.table_id
                AND later.prompt_id = stated.prompt_id AND later.sample = stated.sample
        """
    )


def attributed(name: str) -> str:
    """Return a user's column: as it was at the purchase, or as the manifests have it."""
    has, then = at_purchase(name)
    return f"if({has}, {then}, listed.{quoted(name)})"


_TIMES: Final = ("sent_at", "submitted_at", "completed_at", "settled_at")


def _time(column: str) -> str:
    """Return microseconds since 1970 as a time."""
    return f"make_timestamptz({column})"


def _credits(units: str) -> str:
    """Return units as credits, exactly."""
    return f"CAST({units} AS DECIMAL(18, 0)) * CAST('0.0001' AS DECIMAL(4, 4))"


def month_table(duck: duckdb.DuckDBPyConnection, prices: CreditPrices) -> Iterator[pa.Table]:
    """Yield the rows of ``month`` in the ledger's schema, in the order of sending.

    ``prices`` are those of a credit, by UTC day.
    """
    # What each charge that occurs costs at each price; there are few of them.
    duck.execute(
        f"CREATE OR REPLACE TEMP VIEW priced AS SELECT *, {prices.sql('day')} AS credit_price "
        "FROM month"
    )
    found = duck.sql(
        "SELECT DISTINCT credits_charged, credit_price FROM priced "
        "WHERE credits_charged IS NOT NULL"
    ).fetchall()
    parsed = [CreditPrice.parse(text) for _, text in found]
    costs = [
        rounded(price.cost(units_of(row[0])), MONEY.scale)
        for row, price in zip(found, parsed, strict=True)
    ]
    table = pa.table(
        {
            "credits_charged": pa.array([row[0] for row in found], CREDITS),
            "credit_price": pa.array([row[1] for row in found], pa.string()),
            "cost": pa.array(costs, MONEY),
        }
    )
    duck.execute("DROP TABLE IF EXISTS costs")
    duck.from_arrow(table).create("costs")
    made = {
        "currency": "split_part(credit_price, '/', 2)",
        "usd_charged": "if(credit_price LIKE '%/USD', cost, NULL)",
    }
    names = [f"{made[name]} AS {name}" if name in made else name for name in LEDGER_SCHEMA.names]
    rows = duck.sql(
        f"SELECT {', '.join(names)} FROM priced LEFT JOIN costs USING (credits_charged, "
        "credit_price) ORDER BY sent_at, idempotency_key"
    )
    for part in in_groups(pa.RecordBatchReader.from_stream(rows)):
        yield part.cast(LEDGER_SCHEMA)


def in_groups(reader: pa.RecordBatchReader) -> Iterator[pa.Table]:
    """Yield tables of the same number of rows, so that equal rows give equal files."""
    held: list[pa.RecordBatch] = []
    rows = 0
    for batch in reader:
        held.append(batch)
        rows += batch.num_rows
        while rows >= _ROW_GROUP:
            whole = pa.Table.from_batches(held)
            yield whole.slice(0, _ROW_GROUP).combine_chunks()
            held = whole.slice(_ROW_GROUP).to_batches()
            rows -= _ROW_GROUP
    if rows:
        yield pa.Table.from_batches(held).combine_chunks()


def write_table(storage: Storage, name: str, schema: pa.Schema, parts: Iterator[pa.Table]) -> None:
    """Write tables as one Parquet file, atomically. Equal rows give equal bytes."""

    def write(file: BinaryIO) -> None:
        # A dictionary of unique values would only take time.
        often = [name for name in schema.names if name not in _UNIQUE]
        with pq.ParquetWriter(file, schema, use_dictionary=often) as writer:
            for part in parts:
                writer.write_table(part, row_group_size=_ROW_GROUP)

    storage.write(name, write)
