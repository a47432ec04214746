"""The views of the spend tables: what all surfaces read, and what a query with ``--sql`` can name.

| view | a row is |
|---|---|
| ``ledger`` | a purchase |
| ``entries`` | an entry of the account: a refund, credits bought or given, a correction |
| ``charges`` | a purchase, or a refund or correction of a charge, as that purchase is attributed |
| ``balance`` | a reading of an account's credits |
| ``daily`` | the measures of a UTC day, partition, table, quality, size, and the user's columns |
| ``failures`` | the purchases without an image of a UTC day, partition, quality, error code |
| ``attribution`` | a purchase: what it was made for, and the same columns in today's table |
| ``manifest`` | a row of the manifests, with the prompt table's columns as they are today |
| ``prompts`` | a row of the prompt table |
| ``spend_by_day`` | the measures of a day |
| ``spend_by_partition`` | the measures of a day and a partition (``partition``) |
| ``spend_by_price`` | the purchases (``calls``) of a day and quality at one ``price`` |

The measures are those of ``measures.py``, under their names; ``daily`` has those of purchases. A
day is that of the time zone that the views were opened with; those of ``daily`` and ``failures``
are always UTC, and the day of an entry is the one that was entered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias
from zoneinfo import ZoneInfo

import pyarrow as pa

from krea_dagster.engine.journal.entry_log import CORRECTION, REFUND
from krea_dagster.engine.journal.prompt_table_log import GENERATED
from krea_dagster.errors import ConfigError
from krea_dagster.manifest import MANIFEST_SCHEMA
from krea_dagster.spend.tables.balance import BALANCE_SCHEMA
from krea_dagster.spend.tables.entries import ENTRIES_SCHEMA, charges_sql
from krea_dagster.spend.tables.measures import selected
from krea_dagster.spend.tables.sql import DuckDB, open_views, quoted

#: What DuckDB reads as a table: an Arrow table, a dataset, or ``Parts``.
Table: TypeAlias = Any

#: The column with the name of a purchase's partition: if several prompt tables share the journal,
#: its key comes after the name of its table.
PARTITION: Final = "partition"
PARTITION_SQL: Final = f"""
    if(
        prompt_table IS NULL OR starts_with(prompt_table, '{GENERATED}') OR 1 >= (
            SELECT count(DISTINCT prompt_table) FROM ledger
            WHERE NOT starts_with(prompt_table, '{GENERATED}')
        ),
        partition_key, prompt_table || '/' || partition_key
    )
"""

#: The views that are made of purchases and refunds.
_SUMS: Final[Mapping[str, str]] = {
    "spend_by_day": f"SELECT day, {selected()} FROM charges GROUP BY day ORDER BY day",
    "spend_by_partition": (
        f"SELECT day, {PARTITION_SQL} AS {PARTITION}, {selected()} FROM charges "
        "GROUP BY ALL ORDER BY ALL"
    ),
    "spend_by_price": (
        "SELECT day, quality, credits_charged AS price, count(*) AS calls FROM ledger "
        "WHERE credits_charged > 0 GROUP BY ALL ORDER BY ALL"
    ),
}


@dataclass(frozen=True)
class SpendTables:
    """The three spend tables, the manifests, entries and balances."""

    ledger: Table
    daily: Table
    failures: Table
    manifest: Table = field(default_factory=MANIFEST_SCHEMA.empty_table)
    entries: pa.Table = field(default_factory=ENTRIES_SCHEMA.empty_table)
    balance: pa.Table = field(default_factory=BALANCE_SCHEMA.empty_table)

    def open(self, *, zone: str = "UTC", **further: Table) -> DuckDB:
        """Open a DuckDB with the views, and ``further`` tables. Raises ConfigError for a zone."""
        tables: dict[str, Table] = {
            "daily": self.daily,
            "failures": self.failures,
            "manifest": self.manifest,
            "entries": self.entries,
            "balance": self.balance,
            **further,
        }
        kinds = set(self.entries["counts_as"].to_pylist())
        has_refunds = bool(kinds & {REFUND, CORRECTION})
        sums = {"charges": charges_sql(has_refunds=has_refunds), **_SUMS}
        if is_utc(zone):
            return open_views({"ledger": self.ledger, **tables}, sums)
        day = f"CAST(timezone('{zone}', sent_at) AS DATE)"
        local = f"SELECT * REPLACE ({day} AS day) FROM {quoted('ledger of UTC')}"
        return open_views({"ledger of UTC": self.ledger, **tables}, {"ledger": local, **sums})


def is_utc(zone: str) -> bool:
    """Return whether a time zone is UTC. Raises ConfigError for one that does not exist."""
    try:
        return ZoneInfo(zone).key in ("UTC", "Etc/UTC")
    except (ValueError, OSError, KeyError):
        raise ConfigError(
            f"{zone!r} is not a time zone; use a name such as Europe/Berlin"
        ) from None
