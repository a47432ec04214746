"""Assets that export images as a dataset, one for each export."""

from collections.abc import Mapping
from typing import Final

import dagster as dg
from pydantic import Field

from krea_dagster import redact
from krea_dagster.curation.export.export import Exported
from krea_dagster.curation.export.spec import ExportSpec
from krea_dagster.errors import ConfigError
from krea_dagster.plugin.failures import as_failure
from krea_dagster.plugin.metadata import (
    Metadata,
    krea_metadata,
    location_value,
    small_table,
    table_schema,
)
from krea_dagster.plugin.names import Names
from krea_dagster.plugin.progress import step_log
from krea_dagster.plugin.resource import krea_of

#: Maximum number of columns in the lineage, to keep the metadata small.
_COLUMNS: Final = 100

_KINDS: Final[Mapping[str, str]] = {
    "parquet": "parquet",
    "imagefolder": "huggingface",
    "webdataset": "file",
    "jsonl": "json",
    "csv": "csv",
}


class KreaExportConfig(dg.Config):
    """Options of one run of an export."""

    fresh: bool = Field(
        default=False,
        description=(
            "Assign all images to shards again, instead of keeping the shards of the last version."
        ),
    )


def build_export(names: Names, name: str, spec: ExportSpec) -> dg.AssetsDefinition:
    """Build an asset that exports ``accepted_images``, or with ``spec.everything`` the manifest.

    It writes to ``exports/<name>`` in the storage root. The asset's data version is that of the
    export, so that an export without changes makes nothing stale. Images that are missing or
    changed fail the run, and nothing is published. Raises ConfigError for an empty name.
    """
    if not name:
        raise ConfigError("an export needs a name")
    source_key = names.manifest_key if spec.everything else names.key("accepted_images")

    @dg.asset(
        key=names.key(name),
        deps=[source_key, names.key("near_duplicates")],
        group_name=names.group_name,
        kinds={_KINDS[spec.form]},
        required_resource_keys={names.resource_key},
        description=(
            f"The {'stored' if spec.everything else 'accepted'} images as a dataset ({spec.form}): "
            "verified, split by prompt, each image traceable."
        ),
    )
    def exported_images(
        context: dg.AssetExecutionContext, config: KreaExportConfig
    ) -> dg.MaterializeResult[None]:
        with step_log(context.log, "reading the accepted images") as log, as_failure():
            krea = krea_of(context, names.resource_key)
            done = krea.export(
                spec,
                krea.open_storage().locate("/".join(["exports", *names.prefix, name])),
                folders=names.prefix,
                fresh=config.fresh,
                on_progress=lambda progress: log.doing(
                    f"{progress.images} of {progress.total} images exported"
                ),
            )
        return dg.MaterializeResult(
            metadata=krea_metadata(export_metadata(done, source_key)),
            data_version=dg.DataVersion(done.version),
        )

    return exported_images


def export_metadata(done: Exported, source_key: dg.AssetKey) -> Metadata:
    """Return the metadata of one export: counts, splits, shards, location, and columns."""
    facts = done.facts
    columns = done.schema.names[:_COLUMNS]
    return {
        "dagster/row_count": facts.images,
        "images": facts.images,
        "prompts": facts.prompts,
        "version": done.version,
        "path": location_value(done.path),
        "index": location_value(f"{redact.location(done.path)}/index.parquet"),
        **({} if done.pushed is None else {"pushed": dg.MetadataValue.url(done.pushed.url)}),
        "bytes": done.bytes,
        "credits": facts.credits,
        "shards": done.shards,
        "shards_written": done.written,
        "shards_unchanged": done.linked + done.found,
        "left_out_as_alike": sum(facts.leaked.values()),
        "near_duplicates_known": facts.near_duplicates_known,
        "never_judged": facts.never_judged,
        "partitions_left_out": list(facts.left_out),
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
