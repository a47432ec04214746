"""The check that every image's file exists and is complete: all sizes, some hashes."""

import hashlib
from typing import Final

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.engine.storage.listed_sizes import sizes_of_images
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.manifest.locations import image_names
from krea_dagster.plugin.checks.findings import RowFindings
from krea_dagster.plugin.checks.manifest_check import (
    CheckedManifests,
    common_metadata,
    manifest_check,
)
from krea_dagster.plugin.checks.sampling import (
    Row,
    Sample,
    bought_by_others,
    check_sample,
    inspect_stored,
)

_COLUMNS: Final = (
    "request_key", "status", "image_path", "image_sha256", "image_bytes", "run_id", "error_code",
)  # fmt: skip

#: Files that are read at the same time: an object store gains by more, a disk does not.
_LOCAL_THREADS: Final = 4
_REMOTE_THREADS: Final = 16
_PIECE_BYTES: Final = 1024 * 1024

#: The size of a file that does not exist.
_MISSING: Final = -1


def build_files_check(
    manifest_key: dg.AssetKey,
    *,
    resource_key: str = "krea",
    sample: int | None = 100,
    seed: int | None = None,
) -> dg.AssetChecksDefinition:
    """Build the check ``files_whole``: the file of every stored row exists in its full size.

    Of a random sample the SHA-256 is compared too; what the same run has bought is not in the
    sample, because it was hashed as it was stored. Wrong files are an error: the next run of
    ``images`` fetches missing files again.

    Args:
        manifest_key: Key of the manifest's asset.
        resource_key: Key of the ``KreaResource``.
        sample: Number of files to hash; None for all.
        seed: Seed of the sample. By default derived from the run; the metadata shows it, so that
            the sample can be drawn again.

    Returns:
        The check.

    Raises:
        ConfigError: for a negative sample.

    Example::

        build_krea_definitions(..., checks=[functools.partial(build_files_check, sample=None)])
    """
    check_sample(sample)

    def check(manifests: CheckedManifests) -> dg.AssetCheckResult:
        storage, findings = manifests.storage, RowFindings()
        used = manifests.seed if seed is None else seed
        new = 0
        threads = _LOCAL_THREADS if storage.folder is not None else _REMOTE_THREADS

        def screen(stored: pa.RecordBatch) -> pa.RecordBatch:
            nonlocal new
            right = _with_right_sizes(stored, manifests, findings)
            if sample is None:
                return right
            older = bought_by_others(right, manifests.run_id)
            new += right.num_rows - older.num_rows
            return older

        rows, hashed = inspect_stored(
            manifests.batches(_COLUMNS),
            findings,
            threads=threads,
            sample=None if sample is None else Sample(sample, used),
            screen=screen,
            inspect=lambda row: _hash_problem(row, storage),
        )
        bad = findings.count
        return dg.AssetCheckResult(
            passed=not bad,
            description=(
                f"{bad} of {rows} files are missing or damaged: {findings.named()}"
                if bad
                else f"All {rows} files exist in their full size; {hashed} hashes were compared"
                + (f", and {new} files were hashed as this run stored them." if new else ".")
                if rows
                else "No row has an image yet."
            ),
            metadata={
                **common_metadata(manifests, rows),
                "files_hashed": hashed,
                **({"sample_seed": used} if sample is not None else {}),
                **findings.metadata(),
            },
        )

    return manifest_check(
        manifest_key,
        resource_key,
        name="files_whole",
        description=(
            "The file of every stored image exists in its full size; the hash is compared for "
            + ("all." if sample is None else f"a random sample of {sample}.")
        ),
        check=check,
    )


def _with_right_sizes(
    rows: pa.RecordBatch, manifests: CheckedManifests, findings: RowFindings
) -> pa.RecordBatch:
    """Return the rows whose file has its size; the others become findings."""
    storage = manifests.storage
    names, wanted = image_names(storage, rows.column("image_path")), rows.column("image_bytes")
    known = pc.and_(pc.is_valid(names), pc.is_valid(wanted))
    findings.add(
        rows,
        pc.invert(known),
        lambda row: (
            f"its file {row['image_path']} is not under {storage.locate('')}"
            if row["image_path"] and row["image_bytes"] is not None
            else "it is stored, but the manifest has no path or size"
        ),
    )
    rows = rows.filter(known)
    found = sizes_of_images(storage, names.filter(known).to_pylist(), manifests.stored)
    sizes = np.array([_MISSING if size is None else size for size in found], np.int64)
    same = sizes == rows.column("image_bytes").to_numpy()
    if not same.all():
        wrong = iter(sizes[~same].tolist())
        findings.add(rows, pa.array(~same), lambda row: _wrong_size(row, next(wrong)))
    return rows.filter(pa.array(same))


def _wrong_size(row: Row, size: int) -> str:
    if size == _MISSING:
        return f"its file {row['image_path']} is missing"
    return f"its file {row['image_path']} has {size} bytes instead of {row['image_bytes']}"


def _hash_problem(row: Row, storage: Storage) -> str | None:
    try:
        found = _sha256(storage, storage.name_of(row["image_path"]))
    except OSError as error:
        return f"its file {row['image_path']} cannot be read: {error}"
    if found == row["image_sha256"]:
        return None
    return f"its file {row['image_path']} has other content than was stored"


def _sha256(storage: Storage, name: str) -> str:
    digest = hashlib.sha256()
    with storage.open(name) as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()
