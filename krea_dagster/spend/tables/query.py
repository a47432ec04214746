"""Queries of the spend tables: sums by any column, and SQL over read-only views."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import date
from fractions import Fraction
from typing import Final, TypeAlias

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from krea_dagster import redact
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import ConfigError, KreaError
from krea_dagster.file_systems import Options, open_for_arrow, open_url
from krea_dagster.manifest import MANIFEST_SCHEMA
from krea_dagster.spend.tables.daily import DAILY_SCHEMA, FAILURES_SCHEMA
from krea_dagster.spend.tables.ledger import LEDGER_SCHEMA
from krea_dagster.spend.tables.sql import AT_STAKE, IS_ACCEPTED, count_of, open_views, quoted

#: The types of a table that DuckDB reads.
Table: TypeAlias = pa.Table | ds.Dataset

#: Columns to sum by that are computed, in addition to those of the ledger and the manifest.
_MADE: Final = {"month": "strftime(day, '%Y-%m')", "year": "strftime(day, '%Y')"}


@dataclass(frozen=True)
class SpendLine:
    """One line of sums: the values that they are grouped by, counts of purchases, money in units.

    ``delivered`` includes images that were replaced since; ``accepted`` leaves out those, and those
    that a reviewer has rejected or flagged. ``at_stake_units`` may have been charged, or are paid
    for an image that is not stored yet.
    """

    of: tuple[str | None, ...]
    purchases: int
    delivered: int
    failed: int
    refused: int
    lost: int
    rejected: int
    unknown: int
    pending: int
    replaced: int
    accepted: int
    charged_units: int
    returned_units: int
    at_stake_units: int

    def usd(self, rate: Fraction) -> Fraction:
        """Return the charge in US dollars, at ``rate`` credits per dollar."""
        return Fraction(self.charged_units, 10_000) / rate

    @property
    def per_accepted_units(self) -> float | None:
        """All that was charged, also for rejected images, per accepted image."""
        return self.charged_units / self.accepted if self.accepted else None


#: The figures of a line, in their order.
FIGURES: Final = tuple(field.name for field in fields(SpendLine))[1:]

_SUMS: Final = f"""
    count(*),
    {count_of("delivered", "replaced")},
    {count_of("failed")},
    {count_of("refused")},
    {count_of("lost")},
    {count_of("rejected")},
    {count_of("unknown")},
    {count_of("pending")},
    {count_of("replaced")},
    count(*) FILTER ({IS_ACCEPTED}),
    CAST(coalesce(sum(credits_charged), 0) * 10000 AS BIGINT),
    CAST(coalesce(sum(credits_returned), 0) * 10000 AS BIGINT),
    CAST({AT_STAKE} * 10000 AS BIGINT)
"""


@dataclass(frozen=True)
class SpendTables:
    """The three spend tables, and the number of months that have files."""

    ledger: Table
    daily: Table
    failures: Table
    months: int = 0

    def open(self, **views: Table) -> duckdb.DuckDBPyConnection:
        """Open a DuckDB with the tables, and others, as views."""
        own = {"ledger": self.ledger, "daily": self.daily, "failures": self.failures}
        return open_views({**own, **views})


def stored_tables(storage: Storage) -> SpendTables:
    """Open the spend tables, empty ones without files. Raises OSError."""
    return SpendTables(
        stored_table(storage, "spend/ledger", LEDGER_SCHEMA),
        stored_table(storage, "spend/daily", DAILY_SCHEMA),
        stored_table(storage, "spend/failures", FAILURES_SCHEMA),
        months=sum(name.endswith(".parquet") for name in storage.names("spend/ledger")),
    )


def open_tables(
    storage: Storage, prompts: str | None = None, prompts_options: Options | None = None
) -> duckdb.DuckDBPyConnection:
    """Open a DuckDB with the views ``ledger``, ``daily``, ``failures``, ``manifest``, ``prompts``.

    ``prompts`` is the source of the prompt table, opened with ``prompts_options``. Nothing else can
    be read, and nothing written. Raises ConfigError.
    """
    views = {"manifest": stored_table(storage, "manifest", MANIFEST_SCHEMA)}
    if prompts is not None:
        views["prompts"] = _prompts(prompts, prompts_options)
    return stored_tables(storage).open(**views)


def run_query(duck: duckdb.DuckDBPyConnection, query: str) -> pa.Table:
    """Return the result of one SELECT. Raises ConfigError for anything else."""
    try:
        statements = duck.extract_statements(query)
        if len(statements) != 1:
            raise ConfigError(f"the query has {len(statements)} statements; give one")
        if statements[0].type != duckdb.StatementType.SELECT:
            raise ConfigError("only SELECT is allowed; the tables are made from the journal")
        return duck.sql(query).to_arrow_table()
    except (duckdb.Error, pa.ArrowException, OSError, ValueError) as error:
        raise ConfigError(f"the query failed: {error}") from error


def sums(
    duck: duckdb.DuckDBPyConnection,
    by: Sequence[str] = (),
    *,
    since: date | None = None,
    until: date | None = None,
) -> list[SpendLine]:
    """Return sums grouped by some columns, in their order; one line without columns.

    A column is one of the ledger, of the manifest (with the table's passthrough columns), ``month``
    or ``year``. ``since`` and ``until`` are UTC days, both included. Raises ConfigError.
    """
    ledger, manifest = (_columns(duck, view) for view in ("ledger", "manifest"))
    further = [name for name in by if name not in _MADE and name not in ledger]
    if missing := [name for name in further if name not in manifest]:
        own = [*_MADE, *ledger, *(name for name in manifest if name not in ledger)]
        raise ConfigError(
            f"cannot sum by {missing[0]!r}: no such column; there are {', '.join(own)}"
        )
    names = [f"CAST({_MADE.get(name) or quoted(name)} AS VARCHAR)" for name in by]
    source = "ledger"
    if further:
        source = _with_columns(further)
    keys = "".join(f"{name}, " for name in names)
    grouped = f"GROUP BY {', '.join(names)} ORDER BY {', '.join(names)}" if by else ""
    low, high = since or date(1970, 1, 1), until or date(9999, 12, 31)
    found = duck.execute(
        f"SELECT {keys}{_SUMS} FROM {source} WHERE day BETWEEN ? AND ? {grouped}", [low, high]
    ).fetchall()
    return [SpendLine(tuple(row[: len(by)]), *row[len(by) :]) for row in found]


def _with_columns(names: Sequence[str]) -> str:
    """Return the ledger with columns of the manifest.

    They are those of the row that requests the image: tables that share a journal may have rows of
    the same prompt_id. The manifest does not list earlier attempts; theirs are those of the row.
    """
    first = ", ".join(
        f"arg_min({quoted(name)}, (prompt_id, sample)) AS {quoted(name)}" for name in names
    )
    any_of = ", ".join(f"any_value({quoted(name)}) AS {quoted(name)}" for name in names)
    chosen = ", ".join(
        f"if(asked.request_key IS NULL, named.{quoted(name)}, asked.{quoted(name)}) AS "
        f"{quoted(name)}"
        for name in names
    )
    return f"""(
        SELECT ledger.*, {chosen} FROM ledger
        LEFT JOIN (SELECT request_key, {first} FROM manifest GROUP BY request_key) AS asked
            ON asked.request_key = ledger.request_key
        LEFT JOIN (
            SELECT prompt_id, sample, {any_of} FROM manifest GROUP BY prompt_id, sample
        ) AS named ON named.prompt_id = ledger.prompt_id AND named.sample = ledger.sample
    )"""


def _columns(duck: duckdb.DuckDBPyConnection, view: str) -> list[str]:
    return list(duck.sql(f"SELECT * FROM {view} LIMIT 0").columns)


def _prompts(source: str, options: Options | None) -> Table:
    try:
        paths = _prompt_files(source, options)
        schema = pa.schema([] if paths else [("prompt", pa.string())])
        return dataset_of(paths, schema, options)
    except KreaError:
        raise
    except Exception as error:  # noqa: BLE001 - Arrow and file systems raise errors of any type
        text = redact.text(str(error), source)
        raise ConfigError(
            f"the prompt table {redact.location(source)} cannot be read: {text}"
        ) from redact.safe_cause(error, source)


def _prompt_files(source: str, options: Options | None) -> list[str]:
    fs, path = open_url(source, options)
    if fs.isdir(path):
        found = [name for name in fs.find(path) if name.endswith(".parquet")]
        return [str(fs.unstrip_protocol(name)) for name in sorted(found)]
    return [source] if fs.exists(path) else []


def prompt_texts(storage: Storage, prompt_ids: Sequence[str]) -> Mapping[str, str]:
    """Read the prompts of a few prompt_ids from the manifests. Raises OSError."""
    names = [name for name in storage.names("manifest") if name.endswith(".parquet")]
    if not names or not prompt_ids:
        return {}
    found = [open_for_arrow(storage.locate(name), storage.options) for name in names]
    schema = pa.schema([("prompt_id", pa.string()), ("prompt", pa.string())])
    paths = [path for _, path in found]
    manifests = ds.dataset(paths, schema=schema, format="parquet", filesystem=found[0][0])
    wanted = pc.field("prompt_id").isin(list(prompt_ids))
    rows = manifests.to_table(filter=wanted).to_pydict()
    return dict(zip(rows["prompt_id"], rows["prompt"], strict=True))


def stored_table(storage: Storage, folder: str, schema: pa.Schema) -> Table:
    """Open the Parquet files of a folder as one table; an empty one where there are none."""
    names = sorted(name for name in storage.names(folder) if name.endswith(".parquet"))
    return dataset_of(map(storage.locate, names), schema, storage.options)


def dataset_of(
    locations: Iterable[str], schema: pa.Schema, options: Options | None = None
) -> Table:
    """Open Parquet files as one table with the columns of ``schema`` and of all files.

    Rows are read when they are used. Raises ConfigError where types disagree.
    """
    found = [open_for_arrow(location, options) for location in locations]
    for fs, path in found:
        schema = _unified(schema, pq.read_schema(path, filesystem=fs))
    if not found:
        return schema.empty_table()
    paths = [path for _, path in found]
    return ds.dataset(paths, schema=schema, format="parquet", filesystem=found[0][0])


def _unified(left: pa.Schema, right: pa.Schema) -> pa.Schema:
    try:
        return pa.unify_schemas([left, right.remove_metadata()], promote_options="permissive")
    except pa.ArrowTypeError as error:
        raise ConfigError(f"columns of the files have different types: {error}") from error
