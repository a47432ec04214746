"""What purchases are made for, and who makes them: each fact is written once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from sqlalchemy import Connection

from krea_dagster.engine.journal.database import DatabaseLog
from krea_dagster.engine.journal.schema import attributions, buyers
from krea_dagster.engine.journal.sql import insertion


@dataclass(frozen=True)
class Buyer:
    """Who buys in a run: an asset of a job, perhaps for a backfill, a user, and chosen tags."""

    asset: str | None = None
    job: str | None = None
    backfill: str | None = None
    user: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


def attributes_text(values: Mapping[str, str | None]) -> str:
    """Return values of columns as the text that the journal keeps: equal values, equal text."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def attribution_id(attributes: str) -> int:
    """Return the number of a text of attributes, the same in every run."""
    digest = hashlib.sha256(attributes.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class AttributionLog(DatabaseLog):
    """The attributions and buyers in a journal's database."""

    def enter(self, attributes: Iterable[str]) -> None:
        """Enter texts of attributes that may be known. Raises JournalError."""
        rows = [{"attribution_id": attribution_id(text), "attributes": text} for text in attributes]

        def write(connection: Connection) -> None:
            connection.execute(insertion(connection, attributions).on_conflict_do_nothing(), rows)

        if rows:
            self._database.write("enter what is bought for in", write)

    def enter_buyer(self, run_id: str, table_id: str, buyer: Buyer) -> None:
        """Enter who buys in a run for a prompt table; the first entry stays."""
        row = {
            "run_id": run_id,
            "table_id": table_id,
            "asset": buyer.asset,
            "job": buyer.job,
            "backfill": buyer.backfill,
            "user_name": buyer.user,
            "tags": attributes_text(dict(buyer.tags)) if buyer.tags else None,
        }

        def write(connection: Connection) -> None:
            connection.execute(insertion(connection, buyers).on_conflict_do_nothing(), [row])

        self._database.write("enter a run in", write)
