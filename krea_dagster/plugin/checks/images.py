"""The check of the images: none is flat, damaged, of a wrong size, or a duplicate."""

from typing import Any, Final

import dagster as dg
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.engine.storage.storage import Storage
from krea_dagster.engine.storage.verify import verify_image
from krea_dagster.errors import DownloadError
from krea_dagster.models import PIXELS
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
    first_words,
    inspect_stored,
    with_digests,
)

_COLUMNS: Final = (
    "request_key", "status", "size", "quality", "seed", "width", "height", "image_path",
    "image_sha256", "run_id", "error_code",
)  # fmt: skip

#: Images that are decoded at the same time; the decoder releases the interpreter lock.
_THREADS: Final = 2

#: Width and height by "size quality".
_SHAPES: Final = pa.array([f"{size} {quality}" for size, quality in PIXELS])
_WIDTHS: Final = pa.array([width for width, _ in PIXELS.values()], pa.int32())
_HEIGHTS: Final = pa.array([height for _, height in PIXELS.values()], pa.int32())

_Words = npt.NDArray[np.uint64]


def build_images_check(
    manifest_key: dg.AssetKey,
    *,
    resource_key: str = "krea",
    sample: int | None = 100,
    seed: int | None = None,
) -> dg.AssetChecksDefinition:
    """Build the check ``pictures``: no image is flat, damaged, of a wrong size, or a duplicate.

    The size in the manifest is compared for all rows, and a random sample is decoded, which takes
    10 to 40 ms of a core per image. What the same run has bought and decoded is not in the sample.
    Duplicates are equal files under different request keys: different seeds should give different
    images. Rows with equal requests share one purchase and are not duplicates. A duplicate is a
    warning, everything else an error.

    Args:
        manifest_key: Key of the manifest's asset.
        resource_key: Key of the ``KreaResource``.
        sample: Number of files to decode; None for all.
        seed: Seed of the sample. By default derived from the run; the metadata shows it.

    Returns:
        The check.

    Raises:
        ConfigError: for a negative sample.

    Example::

        build_krea_definitions(..., checks=[build_files_check, build_images_check])
    """
    check_sample(sample)

    def check(manifests: CheckedManifests) -> dg.AssetCheckResult:
        findings = RowFindings()
        used = manifests.seed if seed is None else seed
        seen: list[tuple[_Words, _Words]] = []

        def screen(stored: pa.RecordBatch) -> pa.RecordBatch:
            stored = _with_right_sizes(stored, findings)
            seen.append(_words(stored))
            decoded_before = sample is not None and manifests.verified
            return bought_by_others(stored, manifests.run_id) if decoded_before else stored

        rows, decoded = inspect_stored(
            manifests.batches(_COLUMNS),
            findings,
            threads=_THREADS,
            sample=None if sample is None else Sample(sample, used),
            screen=screen,
            inspect=lambda row: _image_problem(row, manifests.storage),
        )
        wrong = findings.count
        twice = _name_duplicates(manifests, _duplicates(seen), findings)
        findings.count = wrong + twice
        said = [f"{wrong} are flat, damaged or of a wrong size"] if wrong else []
        said += [f"{twice} are equal to the image of another request"] if twice else []
        return dg.AssetCheckResult(
            passed=not said,
            severity=dg.AssetCheckSeverity.ERROR if wrong else dg.AssetCheckSeverity.WARN,
            description=(
                f"Of {rows} images {' and '.join(said)}: {findings.named()}"
                if said
                else f"{rows} images, {decoded} of them decoded: none is flat, damaged, of a "
                "wrong size, or a duplicate."
                if rows
                else "No row has an image yet."
            ),
            metadata={
                **common_metadata(manifests, rows),
                "pictures_decoded": decoded,
                "pictures_wrong": wrong,
                "pictures_twice": twice,
                **({"sample_seed": used} if sample is not None else {}),
                **findings.metadata(),
            },
        )

    return manifest_check(
        manifest_key,
        resource_key,
        name="pictures",
        description=(
            "No image is flat, damaged or of a wrong size, and no two with different seeds are "
            "equal."
        ),
        check=check,
    )


def _with_right_sizes(rows: pa.RecordBatch, findings: RowFindings) -> pa.RecordBatch:
    """Return the rows whose width and height match size and quality; others become findings."""
    shape = pc.binary_join_element_wise(rows.column("size"), rows.column("quality"), " ")
    place = pc.index_in(shape, value_set=_SHAPES)
    right = pc.and_(
        pc.equal(rows.column("width"), _WIDTHS.take(place)),
        pc.equal(rows.column("height"), _HEIGHTS.take(place)),
    ).fill_null(False)
    findings.add(
        rows,
        pc.invert(right),
        lambda row: (
            f"the manifest says {row['width']}×{row['height']} pixels, which is not "
            f"{row['size']} at {row['quality']}"
        ),
    )
    return rows.filter(right)


def _image_problem(row: Row, storage: Storage) -> str | None:
    try:
        with storage.open(storage.name_of(row["image_path"])) as file:
            verify_image(file.read(), PIXELS[row["size"], row["quality"]])
    except (DownloadError, OSError) as error:
        return f"{error} ({row['image_path']})"
    return None


# -- duplicates -------------------------------------------------------------------------------

# Hashes are compared by their first 8 bytes: two of ten million images agree in them by chance
# once in 400,000 such checks.


def _words(rows: pa.RecordBatch) -> tuple[_Words, _Words]:
    rows = with_digests(with_digests(rows, "image_sha256"), "request_key")
    return first_words(rows, "image_sha256"), first_words(rows, "request_key")


def _duplicates(seen: list[tuple[_Words, _Words]]) -> _Words:
    """Return the images that several requests have, once for each request after the first."""
    nothing = np.empty(0, np.uint64)
    images = np.concatenate([nothing, *(image for image, _ in seen)])
    keys = np.concatenate([nothing, *(key for _, key in seen)])
    order = np.lexsort((keys, images))
    images, keys = images[order], keys[order]
    same = images[1:] == images[:-1]
    return np.asarray(images[1:][same & (keys[1:] != keys[:-1])], np.uint64)


def _name_duplicates(manifests: CheckedManifests, duplicates: _Words, findings: RowFindings) -> int:
    """Add findings about duplicates while there is room, and return the number of duplicates."""
    if not len(duplicates) or not findings.room:
        return len(duplicates)
    wanted = np.unique(duplicates)
    firsts: dict[str, dict[str, Any]] = {}
    named: set[str] = set()
    for batch in manifests.batches(_COLUMNS):
        rows = with_digests(with_digests(batch, "image_sha256"), "request_key")
        here = np.isin(first_words(rows, "image_sha256"), wanted)
        for row in rows.filter(pa.array(here)).to_pylist():
            first = firsts.setdefault(row["image_sha256"], row)
            if row["request_key"] in named or row["request_key"] == first["request_key"]:
                continue
            named.add(row["request_key"])
            findings.add_row(
                row,
                f"seed {row['seed']} gave the same image as {first['prompt_id']} sample "
                f"{first['sample']} (partition {first['partition_key']}) with seed {first['seed']}",
            )
            if not findings.room:
                return len(duplicates)
    return len(duplicates)
