"""The manifest's IO manager: one Parquet file per partition, read back as one table."""

from collections.abc import Sequence
from typing import Any, Final

import dagster as dg
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from krea_dagster.engine.storage import Storage
from krea_dagster.manifest import read_manifests, write_manifest

#: The last part of the key of the asset that this IO manager is made for.
MANIFEST_ASSET: Final = "image_manifest"


class KreaManifestIOManager(dg.ConfigurableIOManager, extra="forbid"):
    """Writes a manifest table as one file per partition, and reads any number of them as one.

    A downstream asset gets a ``pandas.DataFrame`` where its parameter is annotated so, and a
    ``pyarrow.Table`` otherwise.
    """

    storage: str = Field(
        default="data/krea",
        description="Root under which manifest/ lies: the storage of the KreaResource.",
    )

    def handle_output(self, context: dg.OutputContext, obj: pa.Table) -> None:
        """Write each partition's rows as its file, atomically; also where it has no rows."""
        storage = Storage(self.storage)
        for key, table in split_by_partition(obj, context.asset_partition_keys).items():
            write_manifest(storage, key, table, manifest_folders(context.asset_key))

    def load_input(self, context: dg.InputContext) -> Any:
        """Read the manifests of the upstream partitions; those never written are left out."""
        table = read_manifests(
            Storage(self.storage),
            sorted(context.asset_partition_keys),
            folders=manifest_folders(context.asset_key),
        )
        if context.dagster_type.typing_type is pd.DataFrame:
            return table.to_pandas()
        return table


def manifest_folders(key: dg.AssetKey) -> Sequence[str]:
    """The folders below ``manifest`` in which an asset's files lie.

    None for ``image_manifest`` itself; others have their prefix or their own name, so that no
    asset ever writes over another's manifest.
    """
    return key.path[:-1] if key.path[-1] == MANIFEST_ASSET else key.path


def split_by_partition(table: pa.Table, keys: Sequence[str]) -> dict[str, pa.Table]:
    """The rows of each of these partitions, by key, in their order."""
    column = table["partition_key"]
    return {key: table.filter(pc.equal(column, key)) for key in sorted(keys)}
