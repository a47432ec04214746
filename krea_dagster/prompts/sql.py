"""A query as a prompt table, by ADBC: a database's rows come as Arrow batches, with its types."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Final

import pyarrow as pa

from krea_dagster import redact
from krea_dagster.errors import ConfigError
from krea_dagster.file_systems import Options, resolved
from krea_dagster.prompts.files import first_line
from krea_dagster.prompts.kinds import database_of

#: The drivers that the extra ``adbc`` brings, by the database that a URI names.
_DRIVERS: Final = dict.fromkeys(("postgres", "postgresql"), "adbc_driver_postgresql")


@dataclass(frozen=True)
class SqlTable:
    """A query whose rows are the prompt table; it runs whenever the table is read.

    Args:
        uri: The database, such as ``postgresql://user@host/database``, or ``{"env": "NAME"}`` for
            the value of a variable. A password in it is never shown.
        query: Returns a row for each prompt, with the columns of a prompt table.
        driver: The package of an ADBC driver, such as ``adbc_driver_snowflake``; by default that
            of the URI, which is known for PostgreSQL.

    Example::

        ideas = SqlTable({"env": "SHOP_URL"}, "select id as prompt_id, prompt from ideas")
    """

    uri: str | Options = field(repr=False)
    query: str
    driver: str = ""

    @property
    def shown(self) -> str:
        """The table in messages: the database, without a password."""
        uri = self.uri if isinstance(self.uri, str) else f"the variable {self.uri.get('env')}"
        return f"the query of {redact.location(uri)}"

    def __call__(self) -> pa.RecordBatchReader:
        """Run the query, and return its rows as a stream.

        Raises ConfigError for a driver that is not installed, and for what the database refuses.
        """
        uri = str(resolved({"uri": self.uri})["uri"])
        dbapi = self._dbapi(uri)
        try:
            connection = dbapi.connect(uri)
        except Exception as error:  # noqa: BLE001 - each driver has errors of its own
            raise self._failed(error, uri) from redact.safe_cause(error, uri)
        try:
            cursor = connection.cursor()
            cursor.execute(self.query)
            rows = cursor.fetch_record_batch()
            read = _until_read(rows, cursor, connection)
            return pa.RecordBatchReader.from_batches(rows.schema, read)
        except Exception as error:  # noqa: BLE001 - as above
            connection.close()
            raise self._failed(error, uri) from redact.safe_cause(error, uri)

    def _dbapi(self, uri: str) -> Any:
        driver = self.driver or _DRIVERS.get(database_of(uri), "")
        if not driver:
            raise ConfigError(
                f"no ADBC driver is known for {redact.location(uri)}: name its package (driver), "
                "or give a function that reads the rows"
            )
        try:
            return import_module(f"{driver}.dbapi")
        except ImportError as error:
            package = "'krea-dagster[adbc]'" if driver in _DRIVERS.values() else driver
            raise ConfigError(
                f"{self.shown} needs {driver}, which is not installed: pip install {package}. "
                "Nothing was bought."
            ) from error

    def _failed(self, error: Exception, uri: str) -> ConfigError:
        reason = redact.text(first_line(error), uri)
        return ConfigError(f"{self.shown} failed: {reason}. Nothing was bought.")


def _until_read(
    rows: pa.RecordBatchReader, cursor: Any, connection: Any
) -> Iterator[pa.RecordBatch]:
    """Yield all rows, and then close the cursor, which they need, and the connection."""
    with connection, cursor:
        yield from rows
