"""The check of the pictures: none flat, damaged or of a wrong size, and none bought twice over."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import dagster as dg
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.engine.states import State
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.engine.storage.verify import verify_image
from krea_dagster.errors import DownloadError
from krea_dagster.models import PIXELS
from krea_dagster.plugin.checks.findings import Findings
from krea_dagster.plugin.checks.manifest_check import Subject, common_metadata, manifest_check
from krea_dagster.plugin.checks.sampling import (
    Sample,
    checked_sample,
    first_words,
    with_digests,
)

_COLUMNS: Final = (
    "request_key", "status", "size", "quality", "seed", "width", "height", "image_path",
    "image_sha256",
)  # fmt: skip

#: Pictures that are decoded at once; the decoder releases the interpreter.
_THREADS: Final = 2

#: Width and height by "size quality", as text to look rows up in.
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
    """Build the check ``pictures``: no flat, damaged or wrong-size one, and none twice.

    The size that the manifest says is compared for all rows; a random ``sample`` (a number of
    files; None for all) is decoded, which takes some 10 to 50 ms of a core each. The ``seed`` is
    as for ``build_files_check``. Twice is the same file under different request keys, among the
    rows that the check looks at: different seeds should give different pictures. Twins, rows that
    ask for the very same thing, share one purchase and are not counted. A picture twice is a
    warning, all else an error. Raises ConfigError for a negative sample.
    """
    checked_sample(sample)

    def look(subject: Subject) -> dg.AssetCheckResult:
        findings, rows, looked = Findings(), 0, 0
        used = subject.seed if seed is None else seed
        drawn = Sample(sample or 0, used)
        seen: list[tuple[_Words, _Words]] = []
        with ThreadPoolExecutor(_THREADS) as pool:
            for batch in subject.batches(_COLUMNS):
                stored = batch.filter(pc.equal(batch.column("status"), State.STORED.value))
                rows += stored.num_rows
                stored = _right_sizes(stored, findings)
                seen.append(_words(stored))
                if sample is not None:
                    drawn.add(stored)
                    continue
                looked += stored.num_rows
                _decode(stored.to_pylist(), subject.storage, pool, findings)
            if sample is not None:
                chosen = list(drawn.rows())
                looked = len(chosen)
                _decode(chosen, subject.storage, pool, findings)
        wrong = findings.count
        twice = _name_doubles(subject, _doubles(seen), findings)
        findings.count = wrong + twice
        said = [f"{wrong} are flat, damaged or of a wrong size"] if wrong else []
        said += [f"{twice} are the picture of another request"] if twice else []
        return dg.AssetCheckResult(
            passed=not said,
            severity=dg.AssetCheckSeverity.ERROR if wrong else dg.AssetCheckSeverity.WARN,
            description=(
                f"Of {rows} pictures {' and '.join(said)}: {findings.named()}"
                if said
                else f"{rows} pictures, {looked} of them decoded: none is flat, damaged, of a "
                "wrong size, or there twice."
                if rows
                else "No row has an image yet, so that there are no pictures to look at."
            ),
            metadata={
                **common_metadata(subject, rows),
                "pictures_decoded": looked,
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
            "No picture is flat, damaged or of a wrong size, and none is there twice under "
            "different seeds."
        ),
        look=look,
    )


def _right_sizes(rows: pa.RecordBatch, findings: Findings) -> pa.RecordBatch:
    """The rows whose width and height are those of their size and quality."""
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


def _decode(
    rows: list[dict[str, Any]], storage: Storage, pool: ThreadPoolExecutor, findings: Findings
) -> None:
    def trouble(row: Mapping[str, Any]) -> str | None:
        try:
            with storage.open(storage.name_of(row["image_path"])) as file:
                verify_image(file.read(), PIXELS[row["size"], row["quality"]])
        except (DownloadError, OSError) as error:
            return f"{error} ({row['image_path']})"
        return None

    for row, said in zip(rows, pool.map(trouble, rows), strict=True):
        if said is not None:
            findings.say(row, said)


# -- the same picture twice -------------------------------------------------------------------

# Hashes are compared by their first 8 bytes: two of ten million pictures agree in them by chance
# once in 400,000 such checks.


def _words(rows: pa.RecordBatch) -> tuple[_Words, _Words]:
    rows = with_digests(with_digests(rows, "image_sha256"), "request_key")
    return first_words(rows, "image_sha256"), first_words(rows, "request_key")


def _doubles(seen: list[tuple[_Words, _Words]]) -> _Words:
    """The pictures that several requests have; as often as there are requests but the first."""
    nothing = np.empty(0, np.uint64)
    pictures = np.concatenate([nothing, *(picture for picture, _ in seen)])
    keys = np.concatenate([nothing, *(key for _, key in seen)])
    order = np.lexsort((keys, pictures))
    pictures, keys = pictures[order], keys[order]
    same = pictures[1:] == pictures[:-1]
    return np.asarray(pictures[1:][same & (keys[1:] != keys[:-1])], np.uint64)


def _name_doubles(subject: Subject, doubles: _Words, findings: Findings) -> int:
    """Name the rows, as far as there is room; returns how many pictures there are too many."""
    if not len(doubles) or not findings.room:
        return len(doubles)
    wanted = np.unique(doubles)
    firsts: dict[str, dict[str, Any]] = {}
    named: set[str] = set()
    for batch in subject.batches(_COLUMNS):
        rows = with_digests(with_digests(batch, "image_sha256"), "request_key")
        here = np.isin(first_words(rows, "image_sha256"), wanted)
        for row in rows.filter(pa.array(here)).to_pylist():
            first = firsts.setdefault(row["image_sha256"], row)
            if row["request_key"] in named or row["request_key"] == first["request_key"]:
                continue
            named.add(row["request_key"])
            findings.say(
                row,
                f"seed {row['seed']} gave the same picture as {first['prompt_id']} sample "
                f"{first['sample']} (partition {first['partition_key']}) with seed {first['seed']}",
            )
            if not findings.room:
                return len(doubles)
    return len(doubles)
