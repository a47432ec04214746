"""The check that every image's file is there and whole: sizes of all, hashes of a sample."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.engine.states import State
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.plugin.checks.findings import Findings
from krea_dagster.plugin.checks.manifest_check import Subject, common_metadata, manifest_check
from krea_dagster.plugin.checks.sampling import Sample, checked_sample

_COLUMNS: Final = ("request_key", "status", "image_path", "image_sha256", "image_bytes")

#: Files that are asked for at once: a disk does not gain by more, an object store does.
_LOCAL_THREADS: Final = 4
_REMOTE_THREADS: Final = 16
_PIECE_BYTES: Final = 1024 * 1024

Row = Mapping[str, Any]


def build_files_check(
    manifest_key: dg.AssetKey,
    *,
    resource_key: str = "krea",
    sample: int | None = 100,
    seed: int | None = None,
) -> dg.AssetChecksDefinition:
    """Build the check ``files_whole``: every stored row's file is there, in its full size.

    Of a random ``sample`` (a number of files; None for all) the SHA-256 is compared too. The
    ``seed`` of the sample is drawn from the run where there is none; the metadata says it, so that
    the same sample can be drawn again. What is wrong is an error: the next run of ``images``
    fetches missing files again. Raises ConfigError for a negative sample.
    """
    checked_sample(sample)

    def look(subject: Subject) -> dg.AssetCheckResult:
        storage, findings, rows = subject.storage, Findings(), 0
        used = subject.seed if seed is None else seed
        drawn = Sample(sample or 0, used)
        hashed = 0
        threads = _LOCAL_THREADS if storage.folder is not None else _REMOTE_THREADS
        with ThreadPoolExecutor(threads) as pool:
            for batch in subject.batches(_COLUMNS):
                stored = batch.filter(pc.equal(batch.column("status"), State.STORED.value))
                rows += stored.num_rows
                whole = _sizes_hold(stored, storage, pool, findings)
                if sample is not None:
                    drawn.add(whole)
                    continue
                hashed += whole.num_rows
                _compare_hashes(whole.to_pylist(), storage, pool, findings)
            if sample is not None:
                chosen = list(drawn.rows())
                hashed = len(chosen)
                _compare_hashes(chosen, storage, pool, findings)
        bad = findings.count
        return dg.AssetCheckResult(
            passed=not bad,
            description=(
                f"{bad} of {rows} files are missing or damaged: {findings.named()}"
                if bad
                else f"All {rows} files are there in their size; {hashed} hashes compared."
                if rows
                else "No row has an image yet, so that there are no files to look at."
            ),
            metadata={
                **common_metadata(subject, rows),
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
            "Every stored image's file is there in its full size, and the hash holds of "
            + ("all." if sample is None else f"a random sample of {sample}.")
        ),
        look=look,
    )


def _sizes_hold(
    rows: pa.RecordBatch, storage: Storage, pool: ThreadPoolExecutor, findings: Findings
) -> pa.RecordBatch:
    """The rows whose file has its size; the others become findings."""
    places, wanted = rows.column("image_path"), rows.column("image_bytes")
    # All names are under one root: cut off for the whole column, not row by row.
    root = storage.locate("images").removesuffix("images")
    under = pc.starts_with(places, root).fill_null(False)
    known = pc.and_(under, pc.is_valid(wanted))
    findings.add(
        rows,
        pc.invert(known),
        lambda row: (
            f"its file {row['image_path']} does not lie under {root}"
            if row["image_path"] and row["image_bytes"] is not None
            else "it is stored, and the manifest does not say where or how large"
        ),
    )
    rows = rows.filter(known)
    names = pc.utf8_slice_codeunits(rows.column("image_path"), len(root))
    sizes = _sizes(storage, names.to_pylist(), pool)
    same = sizes == rows.column("image_bytes").to_numpy()
    if not same.all():
        found = iter(sizes[~same].tolist())
        findings.add(rows, pa.array(~same), lambda row: _wrong_size(row, next(found)))
    return rows.filter(pa.array(same))


def _sizes(
    storage: Storage, names: Iterable[str], pool: ThreadPoolExecutor
) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Sizes in bytes, -1 where there is no file."""
    # A folder answers sooner than a thread takes over.
    asked = (
        pool.map(storage.size_bytes, names)
        if storage.folder is None
        else map(storage.size_bytes, names)
    )
    return np.array([-1 if size is None else size for size in asked], np.int64)


def _wrong_size(row: Row, size: int) -> str:
    if size < 0:
        return f"its file {row['image_path']} is not there"
    return f"its file {row['image_path']} has {size} bytes instead of {row['image_bytes']}"


def _compare_hashes(
    rows: list[dict[str, Any]], storage: Storage, pool: ThreadPoolExecutor, findings: Findings
) -> None:
    for row, trouble in _hash_troubles(rows, storage, pool):
        findings.say(row, trouble)


def _hash_troubles(
    rows: list[dict[str, Any]], storage: Storage, pool: ThreadPoolExecutor
) -> Iterator[tuple[Row, str]]:
    def trouble(row: Row) -> str | None:
        try:
            found = _sha256(storage, storage.name_of(row["image_path"]))
        except OSError as error:
            return f"its file {row['image_path']} cannot be read: {error}"
        if found == row["image_sha256"]:
            return None
        return f"its file {row['image_path']} has another content than was stored"

    for row, said in zip(rows, pool.map(trouble, rows), strict=True):
        if said is not None:
            yield row, said


def _sha256(storage: Storage, name: str) -> str:
    digest = hashlib.sha256()
    with storage.open(name) as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()
