"""The check of the manifests' schema: columns, types, nulls, and duplicate rows."""

from collections.abc import Sequence
from typing import Final

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from krea_dagster.engine.record import PRUNED
from krea_dagster.engine.states import State
from krea_dagster.manifest import MANIFEST_SCHEMA
from krea_dagster.plugin.checks.findings import RowFindings
from krea_dagster.plugin.checks.manifest_check import (
    CheckedManifests,
    common_metadata,
    manifest_check,
)

#: Columns without nulls, and columns in which every stored row has a value.
_ALWAYS: Final = (
    "prompt_id", "sample", "prompt", "model", "size", "quality", "seed", "nsfw_check", "attempt",
    "request_key", "partition_key", "status", "reused",
)  # fmt: skip
_WHERE_STORED: Final = (
    "image_path", "image_sha256", "image_bytes", "image_format", "width", "height", "stored_at",
)  # fmt: skip

_STATES: Final = pa.array([state.value for state in State])


def build_manifest_schema_check(
    manifest_key: dg.AssetKey, *, resource_key: str = "krea"
) -> dg.AssetChecksDefinition:
    """Build the check ``manifest_schema``: what readers of manifests rely on.

    The manifest's own columns come first, in their order and with their types; columns that must
    have values have no nulls; there is one row for each (prompt_id, sample), in the file of its
    partition; and every partition of the run has its file. Anything else is an error.

    Args:
        manifest_key: Key of the manifest's asset.
        resource_key: Key of the ``KreaResource``.

    Returns:
        The check.

    Example::

        build_krea_definitions(..., checks=[build_manifest_schema_check])
    """
    return manifest_check(
        manifest_key,
        resource_key,
        name="manifest_schema",
        description=(
            "The manifest has its columns in order and with their types, no null in required "
            "columns, and one row per prompt_id and sample."
        ),
        check=_check,
    )


def _check(manifests: CheckedManifests) -> dg.AssetCheckResult:
    findings, rows = RowFindings(), 0
    for key in manifests.absent:
        findings.add_row({"partition_key": key}, "it has no manifest")
    for name in manifests.names:
        with manifests.open(name) as parquet:
            rows += parquet.metadata.num_rows
            wrong = _wrong_columns(parquet.schema_arrow)
            gaps = _gaps(parquet)
        if wrong:
            for said in wrong:
                findings.add_row({"partition_key": name.rpartition("/")[2]}, said)
            continue  # its rows cannot be read
        _check_rows(manifests, name, gaps, findings)
    bad = findings.count
    return dg.AssetCheckResult(
        passed=not bad,
        description=(
            f"{bad} violations of the manifest's schema in {rows} rows: {findings.named()}"
            if bad
            else f"The schema matches in {rows} rows of {len(manifests.names)} manifest files."
        ),
        metadata={**common_metadata(manifests, rows), **findings.metadata()},
    )


def _wrong_columns(found: pa.Schema) -> list[str]:
    """Return what is wrong with the columns of a file, in words."""
    said = []
    for place, field in enumerate(MANIFEST_SCHEMA):
        if field.name not in found.names:
            said.append(f"column {field.name} is missing")
            continue
        at = found.names.index(field.name)
        if found.field(at).type != field.type:
            said.append(f"column {field.name} is {found.field(at).type}, not {field.type}")
        elif at != place and not said:
            said.append(f"column {field.name} is in place {at + 1}, not {place + 1}")
    if len(set(found.names)) < len(found.names):
        said.append("a column exists twice")
    return said


def _gaps(parquet: pq.ParquetFile) -> Sequence[str]:
    """Return the required columns that may contain nulls, according to the file's statistics."""
    about = parquet.metadata
    places = {about.schema.column(at).path: at for at in range(about.num_columns)}
    return [name for name in _ALWAYS if name in places and not _is_full(about, places[name])]


def _is_full(about: pq.FileMetaData, column: int) -> bool:
    for group in range(about.num_row_groups):
        statistics = about.row_group(group).column(column).statistics
        if statistics is None or not statistics.has_null_count or statistics.null_count:
            return False
    return True


def _check_rows(
    manifests: CheckedManifests, name: str, gaps: Sequence[str], findings: RowFindings
) -> None:
    names: list[pa.Array] = []
    key: str | None = None
    for batch in manifests.batches_of(name, ["status", "error_code", *gaps, *_WHERE_STORED]):
        for column in gaps:
            findings.add(batch, pc.is_null(batch.column(column)), f"{column} is null")
        status = batch.column("status")
        strange = pc.invert(pc.is_in(status, value_set=_STATES))
        findings.add(
            batch,
            pc.and_(strange, pc.is_valid(status)),
            lambda row: f"its status {row['status']} is unknown",
        )
        stored = pc.equal(status, State.STORED.value).fill_null(False)
        pruned = pc.equal(batch.column("error_code"), PRUNED).fill_null(False)
        for column in _WHERE_STORED:
            lacking = pc.and_(stored, pc.is_null(batch.column(column)))
            if column == "image_path":
                lacking = pc.and_(lacking, pc.invert(pruned))
            findings.add(batch, lacking, f"{column} is null, but it is stored")
        if batch.num_rows and key is None:
            key = batch.column("partition_key")[0].as_py()
        findings.add(
            batch,
            pc.not_equal(batch.column("partition_key"), key or "").fill_null(False),
            f"it is in the file of another partition, {name.rpartition('/')[2]}",
        )
        names.append(_named(batch))
    _find_duplicates(manifests, name, names, findings)


def _named(batch: pa.RecordBatch) -> pa.Array:
    """Return each row's prompt_id and sample as one text."""
    sample = batch.column("sample").cast(pa.string())
    return pc.binary_join_element_wise(batch.column("prompt_id"), sample, "\x1f")


def _find_duplicates(
    manifests: CheckedManifests, name: str, names: Sequence[pa.Array], findings: RowFindings
) -> None:
    every = pa.chunked_array(names, pa.string()) if names else pa.chunked_array([], pa.string())
    every = every.drop_null()
    if pc.count_distinct(every).as_py() == len(every):
        return
    counted = pc.value_counts(every)
    often = pc.greater(counted.field("counts"), 1)
    duplicated = counted.field("values").filter(often)
    extra = (pc.sum(counted.field("counts").filter(often)).as_py() or 0) - len(duplicated)
    before = findings.count
    seen = np.zeros(len(duplicated), np.bool_)
    for batch in manifests.batches_of(name, []):
        if not findings.room:
            break
        places = pc.index_in(_named(batch), value_set=duplicated)
        which = pc.is_valid(places)
        at = places.drop_null().to_pylist()
        for place, row in zip(at, batch.filter(which).to_pylist(), strict=True):
            if seen[place]:
                findings.add_row(row, "an earlier row has the same prompt_id and sample")
            seen[place] = True
    findings.count = before + extra
