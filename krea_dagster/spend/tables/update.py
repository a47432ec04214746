"""Bring the spend tables up to the journal: new purchases, and those that have settled since.

A month's files are always made as a whole, from the journal and the manifests, so that many small
updates end in the same bytes as one large one. The months to make are

- those with purchases whose request had an event since the last update, with a margin of two days:
  clocks of machines that share a journal may differ, and an event's time is taken before its
  transaction ends. Without a further event in that time there are none;
- those whose totals (purchases, settled, money) changed: regardless of the times, no purchase and
  no unit is missed, and none stays in a month that it was moved away from;
- those with a row whose prompt_id, number of sharing rows or later attempt differs from the
  manifests, or whose verdict has changed.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Final

import duckdb
import numpy as np
import pyarrow as pa
from sqlalchemy import Connection, select

from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.purchase_reads import (
    PURCHASE_SCHEMA,
    PurchaseTotals,
    changed_since,
    events_since,
    load_attribution,
    money_mark,
    month_of,
    newest_event,
    purchases,
    span_of,
    totals_by_month,
)
from krea_dagster.engine.journal.schema import about, microseconds
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.parquet_files import open_parquet
from krea_dagster.spend.prices import PUBLISHED, CreditPrices
from krea_dagster.spend.tables.daily import (
    FAILURES_SCHEMA,
    daily_schema,
    daily_table,
    failures_table,
)
from krea_dagster.spend.tables.entries import write_entries
from krea_dagster.spend.tables.ledger import (
    IS_REPLACED,
    LEDGER_SCHEMA,
    attributed,
    make_month,
    month_table,
    write_table,
)
from krea_dagster.spend.tables.prompt_rows import load_listed
from krea_dagster.spend.tables.sql import open_duck, quoted
from krea_dagster.spend.tables.state import SpendState, table_name
from krea_dagster.spend.tables.verdict_rows import load_reviewed

TABLES: Final = ("ledger", "daily", "failures")

#: How far clocks may differ, and how late a transaction may end.
MARGIN_US: Final = 2 * 86_400_000_000


@dataclass(frozen=True)
class SpendUpdate:
    """The months whose files an update wrote or removed, and the purchases of all months."""

    months: tuple[str, ...]
    removed: tuple[str, ...]
    purchases: int


def update_spend(
    journal: Journal,
    storage: Storage,
    *,
    prices: CreditPrices = PUBLISHED,
    by: Sequence[str] = (),
    rebuild: bool = False,
    now: datetime | None = None,
) -> SpendUpdate:
    """Bring ledger, daily sums and failures up to the journal and the manifests.

    ``by`` names columns of the prompt table to group the daily sums by. With other columns or
    another journal all months are made again, as with ``rebuild``; with other ``prices`` of a
    credit the months whose prices differ. Needs no network.
    Raises JournalError, and ConfigError for a column that does not exist.
    """
    daily_schema(by)  # refuses a name that is taken
    now_us = microseconds(now or datetime.now(timezone.utc))
    known = None if rebuild else SpendState.read(storage)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="krea-spend-")))
        connection = stack.enter_context(journal.snapshot()).connection
        if known and (done := _nothing_new(known, connection, storage, (str(prices), tuple(by)))):
            return done
        before = _mark(connection, storage, "manifest")
        duck = stack.enter_context(closing(open_duck(folder)))
        journal_id = str(connection.execute(select(about.c.journal_id)).scalar())
        state = SpendState(journal_id, str(prices), tuple(by))
        settings = (state.journal_id, state.by)
        totals = totals_by_month(connection)
        changed: set[str] = set()
        if known and (known.journal_id, known.by) == settings:
            state = known
            since_us = known.taken_until_us - MARGIN_US
            if events_since(connection, since_us) != known.recent:
                changed = changed_since(connection, since_us)
        load_listed(duck, storage, connection, by)
        load_reviewed(duck, connection)
        for name, rows in load_attribution(connection).items():
            duck.from_arrow(rows).create(name)
        stale = {month for month in totals if _is_stale(storage, state, month, totals[month])}
        then = CreditPrices.parse(state.credit_prices.split(", "))
        stale |= {month for month in totals if then.of_month(month) != prices.of_month(month)}
        touched = (changed & totals.keys()) | stale
        labels = _labels(duck, storage, sorted(totals.keys() - touched), by)
        touched |= {month for month, label in labels.items() if label != state.labels.get(month)}
        spool = _MonthSpool(folder)
        if touched:
            spool.fill(purchases(connection, None if touched == totals.keys() else touched))
        for month in sorted(touched):
            duck.register("raw", spool.reader(month))
            make_month(duck, "raw", by)
            duck.unregister("raw")
            labels[month] = _write_month(duck, storage, month, by, prices)
        removed = _remove_others(storage, totals.keys())
        write_entries(storage, connection, prices)
        # An event from a clock that is ahead must not hide later ones.
        taken_until_us = min(newest_event(connection), now_us)
        marks = [before, _mark(connection, storage, *_FOLDERS)]
        state = replace(
            state,
            credit_prices=str(prices),
            mark=_joined(marks),
            taken_until_us=taken_until_us,
            months=dict(sorted(totals.items())),
            labels=dict(sorted(labels.items())),
            recent=events_since(connection, taken_until_us - MARGIN_US),
        )
        if state != known:
            state.write(storage)
    return SpendUpdate(
        tuple(sorted(touched)), tuple(removed), sum(month.purchases for month in totals.values())
    )


_FOLDERS: Final = tuple(f"spend/{table}" for table in (*TABLES, "entries"))


def _nothing_new(
    known: SpendState,
    connection: Connection,
    storage: Storage,
    settings: tuple[str, tuple[str, ...]],
) -> SpendUpdate | None:
    """Return the result of an update without anything to do; None where there may be something.

    No file and no purchase is read for it.
    """
    journal_id = str(connection.execute(select(about.c.journal_id)).scalar())
    if (known.journal_id, known.credit_prices, known.by) != (journal_id, *settings):
        return None
    if events_since(connection, known.taken_until_us - MARGIN_US) != known.recent:
        return None
    marks = [_mark(connection, storage, "manifest"), _mark(connection, storage, *_FOLDERS)]
    if not known.mark or _joined(marks) != known.mark:
        return None
    return SpendUpdate((), (), sum(month.purchases for month in known.months.values()))


def _mark(connection: Connection, storage: Storage, *folders: str) -> str:
    """Return a text that differs once money, verdicts, or the files in folders have changed."""
    stamps = [storage.stamps(folder) for folder in folders]
    if None in stamps:
        return ""
    return json.dumps([money_mark(connection), stamps], sort_keys=True)


def _joined(marks: Sequence[str]) -> str:
    return hashlib.sha256("".join(marks).encode()).hexdigest() if all(marks) else ""


def _is_stale(storage: Storage, state: SpendState, month: str, totals: PurchaseTotals) -> bool:
    if state.months.get(month) != totals:
        return True
    return any(storage.size_bytes(table_name(table, month)) is None for table in TABLES)


def _labels(
    duck: duckdb.DuckDBPyConnection, storage: Storage, months: Sequence[str], by: Sequence[str]
) -> dict[str, str]:
    """Return a hash of the columns ``by`` of each month's purchases.

    It is ``_WRONG`` where the month's ledger differs from the manifests or the verdicts.
    """
    if not months:
        return {}
    ledger = pa.RecordBatchReader.from_batches(_LEDGER_COLUMNS, _ledger_rows(storage, months))
    found = duck.from_arrow(ledger).query(
        "ledger",
        f"""
        SELECT month, bool_or(
                ledger.attribution IS DISTINCT FROM 'purchase' AND (
                    ledger.prompt_id IS DISTINCT FROM listed.prompt_id
                    OR ledger.sample IS DISTINCT FROM listed.sample)
                OR ledger.rows <> coalesce(listed.rows, 0)
                OR (ledger.outcome = 'replaced') <> (ledger.outcome IN ('delivered', 'replaced')
                    AND {IS_REPLACED.replace("stated.", "ledger.")})
                OR ledger.verdict IS DISTINCT FROM
                    if(ledger.outcome IN ('delivered', 'replaced'), reviewed.verdict, NULL)),
            {_hash(map(attributed, by))}
        FROM ledger LEFT JOIN listed USING (request_key) LEFT JOIN reviewed USING (request_key)
            -- A condition on the ledger alone would make DuckDB compare each pair of rows.
            LEFT JOIN later ON later.table_id = ledger.table_id
                AND later.prompt_id = if(ledger.attribution = 'purchase', ledger.prompt_id, NULL)
                AND later.sample = ledger.sample
        GROUP BY month
        """,
    )
    return {month: _WRONG if wrong else label for month, wrong, label in found.fetchall()}


_WRONG: Final = "wrong"
_COMPARED: Final = (
    *("request_key", "table_id", "prompt_id", "sample", "attribution", "attempt", "rows"),
    *("outcome", "verdict", "attributes"),
)
_LEDGER_COLUMNS: Final = pa.schema(
    [
        ("month", pa.string()),
        *(LEDGER_SCHEMA.field(name) for name in _COMPARED),
    ]
)


def _ledger_rows(storage: Storage, months: Sequence[str]) -> Iterator[pa.RecordBatch]:
    for month in months:
        with storage.open(table_name("ledger", month)) as file:
            for batch in open_parquet(file).iter_batches(columns=_LEDGER_COLUMNS.names[1:]):
                named = pa.repeat(pa.scalar(month), batch.num_rows)
                yield pa.RecordBatch.from_arrays([named, *batch.columns], schema=_LEDGER_COLUMNS)


def _hash(columns: Iterable[str]) -> str:
    """Return the expression for a hash of these columns of all purchases, as text."""
    names = ", ".join(columns)
    if not names:
        return "any_value('')"
    names = f"request_key, {names}"
    return f"CAST(sum(CAST(hash({names}) AS HUGEINT)) AS VARCHAR)"


def _write_month(
    duck: duckdb.DuckDBPyConnection,
    storage: Storage,
    month: str,
    by: Sequence[str],
    prices: CreditPrices,
) -> str:
    """Write the files of the table ``month``; return its label."""
    parts = {
        "ledger": (LEDGER_SCHEMA, month_table(duck, prices)),
        "daily": (daily_schema(by), iter([daily_table(duck, by)])),
        "failures": (FAILURES_SCHEMA, iter([failures_table(duck)])),
    }
    for table, (kind, rows) in parts.items():
        write_table(storage, table_name(table, month), kind, rows)
    ((label,),) = duck.execute(f"SELECT {_hash(map(quoted, by))} FROM month").fetchall()
    return str(label)


def _remove_others(storage: Storage, months: Collection[str]) -> list[str]:
    """Remove the files of months that have no purchases any more."""
    removed = set()
    for table in TABLES:
        for name in list(storage.names(f"spend/{table}")):
            month = name.rpartition("/")[2].removesuffix(".parquet")
            if month not in months:
                storage.remove(name)
                removed.add(month)
    return sorted(removed)


class _MonthSpool:
    """Purchases on disk, by the month of sending, so that memory does not grow with them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def fill(self, batches: Iterator[pa.RecordBatch]) -> None:
        with ExitStack() as stack:
            writers: dict[str, pa.RecordBatchFileWriter] = {}
            for batch in batches:
                for month, part in _by_month(batch):
                    if month not in writers:
                        writers[month] = stack.enter_context(
                            pa.ipc.new_stream(self._file(month), PURCHASE_SCHEMA, options=_OPTIONS)
                        )
                    writers[month].write_batch(part)

    def reader(self, month: str) -> pa.RecordBatchReader:
        return pa.ipc.open_stream(pa.memory_map(self._file(month)))

    def _file(self, month: str) -> str:
        return str(self._folder / f"{month}.arrow")


_OPTIONS: Final = pa.ipc.IpcWriteOptions(compression="lz4")


def _by_month(batch: pa.RecordBatch) -> Iterator[tuple[str, pa.RecordBatch]]:
    sent_at = np.asarray(batch.column("sent_at").to_numpy(), np.int64)
    left = np.ones(len(sent_at), np.bool_)
    while left.any():
        month = month_of(int(sent_at[left].min()))
        _, end = span_of(month)
        here = left & (sent_at < end)
        yield month, batch if here.all() else batch.filter(pa.array(here))
        left &= ~here
