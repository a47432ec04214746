"""The manifest's IO manager: one Parquet file per partition, read back as one table."""

from collections.abc import Sequence
from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from krea_dagster.application.manifest_frames import Selection, load
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.manifest import Manifests, write_manifest
from krea_dagster.plugin.failures import as_failure
from krea_dagster.plugin.names import MANIFEST_ASSET
from krea_dagster.plugin.progress import step_log
from krea_dagster.plugin.resource import krea_of, named_options


class KreaManifestIOManager(dg.ConfigurableIOManager, extra="forbid"):
    """Writes manifests as one file per partition, and reads any number of them as one table.

    A downstream asset receives the type of its annotation: ``pandas.DataFrame``,
    ``polars.DataFrame``, ``polars.LazyFrame``, ``duckdb.DuckDBPyRelation`` (on its own
    connection), or ``pyarrow.Table``, which is also the default. The metadata of its ``AssetIn``
    may have

    - ``"columns"``: a list of names; only these are read from the files;
    - ``"images"``: ``"bytes"`` or ``"pil"`` adds a column ``image`` with each row's file or
      ``PIL.Image`` (pandas only), null for rows without an image; for 1,000 rows at most, or
      ``"most_images"``.

    An unknown type or option fails the step; the message lists the valid ones.

    Example::

        @dg.asset(
            ins={
                "image_manifest": dg.AssetIn(
                    input_manager_key="krea_manifest", metadata={"columns": ["prompt", "seed"]}
                )
            }
        )
        def seeds(image_manifest: polars.DataFrame) -> polars.DataFrame:
            return image_manifest.select("seed")
    """

    storage: str = Field(
        default="data/krea",
        description="Storage root, which contains manifest/: the storage of the KreaResource.",
    )

    storage_options: dict[str, Any] = Field(
        default={},
        description="How fsspec opens a root behind a URL: those of the KreaResource.",
        repr=False,
    )

    def handle_output(self, context: dg.OutputContext, obj: Manifests | pa.Table) -> None:
        """Write the file of each partition atomically, also without rows."""
        storage = self._storage()
        folders = manifest_folders(context.asset_key)
        if isinstance(obj, Manifests):
            keys = list(obj.partition_keys)
            with step_log(context.log, "writing the manifests") as log:
                for number, key in enumerate(keys):
                    log.doing(f"{number} of {len(keys)} manifests written")
                    obj.publish(storage, key, folders)
            obj.close()
            return
        for key, table in split_by_partition(obj, context.asset_partition_keys).items():
            write_manifest(storage, key, table, folders)

    def load_input(self, context: dg.InputContext) -> Any:
        """Read the manifests of the upstream partitions; those never written are skipped."""
        with as_failure():
            return load(
                self._storage(),
                sorted(context.asset_partition_keys),
                manifest_folders(context.asset_key),
                annotation=context.dagster_type.typing_type,
                selection=Selection.parse(context.definition_metadata or {}),
            )

    def _storage(self) -> Storage:
        return Storage(self.storage, named_options(self.storage_options))


def manifest_io_manager(resource_key: str) -> dg.IOManagerDefinition:
    """Return the IO manager over the storage root of a ``KreaResource``.

    It has no settings, so that the root is shown and changed in one place.
    """

    @dg.io_manager(
        config_schema={},
        required_resource_keys={resource_key},
        description=f"Writes and reads manifests in the storage root of {resource_key}.",
    )
    def manager(context: dg.InitResourceContext) -> KreaManifestIOManager:
        settings = krea_of(context, resource_key).settings
        return KreaManifestIOManager(
            storage=settings.storage, storage_options=dict(settings.storage_options)
        )

    return manager


def manifest_folders(key: dg.AssetKey) -> Sequence[str]:
    """Return the folders below ``manifest`` of an asset's files.

    They are the prefix of ``image_manifest``, and the whole key of other assets, so that no asset
    overwrites another's manifest.
    """
    return key.path[:-1] if key.path[-1] == MANIFEST_ASSET else key.path


def split_by_partition(table: pa.Table, keys: Sequence[str]) -> dict[str, pa.Table]:
    """Return the rows of each of these partitions by key, in their order."""
    keyed = table["partition_key"].combine_chunks().cast(pa.string())
    places = pc.index_in(keyed, value_set=pa.array(sorted(keys), pa.string()))
    order = pc.sort_indices(places)  # stable, the rows of other partitions last
    ordered = table.take(order)
    counts = dict.fromkeys(range(len(keys)), 0)
    counts |= {run["values"].as_py(): run["counts"].as_py() for run in pc.value_counts(places)}
    parts: dict[str, pa.Table] = {}
    start = 0
    for number, key in enumerate(sorted(keys)):
        parts[key] = ordered.slice(start, counts[number])
        start += counts[number]
    return parts
