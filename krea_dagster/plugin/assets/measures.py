"""The asset ``image_measures``: built-in and custom measures of every stored image."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import dagster as dg
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from krea_dagster import redact
from krea_dagster.curation.measures.custom import Measure, checked
from krea_dagster.curation.measures.measure_partitions import MeasuredPartition, measure_partitions
from krea_dagster.curation.measures.measures_table import (
    MEASURES_DESCRIPTIONS,
    MEASURES_SCHEMA,
    measures_schema,
)
from krea_dagster.plugin.assets.images import partition_keys_of
from krea_dagster.plugin.failures import as_failure
from krea_dagster.plugin.metadata import krea_metadata, location_value, small_table, table_schema
from krea_dagster.plugin.names import Names
from krea_dagster.plugin.partitions import without_beta_warnings
from krea_dagster.plugin.progress import step_log
from krea_dagster.plugin.resource import krea_of

#: Built-in measures whose distribution is shown; not the hash.
_SHOWN: Final = tuple(
    field.name
    for field in MEASURES_SCHEMA
    if field.type == pa.float64() or field.name == "perceptual_hash_quality"
)

#: Maximum number of images that the metadata and the log name as not measured.
_NAMED: Final = 20

_BARS: Final = "▁▂▃▄▅▆▇█"
_BINS: Final = 12

_Floats = npt.NDArray[np.float64]


def build_image_measures(
    names: Names,
    partitions_def: dg.PartitionsDefinition[str],
    *,
    custom: Sequence[Measure] = (),
) -> dg.AssetsDefinition:
    """Build ``image_measures``, partitioned as the manifest: ``measures/<partition>.parquet``.

    A run takes one partition or any range of them in one step. Measures that a run of ``images``
    took while it verified, and earlier ones, are reused; only other files are read. Raises
    ConfigError for two measures of one name.
    """
    own = checked(custom)
    schema = measures_schema(one.name for one in own)
    with without_beta_warnings():

        @dg.asset(
            key=names.key("image_measures"),
            deps=[names.manifest_key],
            partitions_def=partitions_def,
            backfill_policy=dg.BackfillPolicy.single_run(),
            group_name=names.group_name,
            kinds={"parquet", "numpy"},
            required_resource_keys={names.resource_key},
            metadata={"dagster/column_schema": _shown_schema(schema, own)},
            description=(
                "One row per stored image: perceptual hash, sharpness, brightness, contrast, "
                "entropy, main colour, border, and custom measures."
            ),
        )
        def image_measures(context: dg.AssetExecutionContext) -> dg.MaterializeResult[None]:
            krea = krea_of(context, names.resource_key)
            with step_log(context.log, "reading the manifests") as log, as_failure():
                for measured in measure_partitions(
                    krea.open_storage(),
                    partition_keys_of(context),
                    folders=names.prefix,
                    custom=own,
                    on_progress=lambda read, of: log.doing(
                        f"{read} of {of} files read and measured"
                    ),
                ):
                    for failure in measured.failures[:_NAMED]:
                        context.log.warning("Not measured: %s", redact.text(str(failure)))
                    context.add_asset_metadata(
                        krea_metadata(measures_metadata(measured)),
                        partition_key=measured.partition_key,
                    )
            return dg.MaterializeResult()

    return image_measures


def measures_metadata(measured: MeasuredPartition) -> Mapping[str, Any]:
    """Return the metadata of one partition: counts, and median and distribution of each measure."""
    table = measured.table
    names = [*_SHOWN, *table.column_names[len(MEASURES_SCHEMA) :]]
    columns = {name: _numbers(table[name]) for name in names}
    values: dict[str, Any] = {
        "dagster/partition_row_count": len(table),
        "images_measured_now": measured.read,
        "images_reused": measured.images - measured.read,
        "images_not_measured": measured.images - len(table),
        "path": location_value(measured.path),
        **{
            f"{name}_median": float(np.median(found))
            for name, found in columns.items()
            if len(found)
        },
    }
    if len(table):
        values["figures"] = small_table(_figures(name, found) for name, found in columns.items())
    if measured.failures:
        values["not_measured"] = small_table(
            {
                "prompt_id": one.file.prompt_id,
                "sample": one.file.sample,
                "measure": one.measure or "all",
                "why": one.why,
                "image_path": one.file.path,
            }
            for one in measured.failures[:_NAMED]
        )
    return values


def _figures(name: str, found: _Floats) -> Mapping[str, Any]:
    """Return one row of the table: number of values, quantiles, and a small histogram."""
    row: dict[str, Any] = {"measure": name, "images": len(found)}
    if not len(found):
        return row
    quantiles = np.quantile(found, (0.0, 0.05, 0.5, 0.95, 1.0))
    for label, value in zip(("least", "p5", "median", "p95", "most"), quantiles, strict=True):
        row[label] = float(f"{value:.4g}")
    return {**row, "histogram": histogram_text(found)}


def histogram_text(values: _Floats) -> str:
    """Return twelve bars from the least to the greatest value; the tallest is the most common."""
    counts, _ = np.histogram(values, bins=_BINS)
    heights = np.ceil(counts / counts.max() * (len(_BARS) - 1)).astype(int)
    return "".join(_BARS[height] for height in heights)


def _numbers(column: pa.ChunkedArray) -> _Floats:
    """Return the finite values of a column."""
    values = np.asarray(column.drop_null().to_numpy(), np.float64)
    return values[np.isfinite(values)]


def _shown_schema(schema: pa.Schema, own: Sequence[Measure]) -> dg.TableSchema:
    described = {
        one.name: f"{one.description or 'A custom measure'} (version {one.version})" for one in own
    }
    return table_schema(schema, {**MEASURES_DESCRIPTIONS, **described})
