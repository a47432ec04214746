"""The spend in the columns of FOCUS 1.2, as a file."""

from __future__ import annotations

import io
from contextlib import closing
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from sqlalchemy import select

from krea_dagster.application.backend import Backend
from krea_dagster.application.close import closed_months_of, read_statements
from krea_dagster.application.spend import SpendPeriod, kept_columns, update_tables
from krea_dagster.engine.journal.schema import about, api_keys
from krea_dagster.engine.storage.page import write_page
from krea_dagster.errors import InputError
from krea_dagster.spend.statements.focus import as_csv, focus_table
from krea_dagster.spend.statements.statement import last_day, months_of_facts, statement_rows
from krea_dagster.spend.tables.query import open_tables


def write_focus(backend: Backend, path: Path, period: SpendPeriod) -> int:
    """Write the charges of a period as FOCUS 1.2; return the number of rows.

    A closed month is as its statement says; later months are as their statements would say now.
    Raises InputError for another name than .csv or .parquet, or another time zone than UTC, and
    ConfigError or JournalError.
    """
    if path.suffix not in (".csv", ".parquet"):
        raise InputError(f"{path}: the name of a FOCUS file ends with .csv or .parquet")
    if period.zone not in ("UTC", "Etc/UTC"):
        raise InputError(f"a FOCUS file has UTC days; give --timezone UTC, not {period.zone}")
    storage = backend.open_storage()
    closed = closed_months_of(backend)
    update_tables(backend, by=kept_columns(storage))
    months = [one.month for one in closed]
    statements = dict(zip(months, read_statements(storage, closed), strict=True))
    with closing(open_tables(storage, manifest=False)) as duck:
        last = closed[-1].month if closed else ""
        for month in [one for one in months_of_facts(duck) if one > last]:
            statements[month] = statement_rows(duck, month, list(statements.values()))
        shown = {month: _within(rows, month, period) for month, rows in statements.items()}
        table = focus_table(duck, shown, _account(backend))
    write_page(path, as_csv(table) if path.suffix == ".csv" else _parquet(table), "the FOCUS file")
    return int(table.num_rows)


def _within(rows: pa.Table, month: str, period: SpendPeriod) -> pa.Table:
    """Return the rows of a period's days; adjustments where it has a day of their statement."""
    since, until = period.since or date.min, period.until or date.max
    has_month = since <= last_day(month) and date.fromisoformat(f"{month}-01") <= until
    after = pc.greater_equal(rows["day"], pa.scalar(since))
    days = pc.and_(after, pc.less_equal(rows["day"], pa.scalar(until)))
    own = pc.and_(pc.invert(rows["adjusts"]), days)
    return rows.filter(pc.or_(own, pc.and_(rows["adjusts"], pa.scalar(has_month))))


def _account(backend: Backend) -> str:
    """Return an id of the account: that of its API keys, or the journal's if there are several."""
    with backend.open_journal() as journal:
        accounts = journal.database.fetch(select(api_keys.c.account).distinct())
        ((journal_id,),) = journal.database.fetch(select(about.c.journal_id))
    return f"evolink:{accounts[0].account if len(accounts) == 1 else journal_id}"


def _parquet(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()
