"""The manifest rows that a purchase was made for: prompt_id, sample, and how many rows share it.

A manifest lists the present attempt of a row; the requests of earlier attempts follow from it
(``prompts.past_attempts``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from sqlalchemy import Connection

from krea_dagster.engine.journal.purchase_reads import states_of
from krea_dagster.engine.states import State
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import ConfigError
from krea_dagster.manifest import no_column, present_manifests
from krea_dagster.parquet_files import open_parquet
from krea_dagster.prompts.past_attempts import earlier_attempts
from krea_dagster.spend.tables.sql import quoted

_ROW: Final = ("request_key", "prompt_id", "sample", "attempt")
_REQUEST: Final = (*_ROW, "prompt", "size", "quality", "seed", "nsfw_check")
_ROWS: Final = 50_000


def load_listed(
    duck: duckdb.DuckDBPyConnection,
    storage: Storage,
    connection: Connection,
    by: Sequence[str] = (),
) -> None:
    """Create the table ``listed``: one row for each request of the manifests and of past attempts.

    Its columns are ``request_key``, ``prompt_id`` and ``sample`` of the first row by those two,
    ``rows``, ``shown`` (a row has no later attempt), ``replaced`` (a later attempt of that row is
    stored, and the image is not shown), and as text the columns ``by`` of that row. A column that
    no manifest has is null. Raises ConfigError for a manifest that cannot be read, and
    JournalError.
    """
    extra = "".join(f", {quoted(name)} VARCHAR" for name in by)
    duck.execute(
        "CREATE TABLE asked (request_key VARCHAR, prompt_id VARCHAR, sample INTEGER, "
        f"attempt INTEGER, folder INTEGER{extra})"
    )
    names = present_manifests(storage)
    known: dict[str, None] = {}
    later: list[str] = []
    # Prompt tables have a folder each, and may have rows of the same prompt_id.
    folders = {name: name.rpartition("/")[0] for name in names}
    numbers = {folder: number for number, folder in enumerate(dict.fromkeys(folders.values()))}
    for name in names:
        try:
            with storage.open(name) as file:
                known |= dict.fromkeys(
                    _load(duck, open_parquet(file), numbers[folders[name]], by, later)
                )
        except FileNotFoundError:
            continue
        except (OSError, pa.ArrowException) as error:
            raise ConfigError(
                f"the manifest {name} cannot be read: {error}. Materialize it again."
            ) from error
    if names and (missing := [name for name in by if name not in known]):
        raise no_column(missing[0], known)
    stored = [
        key for key, state in states_of(connection, later).items() if state == State.STORED.value
    ]
    _keep_first(duck, stored, by)


def _load(
    duck: duckdb.DuckDBPyConnection,
    file: pq.ParquetFile,
    folder: int,
    by: Sequence[str],
    later: list[str],
) -> list[str]:
    """Load a manifest; return its columns. ``later`` gets the keys of later attempts."""
    columns: list[str] = file.schema_arrow.names
    further = [name for name in by if name in columns]
    rows = file.iter_batches(_ROWS, columns=[*_ROW, *further])
    schema = pa.schema([file.schema_arrow.field(name) for name in (*_ROW, *further)])
    _insert(duck, pa.RecordBatchReader.from_batches(schema, rows), folder, by)
    if _has_raised(file):
        for batch in file.iter_batches(_ROWS, columns=[*_REQUEST, *further]):
            raised = batch.filter(pc.greater(batch.column("attempt"), 0))
            if raised.num_rows:
                later.extend(raised.column("request_key").to_pylist())
                _insert_earlier(duck, raised, folder, by, later)
    return columns


def _has_raised(file: pq.ParquetFile) -> bool:
    """Return whether a row of a manifest may have another attempt than the first."""
    place = file.schema_arrow.names.index("attempt")
    for group in range(file.num_row_groups):
        statistics = file.metadata.row_group(group).column(place).statistics
        if statistics is None or not statistics.has_min_max or statistics.max > 0:
            return True
    return False


def _insert(
    duck: duckdb.DuckDBPyConnection, rows: pa.RecordBatchReader, folder: int, by: Sequence[str]
) -> None:
    there = set(rows.schema.names)
    extra = "".join(
        f", CAST({quoted(name)} AS VARCHAR)" if name in there else ", NULL" for name in by
    )
    duck.from_arrow(rows).project(
        f"request_key, prompt_id, CAST(sample AS INTEGER), CAST(attempt AS INTEGER), {folder}"
        + extra
    ).insert_into("asked")


def _insert_earlier(
    duck: duckdb.DuckDBPyConnection,
    batch: pa.RecordBatch,
    folder: int,
    by: Sequence[str],
    later: list[str],
) -> None:
    """Load the earlier attempts of rows that all have some."""
    for made, _ in earlier_attempts(batch):
        keys = made.column("request_key")
        if made.num_rows and made.column("attempt")[0].as_py():
            later.extend(keys.to_pylist())
        _insert(duck, pa.RecordBatchReader.from_batches(made.schema, [made]), folder, by)


def _keep_first(duck: duckdb.DuckDBPyConnection, stored: Sequence[str], by: Sequence[str]) -> None:
    duck.from_arrow(pa.table({"request_key": pa.array(stored, pa.string())})).create("stored_later")
    names = ("prompt_id", "sample", "replaced", *map(quoted, by))
    packed = ", ".join(f"{name} := {name}" for name in names)
    fields = ", ".join(f"first.{name} AS {name}" for name in names)
    row = "folder, prompt_id, sample"
    duck.execute(
        f"""
        CREATE TABLE raised AS
            SELECT {row}, max(attempt) AS listed,
                max(attempt) FILTER (request_key IN (FROM stored_later)) AS stored
            FROM asked WHERE attempt > 0 GROUP BY ALL;
        CREATE VIEW marked AS
            SELECT asked.*, coalesce(attempt < stored, false) AS replaced,
                attempt >= coalesce(listed, 0) AS shown
            FROM asked LEFT JOIN raised USING ({row});
        -- Nearly every request has one row. Only the others are grouped; a request whose hash is
        -- that of another is grouped, too, which does no harm.
        CREATE TABLE often AS
            SELECT hash(request_key) AS hash FROM asked GROUP BY request_key HAVING count(*) > 1;
        CREATE TABLE shared AS
            SELECT request_key, rows, shown, {fields} FROM (
                -- A manifest that an earlier partitioning has left behind lists a row again.
                SELECT request_key, count(DISTINCT ({row}))::INTEGER AS rows,
                    bool_or(shown) AS shown,
                    arg_min(struct_pack({packed}), (prompt_id, sample, folder)) AS first
                FROM marked WHERE hash(request_key) IN (FROM often) GROUP BY request_key);
        -- A table, because it is read for every month.
        CREATE TABLE listed AS
            SELECT * REPLACE (replaced AND NOT shown AS replaced) FROM (
                SELECT request_key, 1 AS rows, shown, {", ".join(names)} FROM marked
                WHERE hash(request_key) NOT IN (FROM often)
                UNION ALL FROM shared);
        DROP VIEW marked;
        DROP TABLE shared;
        DROP TABLE asked;
        """
    )
