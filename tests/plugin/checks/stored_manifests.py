"""Manifests and files that are written by hand, and runs of checks over them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, BinaryIO

import dagster as dg
import pyarrow as pa

from krea_dagster import KreaResource
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.manifest import MANIFEST_SCHEMA, write_manifest
from krea_dagster.plugin.checks import (
    CheckFactory,
)
from tests.dagster_bench import QUIET, RANGE_END, RANGE_START

MANIFEST = dg.AssetKey(["shop", "image_manifest"])


FOLDERS = ["shop"]


KEYS = ("a", "b/1", "c")


MOODS = "moods"


DAYS = dg.DailyPartitionsDefinition("2026-11-01")


BY_MOOD: dg.DynamicPartitionsDefinition = dg.DynamicPartitionsDefinition(name=MOODS)


ERROR, WARN = dg.AssetCheckSeverity.ERROR, dg.AssetCheckSeverity.WARN


NOW = datetime(2026, 11, 2, tzinfo=timezone.utc)


@dataclass
class StoredManifests:
    """A storage root with manifests and files that a test writes."""

    root: str
    krea: KreaResource = field(init=False)
    storage: Storage = field(init=False)

    def __post_init__(self) -> None:
        self.krea = KreaResource(storage=self.root)
        self.storage = Storage(self.root)

    def row(self, number: int, **different: Any) -> dict[str, Any]:
        """Return a stored row, and write its file with this content."""
        key = hashlib.sha256(f"{number}".encode()).hexdigest()
        content = different.pop("content", f"content {number}".encode())
        name = f"images/{key[:2]}/{key}.png"
        if content is not None:
            self.storage.write(name, lambda file: put_bytes(file, content))
        row = {
            "prompt_id": f"row-{number:04d}",
            "sample": 0,
            "prompt": "a heron",
            "model": "krea-2-turbo",
            "size": "1:1",
            "quality": "1K",
            "seed": number + 1,
            "nsfw_check": False,
            "attempt": 0,
            "request_key": key,
            "partition_key": KEYS[0],
            "status": "stored",
            "task_id": f"task-{number}",
            "image_path": self.storage.locate(name),
            "image_sha256": hashlib.sha256(content or b"").hexdigest(),
            "image_bytes": len(content or b""),
            "image_format": "PNG",
            "width": 1024,
            "height": 1024,
            "credits_charged": 0.45,
            "stored_at": NOW,
            "reused": False,
        }
        return {**row, **different}

    def failed(self, number: int, code: str = "content_policy_violation") -> dict[str, Any]:
        """Return a row that failed."""
        nothing = dict.fromkeys(
            [
                "image_path", "image_sha256", "image_bytes", "image_format", "width", "height",
                "stored_at",
            ]
        )  # fmt: skip
        return self.row(
            number, **nothing, status="failed", credits_charged=0.0, error_code=code, content=b""
        )

    def write(self, rows: list[dict[str, Any]], key: str = KEYS[0]) -> None:
        """Write the manifest of a partition."""
        rows = [{**row, "partition_key": row.get("lies_in", key)} for row in rows]
        write_manifest(self.storage, key, pa.Table.from_pylist(rows, MANIFEST_SCHEMA), FOLDERS)

    def check(
        self,
        factory: CheckFactory,
        first: str | None = None,
        last: str | None = None,
        partitions_def: dg.PartitionsDefinition[str] = dg.StaticPartitionsDefinition(list(KEYS)),
        before: Callable[[str], object] = lambda _: None,
    ) -> dg.AssetCheckEvaluation:
        """Run a check alone, or after a run of the manifest of one partition or a range.

        ``before`` is called with the run's id.
        """

        @dg.asset(
            key=MANIFEST,
            partitions_def=partitions_def,
            backfill_policy=dg.BackfillPolicy.single_run(),
        )
        def made() -> None:
            before(dg.AssetExecutionContext.get().run.run_id)

        check = factory(MANIFEST, resource_key="shop_krea")
        defs = dg.Definitions(
            assets=[made],
            asset_checks=[check],
            resources={"shop_krea": self.krea},
            jobs=[
                dg.define_asset_job("alone", selection=dg.AssetSelection.checks(check)),
                dg.define_asset_job("both", selection=dg.AssetSelection.assets(made)),
            ],
        )
        job = defs.resolve_job_def("alone" if first is None else "both")
        how: dict[str, Any] = {}
        if last is not None:
            how["tags"] = {RANGE_START: first, RANGE_END: last}
        elif first is not None:
            how["partition_key"] = first
        with dg.DagsterInstance.ephemeral() as instance:
            instance.add_dynamic_partitions(MOODS, ["wild", "calm", "grim"])
            result = job.execute_in_process(instance=instance, run_config=QUIET, **how)
        (found,) = result.get_asset_check_evaluations()
        return found


def put_bytes(file: BinaryIO, content: bytes) -> None:
    file.write(content)


def named(check: dg.AssetCheckEvaluation) -> dict[str, str]:
    """Return the rows of a check's table, and why."""
    table = check.metadata["findings"]
    assert isinstance(table, dg.TableMetadataValue)
    return {str(one.data["prompt_id"]): str(one.data["why"]) for one in table.records}


def number(check: dg.AssetCheckEvaluation, name: str) -> Any:
    return check.metadata[name].value
