"""Assets that hand images on as a dataset: one for each export that is wanted."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import dagster as dg
from pydantic import Field

from krea_dagster import redact
from krea_dagster.curation.export.export import Exported, export
from krea_dagster.curation.export.shards import ExportProgress
from krea_dagster.curation.export.spec import ExportSpec
from krea_dagster.errors import ConfigError
from krea_dagster.plugin.assets.accepted import ACCEPTED_ASSET
from krea_dagster.plugin.failures import as_failure
from krea_dagster.plugin.io_manager import manifest_folders
from krea_dagster.plugin.metadata import (
    Metadata,
    location_value,
    small_table,
    table_schema,
)
from krea_dagster.plugin.resource import krea_of

#: Seconds between two lines of progress in Dagster's log: each is an event in its database.
_LOG_EVERY_S: Final = 30.0

#: Columns whose lineage is told: metadata is to stay small.
_COLUMNS: Final = 100

_KINDS: Final[Mapping[str, str]] = {
    "parquet": "parquet",
    "imagefolder": "huggingface",
    "webdataset": "tar",
    "jsonl": "json",
    "csv": "csv",
}


class KreaExportConfig(dg.Config):
    """What a person may ask of one run."""

    fresh: bool = Field(
        default=False,
        description="Put images into shards anew, instead of where the version before has them.",
    )


def build_export(
    manifest_key: dg.AssetKey,
    *,
    name: str,
    spec: ExportSpec | None = None,
    to: str | None = None,
    likeness_key: dg.AssetKey | None = None,
    prefix: Sequence[str] = (),
    group_name: str = "krea",
    resource_key: str = "krea",
    keep: int | None = None,
    automation_condition: dg.AutomationCondition[Any] | None = None,
) -> dg.AssetsDefinition:
    """Build an asset that exports ``accepted_images``, or with ``spec.everything`` the manifest.

    It takes all partitions, or those of the spec. ``to`` is a folder or URL; None is
    ``exports/<name>`` in the storage root. Where images that are alike are kept out of further
    splits, ``likeness_key`` is ``near_duplicates``. The asset's data version is
    that of the export, so that an export without changes makes nothing stale. ``keep`` removes
    complete versions but the last so many. Images that are missing or changed fail the run, and
    nothing is published. Raises ConfigError for an empty name.
    """
    if not name:
        raise ConfigError("an export needs a name")
    wanted = spec or ExportSpec()
    folders = manifest_folders(manifest_key)
    source_key = manifest_key if wanted.everything else dg.AssetKey([*prefix, ACCEPTED_ASSET])
    alike = [likeness_key] if likeness_key is not None else []

    @dg.asset(
        key=dg.AssetKey([*prefix, name]),
        deps=[source_key, *alike],
        group_name=group_name,
        kinds={_KINDS[wanted.form]},
        automation_condition=automation_condition,
        required_resource_keys={resource_key},
        description=(
            f"The {'stored' if wanted.everything else 'accepted'} images as a dataset "
            f"({wanted.form}): verified, split by prompt, each image traceable."
        ),
    )
    def exported_images(
        context: dg.AssetExecutionContext, config: KreaExportConfig
    ) -> dg.MaterializeResult[None]:
        krea = krea_of(context, resource_key)
        with as_failure():
            storage = krea.open_storage()
            done = export(
                storage,
                wanted,
                to or storage.locate("/".join(["exports", *prefix, name])),
                folders=folders,
                fresh=config.fresh,
                keep=keep,
                on_progress=_Progress(context),
            )
        return dg.MaterializeResult(
            metadata=export_metadata(done, source_key),
            data_version=dg.DataVersion(done.version),
        )

    return exported_images


def export_metadata(done: Exported, source_key: dg.AssetKey) -> Metadata:
    """The metadata of one export: counts, splits, shards, where it lies, and its columns."""
    facts = done.facts
    columns = done.schema.names[:_COLUMNS]
    values: dict[str, Any] = {
        "dagster/row_count": facts.images,
        "images": facts.images,
        "prompts": facts.prompts,
        "version": done.version,
        "path": location_value(done.path),
        "index": location_value(f"{redact.location(done.path)}/index.parquet"),
        "bytes": done.bytes,
        "credits": facts.credits,
        "shards": done.shards,
        "shards_written": done.written,
        "shards_unchanged": done.linked + done.found,
        "left_out_as_alike": sum(facts.leaked.values()),
        "near_duplicates_known": facts.near_duplicates_known,
        "splits": small_table(
            [
                {"split": name, "images": count, "left_out_as_alike": facts.leaked.get(name, 0)}
                for name, count in facts.splits.items()
            ]
        ),
        "dagster/column_schema": table_schema(done.schema),
        "dagster/column_lineage": dg.TableColumnLineage(
            {name: [dg.TableColumnDep(source_key, name)] for name in columns}
        ),
    }
    return values


class _Progress:
    """Tells Dagster's log now and then how far an export is."""

    def __init__(self, context: dg.AssetExecutionContext) -> None:
        self._log = context.log
        self._next_s = time.monotonic() + _LOG_EVERY_S

    def __call__(self, progress: ExportProgress) -> None:
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _LOG_EVERY_S
            self._log.info(f"{progress.images} of {progress.total} images exported")
