"""Close a month: write its statement, which stays, and note the hashes of its files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final

import pyarrow as pa

from krea_dagster.application.backend import Backend
from krea_dagster.application.spend import SpendPeriod, kept_columns, update_tables
from krea_dagster.engine.journal.closed_month_log import ClosedMonth
from krea_dagster.engine.storage.page import write_page
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import ConfigError, InputError, StorageError
from krea_dagster.parquet_files import open_parquet
from krea_dagster.spend.proof.statements import FILE_ENDINGS, changed_statements
from krea_dagster.spend.statements.page import statement_page
from krea_dagster.spend.statements.statement import (
    last_day,
    months_of_facts,
    statement_file,
    statement_rows,
    sums_of,
)
from krea_dagster.spend.tables.query import open_tables, sums
from krea_dagster.spend.tables.sql import DuckDB

#: Where statements are under the storage root.
_FOLDER: Final = "statements"


@dataclass(frozen=True)
class Closing:
    """A closed month, and whether this call closed it. ``where`` is its page's location."""

    month: ClosedMonth
    is_new: bool
    where: str


def close_month(
    backend: Backend, month: str, *, folder: Path | None = None, now: datetime | None = None
) -> Closing:
    """Write the statement of a month, or return the one that it has; see ``Krea.close``."""
    now = now or datetime.now(timezone.utc)
    SpendPeriod.of(None, None, month, "UTC")
    storage = backend.open_storage()
    closed = closed_months_of(backend)
    known = {one.month: one for one in closed}
    is_new = month not in known
    if is_new:
        if last_day(month) >= now.astimezone(timezone.utc).date():
            raise InputError(f"{month} has not ended (months are UTC), so it cannot be closed yet")
        if closed and month < closed[-1].month:
            raise InputError(
                f"{month} is before the last closed month {closed[-1].month}; what is known of it "
                "now is an adjustment in the next statement"
            )
        update_tables(backend, by=kept_columns(storage))
        made, files = _make(backend, storage, month, closed, now)
        with backend.open_journal() as journal:
            is_new = journal.closed_months.add(made, partial(_write_files, storage, made, files))
            known = {one.month: one for one in journal.closed_months.all()}
    one = known[month]
    if folder is not None:
        _copy(storage, one, folder)
    return Closing(one, is_new, storage.shown(f"{one.name}.html"))


def closed_months_of(backend: Backend) -> list[ClosedMonth]:
    """Return the closed months. Raises ConfigError without a journal, and JournalError."""
    if not backend.has_journal():
        raise ConfigError("there is no journal yet: nothing was spent, and no month can be closed")
    with backend.open_journal() as journal:
        return journal.closed_months.all()


def changed_of(backend: Backend) -> list[str]:
    """Return a sentence on each file of a statement that is missing or was changed."""
    return changed_statements(backend.open_storage(), closed_months_of(backend))


def _make(
    backend: Backend, storage: Storage, month: str, closed: Sequence[ClosedMonth], now: datetime
) -> tuple[ClosedMonth, Sequence[bytes]]:
    """Return a closed month, and the content of the files of its statement (FILE_ENDINGS)."""
    earlier = read_statements(storage, closed)
    columns = ["quality", *backend.settings.spend_by]
    with closing(open_tables(storage, manifest=bool(backend.settings.spend_by))) as duck:
        _check_order(duck, month, closed)
        rows = statement_rows(duck, month, earlier)
        period = SpendPeriod.of(None, None, month, "UTC")
        by = {name: sums(duck, [name], since=period.since, until=period.until) for name in columns}
        (total,) = sums(duck, since=period.since, until=period.until)
    data, sha256 = statement_file(rows, month)
    name = f"{_FOLDER}/{month}-{sha256[:12]}"
    page = statement_page(
        rows,
        month,
        before=(closed[-1].month, earlier[-1]) if closed else None,
        sums=by,
        total=total,
        prices=backend.credit_prices(),
        file=f"{name}.parquet",
        sha256=sha256,
        now=now.astimezone(timezone.utc),
    )
    page_sha256 = hashlib.sha256(page).hexdigest()
    made = ClosedMonth(month, now, name, sha256, page_sha256, **asdict(sums_of(rows)))
    return made, (data, page)


def _write_files(storage: Storage, one: ClosedMonth, files: Sequence[bytes]) -> None:
    """Write the files of a statement. They count once the journal has the month."""
    try:
        for ending, content in zip(FILE_ENDINGS, files, strict=True):
            storage.write(one.name + ending, partial(_write, content))
    except OSError as error:
        raise StorageError(
            f"the statement of {one.month} cannot be written to {storage.shown('')}: {error}. The "
            "month is still open; close it again."
        ) from error


def _write(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def _check_order(duck: DuckDB, month: str, closed: Sequence[ClosedMonth]) -> None:
    last = closed[-1].month if closed else ""
    if before := [one for one in months_of_facts(duck) if last < one < month]:
        raise InputError(
            f"close the months before {month} first, so that each fact is in one statement: "
            f"krea-dagster close {' '.join(before)}"
        )


def read_statements(storage: Storage, closed: Sequence[ClosedMonth]) -> list[pa.Table]:
    """Return the rows of closed months. Raises ConfigError for a file that is not as it was."""
    if changed := changed_statements(storage, closed, endings=(".parquet",)):
        raise ConfigError(changed[0])
    tables = []
    for one in closed:
        with storage.open(f"{one.name}.parquet") as file:
            tables.append(open_parquet(file).read())
    return tables


def _copy(storage: Storage, one: ClosedMonth, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for ending in FILE_ENDINGS:
        with storage.open(one.name + ending) as file:
            name = Path(one.name).name + ending
            write_page(folder / name, file.read(), "the statement")
