"""The asset image_measures: the figures of every stored image, and a user's own."""

import time
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
from krea_dagster.plugin.io_manager import manifest_folders
from krea_dagster.plugin.metadata import location_value, small_table
from krea_dagster.plugin.quiet_beta import quiet_beta
from krea_dagster.plugin.resource import krea_of

MEASURES_ASSET: Final = "image_measures"

#: Seconds between two lines of progress in Dagster's log: each is an event in its database.
_LOG_EVERY_S: Final = 30.0

#: Figures of every picture that are shown; not the hash.
_SHOWN: Final = tuple(
    field.name
    for field in MEASURES_SCHEMA
    if field.type == pa.float64() or field.name == "perceptual_hash_quality"
)

#: Images that are named in the metadata and in the log where they could not be measured.
_NAMED: Final = 20

_BARS: Final = "▁▂▃▄▅▆▇█"
_BINS: Final = 12

_Floats = npt.NDArray[np.float64]


@quiet_beta
def build_image_measures(
    manifest_key: dg.AssetKey,
    *,
    partitions_def: dg.PartitionsDefinition[str],
    prefix: Sequence[str] = (),
    group_name: str = "krea",
    resource_key: str = "krea",
    custom: Sequence[Measure] = (),
    threads: int | None = None,
    backfill_policy: dg.BackfillPolicy | None = None,
    automation_condition: dg.AutomationCondition[Any] | None = None,
) -> dg.AssetsDefinition:
    """Build ``image_measures``, partitioned as the manifest: ``measures/<partition>.parquet``.

    A run takes one partition or, by default (single_run), any range of them in one step. What a
    run of ``images`` measured while it verified is taken over, and what was measured before;
    only other files are read, by ``threads`` threads (one for each core). ``custom`` are
    measures of one's own. Nothing is bought, and the network is needed only where the images lie
    behind a URL. Raises ConfigError for two measures of one name.
    """
    own = checked(custom)
    schema = measures_schema(one.name for one in own)

    @dg.asset(
        key=dg.AssetKey([*prefix, MEASURES_ASSET]),
        deps=[manifest_key],
        partitions_def=partitions_def,
        backfill_policy=backfill_policy or dg.BackfillPolicy.single_run(),
        group_name=group_name,
        kinds={"parquet", "pillow"},
        automation_condition=automation_condition,
        required_resource_keys={resource_key},
        metadata={"dagster/column_schema": _shown_schema(schema, own)},
        description=(
            "One row per stored image: perceptual hash, sharpness, brightness, contrast, entropy, "
            "main colour, border, and measures of your own."
        ),
    )
    def image_measures(context: dg.AssetExecutionContext) -> dg.MaterializeResult[None]:
        krea = krea_of(context, resource_key)
        with as_failure():
            for measured in measure_partitions(
                krea.open_storage(),
                partition_keys_of(context),
                folders=manifest_folders(manifest_key),
                custom=own,
                threads=threads,
                on_progress=_Progress(context),
            ):
                for failure in measured.failures[:_NAMED]:
                    context.log.warning("Not measured: %s", redact.text(str(failure)))
                context.add_asset_metadata(
                    measures_metadata(measured), partition_key=measured.partition_key
                )
        return dg.MaterializeResult()

    return image_measures


def measures_metadata(measured: MeasuredPartition) -> Mapping[str, Any]:
    """The metadata of one partition: counts, the median of each figure, and how they lie."""
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
    """One line: how many values there are, where they lie, and a small histogram."""
    line: dict[str, Any] = {"measure": name, "images": len(found)}
    if not len(found):
        return line
    quantiles = np.quantile(found, (0.0, 0.05, 0.5, 0.95, 1.0))
    for said, value in zip(("least", "p5", "median", "p95", "most"), quantiles, strict=True):
        line[said] = float(f"{value:.4g}")
    return {**line, "histogram": histogram_text(found)}


def histogram_text(values: _Floats) -> str:
    """Twelve bars from the least to the greatest value, the tallest for the most common range."""
    counts, _ = np.histogram(values, bins=_BINS)
    heights = np.ceil(counts / counts.max() * (len(_BARS) - 1)).astype(int)
    return "".join(_BARS[height] for height in heights)


def _numbers(column: pa.ChunkedArray) -> _Floats:
    """The values of a column, without those that are none or without bound."""
    values = np.asarray(column.drop_null().to_numpy(), np.float64)
    return values[np.isfinite(values)]


def _shown_schema(schema: pa.Schema, own: Sequence[Measure]) -> dg.TableSchema:
    means = {
        **MEASURES_DESCRIPTIONS,
        **{
            one.name: f"{one.description or 'A measure of your own'} (version {one.version})"
            for one in own
        },
    }
    return dg.TableSchema(
        [
            dg.TableColumn(field.name, str(field.type), description=means[field.name])
            for field in schema
        ]
    )


class _Progress:
    """Tells Dagster's log now and then how far the reading of files is."""

    def __init__(self, context: dg.AssetExecutionContext) -> None:
        self._log = context.log
        self._next_s = time.monotonic() + _LOG_EVERY_S

    def __call__(self, read: int, of: int) -> None:
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _LOG_EVERY_S
            self._log.info(f"{read} of {of} files read and measured")
