"""DuckDB for the spend tables: connections, names and amounts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, TypeAlias

import duckdb

DuckDB: TypeAlias = duckdb.DuckDBPyConnection

#: Bytes that DuckDB holds before it writes to disk.
_MEMORY: Final = "400MB"


def quoted(name: str) -> str:
    """Return any name as an identifier of DuckDB."""
    return '"' + name.replace('"', '""') + '"'


def text_literal(text: str) -> str:
    """Return any text as a literal of DuckDB."""
    return "'" + text.replace("'", "''") + "'"


def at_purchase(name: str) -> tuple[str, str]:
    """Return whether ``attributes`` has a column, and its value then, as expressions."""
    pointer = text_literal("/" + name.replace("~", "~0").replace("/", "~1"))
    return (
        f"coalesce(json_exists(attributes, {pointer}), false)",
        f"json_extract_string(attributes, {pointer})",
    )


def units_of(credits: Decimal | None) -> int:
    """Return credits of the tables in units; 0 for null."""
    return 0 if credits is None else int(credits.scaleb(4))


def open_duck(folder: Path | None = None) -> DuckDB:
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
    # The bar would be printed into the result of a notebook or of python -c.
    duck.execute("SET TimeZone = 'UTC'; SET enable_progress_bar = false")
    return duck


def open_views(views: Mapping[str, Any], sql: Mapping[str, str] | None = None) -> DuckDB:
    """Open a DuckDB with Arrow tables or datasets as views. It can read and write nothing else.

    ``sql`` defines further views on top of them.
    """
    duck = open_duck()
    for name, rows in views.items():
        register(duck, name, rows)
    for name, query in (sql or {}).items():
        duck.execute(f"CREATE VIEW {quoted(name)} AS {query}")
    duck.execute("SET enable_external_access = false; SET lock_configuration = true")
    return duck


def register(duck: DuckDB, name: str, rows: Any) -> None:
    """Make an Arrow table or dataset a view; several become one (``Parts``)."""
    if not isinstance(rows, Parts):
        duck.register(name, rows)
        return
    selects = []
    for number, part in enumerate(rows.tables):
        duck.register(f"{name}_{number}", part)
        names = part.schema.names
        as_text = ", ".join(
            f"CAST({quoted(one)} AS VARCHAR) AS {quoted(one)}" for one in rows.as_text & {*names}
        )
        replaced = f" REPLACE ({as_text})" if as_text else ""
        selects.append(f"SELECT *{replaced} FROM {quoted(f'{name}_{number}')}")
    duck.execute(f"CREATE VIEW {quoted(name)} AS {' UNION ALL BY NAME '.join(selects)}")


@dataclass(frozen=True)
class Parts:
    """Tables that are read as one. Columns whose types differ between them are read as text."""

    tables: Sequence[Any]
    as_text: frozenset[str]
