"""DuckDB for the spend tables: connections, and the SQL expressions that several queries share."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import duckdb

from krea_dagster.engine.verdict import FLAG, REJECT

#: Bytes that DuckDB holds before it writes to disk.
_MEMORY: Final = "400MB"

#: A purchase whose image counts as accepted: delivered, not replaced by a later attempt, and
#: neither rejected nor flagged. Without any verdict, that is all that was delivered and not
#: replaced.
IS_ACCEPTED: Final = (
    f"outcome = 'delivered' AND coalesce(verdict, '') NOT IN ('{REJECT}', '{FLAG}')"
)

#: Credits that may have been charged, or were paid for an image that is not stored yet.
AT_STAKE: Final = (
    "coalesce(sum(credits_unknown + if(outcome = 'pending', coalesce(credits_charged, 0), 0)), 0)"
)

#: Credits that were charged, or may be charged.
COMMITTED: Final = "coalesce(sum(credits_charged), 0) + coalesce(sum(credits_unknown), 0)"


def count_of(*outcomes: str) -> str:
    """Return the expression that counts the purchases with these outcomes."""
    return f"count(*) FILTER (outcome IN ({', '.join(map(repr, outcomes))}))"


def quoted(name: str) -> str:
    """Return any name as an identifier of DuckDB."""
    return '"' + name.replace('"', '""') + '"'


def units_of(credits: Decimal | None) -> int:
    """Return credits of the tables in units; 0 for null."""
    return 0 if credits is None else int(credits.scaleb(4))


def open_duck(folder: Path | None = None) -> duckdb.DuckDBPyConnection:
    """Open a DuckDB in memory that loads no extension, and spills into a folder."""
    duck = duckdb.connect(
        ":memory:",
        config={
            "memory_limit": _MEMORY,
            "temp_directory": "" if folder is None else str(folder / "duck"),
            "preserve_insertion_order": "false",
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            "python_enable_replacements": "false",
        },
    )
    duck.execute("SET TimeZone = 'UTC'")
    return duck


def open_views(views: Mapping[str, Any]) -> duckdb.DuckDBPyConnection:
    """Open a DuckDB with Arrow tables or datasets as views. It can read and write nothing else."""
    duck = open_duck()
    for name, rows in views.items():
        duck.register(name, rows)
    duck.execute("SET enable_external_access = false; SET lock_configuration = true")
    return duck
