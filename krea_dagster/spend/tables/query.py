"""Questions to the spend tables: sums by any column, and SQL over views that can only be read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import date
from fractions import Fraction
from typing import Any, Final

import duckdb
import fsspec
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from krea_dagster import redact
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import ConfigError, KreaError
from krea_dagster.manifest import MANIFEST_SCHEMA
from krea_dagster.spend.tables.daily import DAILY_SCHEMA, FAILURES_SCHEMA
from krea_dagster.spend.tables.ledger import LEDGER_SCHEMA
from krea_dagster.spend.tables.prompt_rows import quoted
from krea_dagster.spend.tables.update import open_duck
from krea_dagster.spend.tables.verdict_rows import IS_ACCEPTED

#: What may be asked by, beside every column of the ledger and the manifest.
_MADE: Final = {"month": "strftime(day, '%Y-%m')", "year": "strftime(day, '%Y')"}


@dataclass(frozen=True)
class SpendLine:
    """One line of sums: what they are of, counts of purchases, and money in units.

    ``delivered`` holds what was replaced since; ``accepted`` does not, nor what a person has
    rejected or flagged; ``at_stake_units`` may have been charged, or is
    paid and not at hand.
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
        """What was charged, in US dollars, at so many credits to the dollar."""
        return Fraction(self.charged_units, 10_000) / rate

    @property
    def per_accepted_units(self) -> float | None:
        """What an accepted image came to: all that was charged, also for what was refused."""
        return self.charged_units / self.accepted if self.accepted else None


#: The figures of a line, in their order.
FIGURES: Final = tuple(field.name for field in fields(SpendLine))[1:]

_SUMS: Final = f"""
    count(*),
    count(*) FILTER (outcome IN ('delivered', 'replaced')),
    count(*) FILTER (outcome = 'failed'),
    count(*) FILTER (outcome = 'refused'),
    count(*) FILTER (outcome = 'lost'),
    count(*) FILTER (outcome = 'rejected'),
    count(*) FILTER (outcome = 'unknown'),
    count(*) FILTER (outcome = 'pending'),
    count(*) FILTER (outcome = 'replaced'),
    count(*) FILTER ({IS_ACCEPTED}),
    CAST(coalesce(sum(credits_charged), 0) * 10000 AS BIGINT),
    CAST(coalesce(sum(credits_returned), 0) * 10000 AS BIGINT),
    CAST(coalesce(sum(credits_unknown
        + if(outcome = 'pending', coalesce(credits_charged, 0), 0)), 0) * 10000 AS BIGINT)
"""


def open_views(storage: Storage, prompts: str | None = None) -> duckdb.DuckDBPyConnection:
    """Open a DuckDB with the views ``ledger``, ``daily``, ``failures``, ``manifest``, ``prompts``.

    ``prompts`` is the prompt table: a Parquet file, a folder of them, or a URL. Nothing else can
    be read by it, and nothing written. Raises ConfigError.
    """
    duck = open_duck()
    tables = {
        "ledger": ("spend/ledger", LEDGER_SCHEMA),
        "daily": ("spend/daily", DAILY_SCHEMA),
        "failures": ("spend/failures", FAILURES_SCHEMA),
        "manifest": ("manifest", MANIFEST_SCHEMA),
    }
    for view, (folder, schema) in tables.items():
        names = sorted(name for name in storage.names(folder) if name.endswith(".parquet"))
        duck.register(view, _rows(map(storage.locate, names), schema))
    if prompts is not None:
        duck.register("prompts", _prompts(prompts))
    duck.execute("SET enable_external_access = false; SET lock_configuration = true")
    return duck


def ask(duck: duckdb.DuckDBPyConnection, query: str) -> pa.Table:
    """Return the answer to one SELECT. Raises ConfigError where it is none, or is wrong."""
    try:
        statements = duck.extract_statements(query)
        if len(statements) != 1:
            raise ConfigError(f"{len(statements)} statements were given; ask one question")
        if statements[0].type != duckdb.StatementType.SELECT:
            raise ConfigError("only a SELECT can be asked; the tables are made from the journal")
        return duck.sql(query).to_arrow_table()
    except (duckdb.Error, pa.ArrowException, OSError, ValueError) as error:
        raise ConfigError(f"the query cannot be answered: {error}") from error


def sums(
    duck: duckdb.DuckDBPyConnection,
    by: Sequence[str] = (),
    *,
    since: date | None = None,
    until: date | None = None,
) -> list[SpendLine]:
    """Return the sums by these columns, in their order; one line where there are none.

    A column is one of the ledger, of the manifest (its further columns among them), ``month`` or
    ``year``. ``since`` and ``until`` are UTC days, the second one included. Raises ConfigError.
    """
    ledger, manifest = (_columns(duck, view) for view in ("ledger", "manifest"))
    carried = [name for name in by if name not in _MADE and name not in ledger]
    if missing := [name for name in carried if name not in manifest]:
        own = [*_MADE, *ledger, *(name for name in manifest if name not in ledger)]
        raise ConfigError(
            f"there is no column {missing[0]!r} to sum by; there are {', '.join(own)}"
        )
    names = [f"CAST({_MADE.get(name) or quoted(name)} AS VARCHAR)" for name in by]
    source = "ledger"
    if carried:
        values = ", ".join(f"any_value({quoted(name)}) AS {quoted(name)}" for name in carried)
        source = (
            f"ledger LEFT JOIN (SELECT prompt_id, sample, {values} FROM manifest "
            "GROUP BY prompt_id, sample) USING (prompt_id, sample)"
        )
    keys = "".join(f"{name}, " for name in names)
    grouped = f"GROUP BY {', '.join(names)} ORDER BY {', '.join(names)}" if by else ""
    low, high = since or date(1970, 1, 1), until or date(9999, 12, 31)
    found = duck.execute(
        f"SELECT {keys}{_SUMS} FROM {source} WHERE day BETWEEN ? AND ? {grouped}",
        [low, high],
    ).fetchall()
    return [SpendLine(tuple(row[: len(by)]), *row[len(by) :]) for row in found]


def _columns(duck: duckdb.DuckDBPyConnection, view: str) -> list[str]:
    return list(duck.sql(f"SELECT * FROM {view} LIMIT 0").columns)


def _prompts(source: str) -> Any:
    try:
        return _rows(_files(source), pa.schema([]))
    except KreaError:
        raise
    except Exception as error:  # noqa: BLE001 - Arrow and file systems raise whatever they like
        said = redact.text(str(error), source)
        raise ConfigError(
            f"the prompt table {redact.location(source)} cannot be read: {said}"
        ) from redact.safe_cause(error, source)


def _files(source: str) -> list[str]:
    """Return the Parquet files of a prompt table."""
    fs, path = fsspec.core.url_to_fs(source)
    if fs.isdir(path):
        found = [name for name in fs.find(path) if name.endswith(".parquet")]
        return [str(fs.unstrip_protocol(name)) for name in sorted(found)]
    return [source] if fs.exists(path) else []


def _rows(locations: Iterable[str], schema: pa.Schema) -> Any:
    """Return what DuckDB reads the rows of these files from; none give an empty table."""
    paths: list[str] = []
    fs = None
    for location in locations:
        fs, path = fsspec.core.url_to_fs(location)
        schema = _unified(schema, pq.read_schema(path, filesystem=fs))
        paths.append(path)
    if not paths:
        return schema.empty_table() if len(schema) else pa.table({"prompt": pa.array([], "string")})
    return ds.dataset(paths, schema=schema, format="parquet", filesystem=fs)


def _unified(one: pa.Schema, other: pa.Schema) -> pa.Schema:
    try:
        return pa.unify_schemas([one, other.remove_metadata()], promote_options="permissive")
    except pa.ArrowTypeError as error:
        raise ConfigError(f"the files have columns of types that do not agree: {error}") from error
