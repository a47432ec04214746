"""One run that many tests read: it buys a range of partitions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg

from krea_dagster.prompts import HashPartitions
from tests.prompts.reference import key_for

#: In every prompt of the run, to find its tasks.
MARKER = "of the shared run"
PREFIX = "shared"
BUCKETS = ("bucket-000", "bucket-001")


@dataclass(frozen=True)
class BoughtRun:
    """A table, its definitions, the account that paid, and the run that bought both partitions."""

    rows: list[dict[str, Any]]
    storage: Path
    defs: dg.Definitions
    result: dg.ExecuteInProcessResult
    api_key: str

    def ids(self, bucket: str) -> list[str]:
        """The prompt_ids of a partition, in the table's order."""
        ids = [str(row["prompt_id"]) for row in self.rows]
        return [id_ for id_ in ids if key_for(HashPartitions(2), id_) == bucket]


def rows_of_the_run() -> list[dict[str, Any]]:
    def row(prompt_id: str, text: str = "", **wishes: Any) -> dict[str, Any]:
        prompt = f"{prompt_id} {MARKER} {text}".strip()
        wanted = {"quality": "1K", "size": "1:1", "seed": None, "num_images": 1, **wishes}
        return {"prompt_id": prompt_id, "prompt": prompt, **wanted, "campaign": "autumn"}

    rows = [row(f"plain-{number:02d}") for number in range(10)]
    rows += [row("wide-00", size="16:9"), row("tall-00", size="1:2")]
    rows += [row("pair-00", num_images=2)]
    # Two rows with the same request: bought once, and both get the image.
    rows += [{**row("twin-00", seed=7), "prompt": f"the twins {MARKER}"}]
    rows += [{**row("twin-04", seed=7), "prompt": f"the twins {MARKER}"}]
    rows += [row("refused-00", "[emulator: refuse]")]
    rows += [row("failed-00", "[emulator: fail content_policy_violation]")]
    return rows
