"""Rows in which a check found something: their number, and the first of them by name."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import dagster as dg
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster import redact
from krea_dagster.plugin.metadata import small_table

#: The columns that name a row.
NAMING: Final = ("partition_key", "prompt_id", "sample")

#: Maximum number of rows in the table of findings.
MOST_ROWS: Final = 50

#: Maximum size of that table in bytes.
_MOST_BYTES: Final = 40_000

#: Maximum number of characters of a reason in a sentence.
_MOST_REASON: Final = 200


class RowFindings:
    """Findings about rows. ``count`` counts all of them; ``rows`` holds the first 50."""

    def __init__(self) -> None:
        self.count = 0
        self.rows: list[dict[str, Any]] = []

    @property
    def room(self) -> int:
        """The number of rows that are still kept by name."""
        return MOST_ROWS - len(self.rows)

    def add(
        self,
        batch: pa.RecordBatch,
        which: pa.Array,
        why: str | Callable[[Mapping[str, Any]], str],
    ) -> int:
        """Add the rows of a batch that are true in ``which``, and return their number.

        ``why`` is called for the rows that are kept. The batch must have the columns ``NAMING``.
        """
        count = pc.sum(which).as_py() or 0
        self.count += count
        if count and self.room:
            for row in batch.filter(which).slice(0, self.room).to_pylist():
                self._keep(row, why if isinstance(why, str) else why(row))
        return count

    def add_row(self, row: Mapping[str, Any], why: str) -> None:
        """Add one row."""
        self.count += 1
        if self.room:
            self._keep(row, why)

    def _keep(self, row: Mapping[str, Any], why: str) -> None:
        self.rows.append({**{name: row.get(name) for name in NAMING}, "why": redact.text(why)})

    def named(self, most: int = 3) -> str:
        """Return a sentence with the first rows, and why."""
        said = [f"{_name_of(row)}: {row['why'][:_MOST_REASON]}" for row in self.rows[:most]]
        more = self.count - len(said)
        return "; ".join(said) + (f"; and {more} more" if more > 0 else "")

    def metadata(self) -> dict[str, Any]:
        """Return the table for the UI, and the count; empty without findings."""
        if not self.count:
            return {}
        schema = dg.TableSchema(
            columns=[
                dg.TableColumn("partition_key", "string", description="Partition of the row"),
                dg.TableColumn("prompt_id", "string", description="Identity of the prompt"),
                dg.TableColumn("sample", "int", description="Which of the row's images"),
                dg.TableColumn("why", "string", description="What was found"),
            ]
        )
        return {
            "findings": small_table(self.rows, schema, most_bytes=_MOST_BYTES),
            "findings_count": self.count,
        }


def _name_of(row: Mapping[str, Any]) -> str:
    if row["prompt_id"] is None:
        return f"partition {row['partition_key']}"
    sample = f" sample {row['sample']}" if row["sample"] else ""
    return f"{str(row['prompt_id'])[:60]}{sample}"
