"""The shape of all checks of manifests: which manifests they read, and how."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq

from krea_dagster import redact
from krea_dagster.application.krea import Krea
from krea_dagster.engine.journal.bulk_reads import request_count
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.manifest import manifest_name, manifest_names
from krea_dagster.parquet_files import open_parquet
from krea_dagster.plugin.checks.findings import NAMING
from krea_dagster.plugin.failures import as_failure
from krea_dagster.plugin.io_manager import manifest_folders
from krea_dagster.plugin.progress import step_log
from krea_dagster.plugin.resource import krea_of

#: Rows of a batch.
_ROWS: Final = 10_000


class CheckFactory(Protocol):
    """Builds a check of a manifest; ``functools.partial`` makes one with other options."""

    def __call__(
        self, manifest_key: dg.AssetKey, *, resource_key: str = "krea"
    ) -> dg.AssetChecksDefinition:
        """Build the check of this asset, with the key of its KreaResource."""


class UnreadableManifest(Exception):
    """A manifest file cannot be read. The text names the file."""


@dataclass(frozen=True)
class CheckedManifests:
    """The manifests that a check reads.

    ``names`` are their files under the storage root, ``absent`` the partitions of the run without
    one. ``stored`` is about how many images an object store has, 0 for a folder. ``seed`` is
    derived from the run, ``run_id``, for samples. ``verified`` tells whether runs decode the images
    that they buy.
    """

    storage: Storage
    names: Sequence[str]
    absent: Sequence[str]
    stored: int
    seed: int
    run_id: str
    verified: bool

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
                raise UnreadableManifest(_unreadable(self.storage, name, error)) from error

    @contextmanager
    def open(self, name: str) -> Iterator[pq.ParquetFile]:
        """Open a manifest. Raises UnreadableManifest."""
        try:
            file = self.storage.open(name)
        except OSError as error:
            raise UnreadableManifest(_unreadable(self.storage, name, error)) from error
        with file:
            try:
                parquet = open_parquet(file)
            except (OSError, pa.ArrowException) as error:
                raise UnreadableManifest(_unreadable(self.storage, name, error)) from error
            yield parquet


def manifest_check(
    manifest_key: dg.AssetKey,
    resource_key: str,
    *,
    name: str,
    description: str,
    check: Callable[[CheckedManifests], dg.AssetCheckResult],
) -> dg.AssetChecksDefinition:
    """Build a check of manifests.

    A manifest that cannot be read fails it as an error; if there is none, it warns.
    """

    @dg.asset_check(
        asset=manifest_key,
        name=name,
        required_resource_keys={resource_key},
        description=description,
    )
    def run_check(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        krea = krea_of(context, resource_key)
        with step_log(context.log, "comparing the manifests with the files"), as_failure():
            manifests = _manifests_of(context, krea, manifest_key)
            if not manifests.names:
                return dg.AssetCheckResult(
                    passed=False,
                    severity=dg.AssetCheckSeverity.WARN,
                    description="Nothing was checked: there is no manifest yet.",
                    metadata={"partitions_checked": 0},
                )
            try:
                return check(manifests)
            except UnreadableManifest as error:
                return dg.AssetCheckResult(
                    passed=False,
                    description=redact.text(
                        f"{error}; materialize {manifest_key.to_user_string()} again."
                    ),
                    metadata={"partitions_checked": 0},
                )

    return run_check


def common_metadata(manifests: CheckedManifests, rows: int) -> dict[str, Any]:
    """Return the metadata of every check: how much it read."""
    return {"partitions_checked": len(manifests.names), "rows_checked": rows}


def _manifests_of(
    context: dg.AssetCheckExecutionContext, krea: Krea, manifest_key: dg.AssetKey
) -> CheckedManifests:
    storage, run_id = krea.open_storage(), context.run.run_id
    found = partial(
        CheckedManifests,
        storage=storage,
        stored=0 if storage.folder is not None else _count_stored(krea),
        seed=int.from_bytes(hashlib.sha256(run_id.encode()).digest()[:4], "big"),
        run_id=run_id,
        verified=krea.settings.verify_images,
    )
    folders = manifest_folders(manifest_key)
    keys = _partition_keys(context)
    if keys is None:
        return found(names=list(manifest_names(storage, folders)), absent=())
    names = {key: manifest_name(key, folders) for key in keys}
    there = [key for key, name in names.items() if storage.size_bytes(name) is not None]
    return found(
        names=[names[key] for key in there], absent=[key for key in keys if key not in there]
    )


def _count_stored(krea: Krea) -> int:
    if not krea.settings.journal_url or not krea.has_journal():
        return 0
    with krea.open_journal() as journal, journal.database.read() as connection:
        return request_count(connection)


def _partition_keys(context: dg.AssetCheckExecutionContext) -> list[str] | None:
    """Return the partitions of the run, one or a range; None for a run without partitions.

    The check itself is not partitioned: that is a preview in Dagster, and a job of such checks
    alone fails with a partition.
    """
    run = context.op_execution_context
    if not run.has_partition_key and not run.has_partition_key_range:
        return None
    return [str(key) for key in run.partition_keys]


def _unreadable(storage: Storage, name: str, error: Exception) -> str:
    return f"{storage.locate(name)} cannot be read: {str(error).strip()[:300]}"
