"""How far the spend tables follow the journal: ``spend/state.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from krea_dagster.engine.journal.purchase_reads import PurchaseTotals
from krea_dagster.engine.storage.storage import Storage

#: Raised with every change of the files' content: then all of them are made again.
FORMAT: Final = 6

STATE_NAME: Final = "spend/state.json"


def table_name(table: str, month: str) -> str:
    """Return the name of a month's file under the storage root."""
    return f"spend/{table}/{month}.parquet"


@dataclass(frozen=True)
class SpendState:
    """The journal and the settings that the tables were made from, and how far.

    ``taken_until_us`` is the time up to which every event was seen, if clocks agree. ``months`` are
    the totals of each month when its files were written, ``labels`` a hash of the columns
    ``by`` of its purchases then. ``recent`` counts the events of the margin before that time.
    ``mark`` differs once anything else has changed that the tables are made from, or their files;
    empty where that cannot be known.
    """

    journal_id: str
    credit_prices: str
    by: tuple[str, ...] = ()
    taken_until_us: int = 0
    months: Mapping[str, PurchaseTotals] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    recent: str = ""
    mark: str = ""

    @classmethod
    def read(cls, storage: Storage) -> SpendState | None:
        """Read the state; None without a usable one: then all files are made again."""
        try:
            state: Mapping[str, Any] = json.loads(storage.read(STATE_NAME))
            if state["format"] != FORMAT:
                return None
            return cls(
                state["journal_id"],
                state["credit_prices"],
                tuple(state["by"]),
                int(state["taken_until_us"]),
                {month: PurchaseTotals(**totals) for month, totals in state["months"].items()},
                {month: str(label) for month, label in state["labels"].items()},
                str(state.get("recent", "")),
                str(state.get("mark", "")),
            )
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def write(self, storage: Storage) -> None:
        """Write the state, atomically."""
        values = {"format": FORMAT, **asdict(self), "by": list(self.by)}
        text = json.dumps(values, indent=1, sort_keys=True) + "\n"
        storage.write(STATE_NAME, lambda file: file.write(text.encode()))
