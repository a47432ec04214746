"""What the spend tables have taken from the journal so far: ``spend/state.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from krea_dagster.engine.journal.purchases import PurchaseTotals
from krea_dagster.engine.storage.storage import Storage

#: Raised with every change of what the files hold: then all of them are made anew.
FORMAT: Final = 3

STATE_NAME: Final = "spend/state.json"


def table_name(table: str, month: str) -> str:
    """The name of a month's file under the storage root."""
    return f"spend/{table}/{month}.parquet"


@dataclass(frozen=True)
class SpendState:
    """From which journal, at which settings, and how far.

    ``taken_until_us`` is the time up to which every event was seen, if clocks agree; ``months``
    are the totals of each month as they were when its files were written, and ``labels`` what the
    manifests said of its purchases.
    """

    journal_id: str
    credits_per_usd: str
    by: tuple[str, ...] = ()
    taken_until_us: int = 0
    months: Mapping[str, PurchaseTotals] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, storage: Storage) -> SpendState | None:
        """Read it; None where there is none that can be used, so that all is made anew."""
        try:
            with storage.open(STATE_NAME) as file:
                said: Mapping[str, Any] = json.load(file)
            if said["format"] != FORMAT:
                return None
            return cls(
                said["journal_id"],
                said["credits_per_usd"],
                tuple(said["by"]),
                int(said["taken_until_us"]),
                {month: PurchaseTotals(**totals) for month, totals in said["months"].items()},
                {month: str(label) for month, label in said["labels"].items()},
            )
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def write(self, storage: Storage) -> None:
        """Write it, atomically."""
        values = {"format": FORMAT, **asdict(self), "by": list(self.by)}
        text = json.dumps(values, indent=1, sort_keys=True) + "\n"
        storage.write(STATE_NAME, lambda file: _put(file, text.encode()))


def _put(file: Any, data: bytes) -> None:
    file.write(data)
