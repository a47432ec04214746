"""The statements that every batch of changes needs, compiled once and handed to the driver.

SQLAlchemy's own way of executing costs several times what SQLite takes for a row. So the text is
compiled once, and the rows go to the driver as it takes them: times as microseconds, JSON as
text. Written with SQLAlchemy all the same, so that every database gets a text of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import MappingProxyType, SimpleNamespace
from typing import Any, Final, Protocol

from sqlalchemy import (
    Boolean,
    Integer,
    String,
    Table,
    any_,
    bindparam,
    case,
    func,
    insert,
    literal_column,
    select,
    text,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Dialect

from krea_dagster.engine.record import Record
from krea_dagster.engine.rows import JOINED, record_of
from krea_dagster.engine.schema import (
    POSTGRES_NOW_US,
    UtcTime,
    commitments,
    files,
    microseconds,
    prices,
    requests,
    stops,
    submissions,
    time_of,
)

#: How long the account's stop holds for the other shards of a launch: long enough that all of
#: them see it, short enough that a launch which is taken up again after topping up may buy.
STOP_HOLDS_S: Final = 300.0

#: The parameter that is added to a submission's ``posts``.
ADDED_POSTS: Final = "added_posts"

#: A 0 that is part of a statement's text, and none of its parameters.
_NONE: Final = literal_column("0", Integer)


class Cursor(Protocol):
    """What every driver's cursor can do (PEP 249)."""

    @property
    def rowcount(self) -> int:
        """How many rows the last statement touched."""

    def execute(self, statement: str, parameters: Any = ..., /) -> object:
        """Execute a statement once."""

    def executemany(self, statement: str, parameters: Any, /) -> object:
        """Execute a statement for every row of parameters."""

    def fetchall(self) -> Sequence[Any]:
        """Every row that is left of the last answer."""


class Statement:
    """One statement as text for one kind of database; its parameters are given by name.

    ``names`` are the columns that it sets, where they are not part of the statement.
    """

    def __init__(
        self, statement: Any, dialect: Dialect, names: Sequence[str] | None = None
    ) -> None:
        compiled = statement.compile(dialect=dialect, column_keys=names)
        self._text = str(compiled)
        self._order: Sequence[str] | None = compiled.positiontup
        # What SQLAlchemy has made parameters of itself, such as the 0 of coalesce.
        self._constants = {k: v for k, v in compiled.params.items() if v is not None}

    def execute(self, cursor: Cursor, rows: Sequence[Mapping[str, Any]]) -> int:
        """Execute it for every row; returns how many rows of the table that touched."""
        cursor.executemany(self._text, [self._parameters(row) for row in rows])
        return cursor.rowcount

    def find(
        self, cursor: Cursor, parameters: Mapping[str, Any] = MappingProxyType({})
    ) -> Sequence[Any]:
        """The rows that it finds, as the driver has them."""
        cursor.execute(self._text, self._parameters({**self._constants, **parameters}))
        return cursor.fetchall()

    def _parameters(self, row: Mapping[str, Any]) -> Any:
        if self._order is None:
            return {name: _plain(value) for name, value in row.items()}
        return tuple([_plain(row[name]) for name in self._order])


class Statements:
    """The statements for one kind of database; they run on its driver's own cursor."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._sqlite = dialect.name == "sqlite"
        self._insert: Any = sqlite.insert if self._sqlite else postgresql.insert
        self._insertions: dict[tuple[str, ...], Statement] = {}
        self._request_updates: dict[tuple[str, ...], Statement] = {}
        self._submission_updates: dict[tuple[str, ...], Statement] = {}
        self.commitment_sum = self._commitment_sum()
        self.price_seen = self._price_seen()
        self.commitment = self._select(
            select(commitments.c.committed_units, commitments.c.spent_units).where(
                commitments.c.scope == bindparam("wanted")
            )
        )
        self.prices = self._select(
            select(
                prices.c.quality,
                prices.c.highest_units,
                prices.c.doubted_units,
                prices.c.doubted_in_row,
            )
        )
        self.stop = self._select(
            select(stops.c.error_code, stops.c.error_message).where(
                stops.c.launch == bindparam("wanted"), self._since(stops.c.at)
            )
        )
        self.file_seen = self._file_seen()
        self._records = self._select(self._records_query())
        self._tasks = self._select(self._tasks_query())

    def records(self, cursor: Cursor, keys: Sequence[str]) -> dict[str, Record]:
        """The requests with these keys, kept from being changed by others meanwhile."""
        wanted = json.dumps(list(keys)) if self._sqlite else list(keys)
        found = self._records.find(cursor, {"wanted": wanted})
        records = [record_of(_named(row)) for row in found]
        return {record.request_key: record for record in records}

    def _since(self, at: Any) -> Any:
        """Whether a stop still holds: on PostgreSQL by its own clock, as it was written."""
        if self._sqlite:
            return at >= bindparam("since", type_=UtcTime)
        return text(f"stops.at >= {POSTGRES_NOW_US} - {int(STOP_HOLDS_S * 1_000_000)}")

    def tasks(self, cursor: Cursor, task_ids: Sequence[str]) -> dict[str, str]:
        """The requests that have these tasks, by task id."""
        wanted = json.dumps(list(task_ids)) if self._sqlite else list(task_ids)
        return dict(self._tasks.find(cursor, {"wanted": wanted}))

    def _select(self, query: Any) -> Statement:
        return Statement(query, self._dialect)

    def _records_query(self) -> Any:
        if self._sqlite:  # there the whole file is locked already
            each = func.json_each(bindparam("wanted")).table_valued("value")
            return JOINED.where(requests.c.request_key.in_(select(each.c.value)))
        wanted = bindparam("wanted", type_=postgresql.ARRAY(String))
        return JOINED.where(requests.c.request_key == any_(wanted)).with_for_update(
            of=requests, key_share=True
        )

    def _tasks_query(self) -> Any:
        query = select(submissions.c.task_id, submissions.c.request_key)
        if self._sqlite:
            each = func.json_each(bindparam("wanted")).table_valued("value")
            return query.where(submissions.c.task_id.in_(select(each.c.value)))
        wanted = bindparam("wanted", type_=postgresql.ARRAY(String))
        return query.where(submissions.c.task_id == any_(wanted))

    def insertion(self, table: Table, names: tuple[str, ...]) -> Statement:
        """Insert rows with these columns."""
        key = (table.name, *names)
        found = self._insertions.get(key)
        if found is None:
            found = Statement(insert(table).inline(), self._dialect, names)
            self._insertions[key] = found
        return found

    def request_update(self, names: tuple[str, ...]) -> Statement:
        """Set columns of the request that stands at ``old_seq`` and is held by ``old_owner``."""
        found = self._request_updates.get(names)
        if found is None:
            statement = update(requests).where(
                requests.c.request_key == bindparam("old_key"),
                requests.c.seq == bindparam("old_seq"),
                requests.c.claimed_by == bindparam("old_owner"),
            )
            found = Statement(statement, self._dialect, names)
            self._request_updates[names] = found
        return found

    def submission_update(self, names: tuple[str, ...]) -> Statement:
        """Set columns of the submission ``old_key``; ``ADDED_POSTS`` is added to its posts."""
        found = self._submission_updates.get(names)
        if found is None:
            statement = update(submissions).where(
                submissions.c.idempotency_key == bindparam("old_key")
            )
            if ADDED_POSTS in names:
                statement = statement.values(posts=submissions.c.posts + bindparam(ADDED_POSTS))
            columns = [name for name in names if name != ADDED_POSTS]
            found = Statement(statement, self._dialect, columns)
            self._submission_updates[names] = found
        return found

    def _commitment_sum(self) -> Statement:
        """Add to what a scope has committed and spent."""
        statement = self._insert(commitments)
        sums = {
            name: commitments.c[name] + statement.excluded[name]
            for name in ("committed_units", "spent_units")
        }
        upsert = statement.on_conflict_do_update(index_elements=["scope"], set_=sums)
        return Statement(upsert, self._dialect)

    def _price_seen(self) -> Statement:
        """Keep the latest price of a quality, the highest, and the last that was not believed."""
        statement = self._insert(prices)
        new = statement.excluded
        # Compared here, because two runs may have read the same highest price.
        greater = func.max if self._sqlite else func.greatest
        seen = {
            "highest_units": greater(prices.c.highest_units, new.highest_units),
            "latest_units": new.latest_units,
            "doubted_units": func.coalesce(new.doubted_units, prices.c.doubted_units),
            "doubted_in_row": case(
                (new.doubted_in_row > _NONE, prices.c.doubted_in_row + new.doubted_in_row),
                else_=_NONE,
            ),
            "seen_at": new.seen_at,
        }
        upsert = statement.on_conflict_do_update(index_elements=["quality"], set_=seen)
        return Statement(upsert, self._dialect)

    def _file_seen(self) -> Statement:
        """Keep whether a file lies in a storage root."""
        statement = self._insert(files)
        new = statement.excluded
        seen = {
            # Its own time, as long as it has only gone missing.
            "at": case((new.missing_since.is_(None), new.at), else_=files.c.at),
            "missing_since": new.missing_since,
        }
        upsert = statement.on_conflict_do_update(
            index_elements=["request_key", "root_id"], set_=seen
        )
        return Statement(upsert, self._dialect)


#: What each column of ``JOINED`` is called, and how its values are read.
_COLUMNS: Final = tuple((column.name, column.type) for column in JOINED.selected_columns)


def _named(row: Sequence[Any]) -> SimpleNamespace:
    """A row of ``JOINED`` by its columns' names, with times and truth values as they should be."""
    values: dict[str, Any] = {}
    for (name, kind), value in zip(_COLUMNS, row, strict=True):
        if value is not None and isinstance(kind, UtcTime):
            value = time_of(value)  # noqa: PLW2901 - the same value, as it should be
        elif isinstance(kind, Boolean):
            value = bool(value)  # noqa: PLW2901 - as above
        values[name] = value
    return SimpleNamespace(**values)


#: What drivers take as it is.
_AS_IT_IS: Final = frozenset({str, int, bool, float, type(None)})


def _plain(value: Any) -> Any:
    """A value as drivers take it for the journal's columns."""
    if type(value) in _AS_IT_IS:
        return value
    if isinstance(value, datetime):
        return microseconds(value)
    if isinstance(value, Mapping):
        return json.dumps(dict(value))
    return value
