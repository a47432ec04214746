"""What a check looks at: the manifests of its run's partitions, read a row group at a time."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq

from krea_dagster import redact
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.manifest import manifest_name, manifest_names
from krea_dagster.plugin.checks.findings import NAMING
from krea_dagster.plugin.failures import as_failure
from krea_dagster.plugin.io_manager import manifest_folders
from krea_dagster.plugin.resource import krea_of

#: Rows that are read at once.
_ROWS: Final = 10_000


class CheckFactory(Protocol):
    """Makes a check of a manifest; ``functools.partial`` gives one with options of its own."""

    def __call__(
        self, manifest_key: dg.AssetKey, *, resource_key: str = "krea"
    ) -> dg.AssetChecksDefinition:
        """Return the check of this asset, whose KreaResource has this key."""


class UnreadableManifest(Exception):
    """A manifest file cannot be read. Its text names the file."""


@dataclass(frozen=True)
class Subject:
    """The manifests that a check looks at.

    ``names`` are their files under the storage root, ``absent`` the partitions of the run that
    have none. ``seed`` is drawn from the run, for samples.
    """

    storage: Storage
    names: Sequence[str]
    absent: Sequence[str]
    seed: int

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield the rows of all manifests. Raises UnreadableManifest."""
        for name in self.names:
            yield from self.batches_of(name, columns)

    def batches_of(self, name: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield the rows of one manifest: these columns and those that name a row."""
        wanted = list(dict.fromkeys([*NAMING, *columns]))
        with self.open(name) as parquet:
            lacking = [one for one in wanted if one not in parquet.schema_arrow.names]
            if lacking:
                raise UnreadableManifest(f"{self.storage.locate(name)} has no column {lacking[0]}")
            try:
                yield from parquet.iter_batches(_ROWS, columns=wanted)
            except (OSError, pa.ArrowException) as error:
                raise UnreadableManifest(_cannot(self.storage, name, error)) from error

    @contextmanager
    def open(self, name: str) -> Iterator[pq.ParquetFile]:
        """Open a manifest. Raises UnreadableManifest."""
        try:
            file = self.storage.open(name)
        except OSError as error:
            raise UnreadableManifest(_cannot(self.storage, name, error)) from error
        with file:
            try:
                parquet = pq.ParquetFile(file)
            except (OSError, pa.ArrowException) as error:
                raise UnreadableManifest(_cannot(self.storage, name, error)) from error
            yield parquet


def manifest_check(
    manifest_key: dg.AssetKey,
    resource_key: str,
    *,
    name: str,
    description: str,
    look: Callable[[Subject], dg.AssetCheckResult],
) -> dg.AssetChecksDefinition:
    """Build a check that looks at manifests.

    A manifest that cannot be read fails it as an error; where there is none, it warns.
    """

    @dg.asset_check(
        asset=manifest_key,
        name=name,
        required_resource_keys={resource_key},
        description=description,
    )
    def check(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        krea = krea_of(context, resource_key)
        with as_failure():
            subject = _subject(context, krea.open_storage(), manifest_key)
            if not subject.names:
                return dg.AssetCheckResult(
                    passed=False,
                    severity=dg.AssetCheckSeverity.WARN,
                    description="There is no manifest yet, so that nothing was checked.",
                    metadata={"partitions_checked": 0},
                )
            try:
                return look(subject)
            except UnreadableManifest as error:
                return dg.AssetCheckResult(
                    passed=False,
                    description=redact.text(
                        f"{error}; materialize {manifest_key.to_user_string()} again."
                    ),
                    metadata={"partitions_checked": 0},
                )

    return check


def common_metadata(subject: Subject, rows: int) -> dict[str, Any]:
    """What every check tells: how much it looked at."""
    return {"partitions_checked": len(subject.names), "rows_checked": rows}


def _subject(
    context: dg.AssetCheckExecutionContext, storage: Storage, manifest_key: dg.AssetKey
) -> Subject:
    folders = manifest_folders(manifest_key)
    seed = int.from_bytes(hashlib.sha256(context.run.run_id.encode()).digest()[:4], "big")
    keys = _partition_keys(context)
    if keys is None:
        return Subject(storage, list(manifest_names(storage, folders)), (), seed)
    names = {key: manifest_name(key, folders) for key in keys}
    there = [key for key, name in names.items() if storage.size_bytes(name) is not None]
    return Subject(
        storage, [names[key] for key in there], [key for key in keys if key not in there], seed
    )


def _partition_keys(context: dg.AssetCheckExecutionContext) -> list[str] | None:
    """The partitions of the run, one or a range; None where it has none.

    The check itself is not partitioned, for that is a preview in Dagster, and a job of such
    checks alone fails with a partition.
    """
    run = context.op_execution_context
    if not run.has_partition_key and not run.has_partition_key_range:
        return None
    return [str(key) for key in run.partition_keys]


def _cannot(storage: Storage, name: str, error: Exception) -> str:
    return f"{storage.locate(name)} cannot be read: {str(error).strip()[:300]}"
