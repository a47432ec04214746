"""Near-duplicates among a million measured images: what is found of what was planted.

python -m benchmarks.likeness [--rows N] [--quick] [--json]

A tenth of the images are copies, whose perceptual hash differs from another's in a known number of
bits. The table of near-duplicates is made from manifests and measures on file, as the asset
makes it, in a process of its own. Beside it, where faiss is installed, what its own index for this
takes: ``IndexBinaryMultiHash`` in both of its settings that miss nothing at 31 bits.
"""

from __future__ import annotations

import hashlib
import json
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from benchmarks.harness import Ran, Report, finish, note_progress, options_of, peak_bytes, run

ROWS: Final = 1_000_000
CPU_S: Final = 90.0
PEAK_BYTES: Final = 1_000_000_000

#: Bits in which copies differ from their originals; the last ones are beyond the limit of 31.
DISTANCES: Final = (0, 2, 4, 8, 12, 16, 20, 24, 28, 30, 31, 32, 34, 40)
#: One image in so many is a copy.
_COPIES: Final = 10
_PARTITIONS: Final = 16
#: The deviation of the share of ones by bit, as benchmarks.likeness_pictures finds it.
_UNEVEN: Final = 0.08
#: Queries that faiss is measured with, and what they stand for is said to be estimated.
_ASKED: Final = 10_000


def main() -> None:
    """Run the command: the report, or with ``--work`` one of its processes."""
    parser = options_of("likeness")
    parser.add_argument("--rows", type=int, default=ROWS, help="images")
    parser.add_argument("--uneven", action="store_true", help="for --work")
    parser.add_argument("--work", choices=sorted(WORK), help="do this, and say what it took")
    parser.add_argument("--folder", type=Path, help="for --work")
    options = parser.parse_args()
    if options.work:
        print(json.dumps(WORK[options.work](options)))
        return
    if options.quick:
        options.rows //= 10
    _measure(options)


def _measure(options: Namespace) -> None:
    report = Report(
        "likeness",
        f"{options.rows:,} measured images, {options.rows // _COPIES:,} of them planted copies",
        setting=(
            f"Manifests and measures in {_PARTITIONS} partitions, perceptual hashes of 256 even "
            "and independent bits, copies with so many bits flipped at random in any partition. "
            "Limit: 31 bits. Found: in one cluster with the original. n = 1, all cores."
        ),
        columns=["bits flipped", "copies", "found", "recall", "right, of all put to theirs"],
    )
    with TemporaryDirectory() as name:
        _do("make", options, Path(name))
        found = _do("find", options, Path(name))
        said = found.said
        for distance, (copies, hit, put) in zip(DISTANCES, said["by_distance"], strict=True):
            right = f"{hit}/{put}" if put else "–"
            report.add(distance, f"{copies:,}", f"{hit:,}", f"{hit / copies:.4f}", right)
        within = [one for at, one in zip(DISTANCES, said["by_distance"], strict=True) if at <= 31]
        planted, hits = (sum(one[at] for one in within) for at in (0, 1))
        report.claim("planted within 31 bits and not found", planted - hits, 0)
        report.claim("put into a cluster that is not theirs", said["wrong"], 0)
        whole = max(0.2, options.rows / ROWS)
        report.claim(f"CPU for {options.rows:,} images", said["cpu_s"], CPU_S * whole, "s")
        report.claim("peak memory, MB", said["peak_bytes"] / 1e6, PEAK_BYTES / 1e6)
        report.note(
            f"Recall {hits / planted:.4f} and precision "
            f"{said['right'] / max(1, said['right'] + said['wrong']):.4f} in all. The table in "
            f"{said['wall_s']:.1f} s wall, {said['cpu_s']:.1f} s CPU, {said['search_s']:.1f} s of "
            f"them the search, {said['peak_bytes'] / 1e6:.0f} MB; {said['pairs']:,} pairs "
            f"compared, of {options.rows**2 // 2:,}."
        )
        if find_spec("faiss") is not None:
            for work in ("faiss16", "faiss11"):
                _tell_faiss(report, _do(work, options, Path(name)))
    with TemporaryDirectory() as name:
        options.uneven = True
        _do("make", options, Path(name))
        said = _do("find", options, Path(name)).said
        planted, hits = (
            sum(one[at] for by, one in zip(DISTANCES, said["by_distance"], strict=True) if by <= 31)
            for at in (0, 1)
        )
        report.note(
            "With bits as uneven as those of drawn pictures (likeness_pictures; the share of ones "
            f"deviates by {_UNEVEN:g}): {said['wall_s']:.1f} s, {said['peak_bytes'] / 1e6:.0f} MB, "
            f"{said['pairs']:,} pairs compared, recall {hits / planted:.4f}, wrong {said['wrong']}."
        )
    finish(report, options)


def _do(work: str, options: Namespace, folder: Path) -> Ran:
    note_progress(f"{work}, {options.rows:,} rows{', uneven' if options.uneven else ''}")
    command = ["benchmarks.likeness", "--work", work, "--folder", str(folder)]
    command += ["--rows", str(options.rows), *(["--uneven"] if options.uneven else [])]
    return run(command)


def _tell_faiss(report: Report, ran: Ran) -> None:
    said = ran.said
    report.note(
        f"faiss {said['version']}, {said['index']}: {said['built_s']:.0f} s to build, "
        f"{said['asked_s']:.1f} s for {said['asked']:,} queries, so about "
        f"{said['built_s'] + said['asked_s'] * said['rows'] / said['asked']:.0f} s for all of "
        f"them; {said['peak_bytes'] / 1e6:.0f} MB. It finds pairs, not yet clusters."
    )


# -- the processes --------------------------------------------------------------------------------


def make(options: Namespace) -> dict[str, Any]:
    """Write the manifests and measures, and beside them what was planted."""
    import numpy as np  # noqa: PLC0415 - only what is measured is imported
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    from krea_dagster.curation.measures.measures_table import MEASURES_SCHEMA, measures_name  # noqa: PLC0415
    from krea_dagster.engine.storage.storage import Storage  # noqa: PLC0415
    from krea_dagster.manifest import MANIFEST_SCHEMA, write_manifest  # noqa: PLC0415

    drawn = np.random.default_rng(8)
    rows, copies = options.rows, options.rows // _COPIES
    share = np.full(256, 0.5)
    if options.uneven:
        share = np.clip(drawn.normal(0.5, _UNEVEN, 256), 0.2, 0.8)
    hashes = np.empty((rows, 32), np.uint8)
    for first in range(0, rows, 50_000):
        count = min(50_000, rows - first)
        bits = drawn.random((count, 256), np.float32) < share
        hashes[first : first + count] = np.packbits(bits, axis=1)
    originals = drawn.choice(rows - copies, copies, replace=False)
    kind = drawn.integers(0, len(DISTANCES), copies)
    for at in range(copies):
        one = np.unpackbits(hashes[originals[at]])
        one[drawn.permutation(256)[: DISTANCES[kind[at]]]] ^= 1
        hashes[rows - copies + at] = np.packbits(one)
    family = np.concatenate([np.arange(rows - copies), originals])
    distance = np.concatenate([np.full(rows - copies, -1), np.array(DISTANCES)[kind]])
    order = drawn.permutation(rows)
    storage = Storage(str(options.folder))
    planted: dict[str, list[Any]] = {"sha256": [], "family": [], "distance": []}
    for number in range(_PARTITIONS):
        mine = order[number::_PARTITIONS]
        shas = [hashlib.sha256(f"{one}".encode()).hexdigest() for one in mine.tolist()]
        keys = [hashlib.sha256(f"r{one}".encode()).hexdigest() for one in mine.tolist()]
        partition = f"bucket-{number:03d}"
        values: dict[str, Any] = {
            "prompt_id": [f"row-{one:08d}" for one in mine.tolist()],
            "sample": [0] * len(mine),
            "prompt": ["a heron at dawn, soft light, film grain, a red kite above the lake"]
            * len(mine),
            "request_key": keys,
            "partition_key": [partition] * len(mine),
            "status": ["stored"] * len(mine),
            "image_sha256": shas,
            "credits_charged": [0.45] * len(mine),
        }
        values["stored_at"] = 1_780_000_000_000_000 + drawn.integers(0, 10**12, len(mine))
        write_manifest(storage, partition, _table(values, MANIFEST_SCHEMA))
        figures = {
            "image_sha256": shas,
            "partition_key": values["partition_key"],
            "perceptual_hash": [one.tobytes() for one in hashes[mine]],
            "perceptual_hash_quality": [100] * len(mine),
            "sharpness": drawn.random(len(mine)) * 1000,
        }
        table = _table(figures, MEASURES_SCHEMA)
        storage.write(measures_name(partition), partial(pq.write_table, table))
        planted["sha256"] += shas
        planted["family"] += family[mine].tolist()
        planted["distance"] += distance[mine].tolist()
    pq.write_table(pa.table(planted), options.folder / "planted.parquet")
    np.save(options.folder / "hashes.npy", hashes[order])
    return {}


def _table(values: dict[str, Any], schema: Any) -> Any:
    """A table of a schema, of whose columns some are given and the others null."""
    import pyarrow as pa  # noqa: PLC0415 - as above

    rows = len(next(iter(values.values())))
    arrays = [
        pa.array(values[field.name]).cast(field.type)
        if field.name in values
        else pa.nulls(rows, field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def find(options: Namespace) -> dict[str, Any]:
    """Make the table as the asset does, then hold it against what was planted."""
    from krea_dagster.curation.similarity import (  # noqa: PLC0415
        clusters,
        multi_index_hash,
        near_duplicates,
    )
    from krea_dagster.engine.storage.storage import Storage  # noqa: PLC0415

    search_s = [0.0]

    def timed(*arguments: Any, **named: Any) -> Any:
        began_s = time.perf_counter()
        found = multi_index_hash.find_stars(*arguments, **named)
        search_s[0] += time.perf_counter() - began_s
        return found

    vars(clusters)["find_stars"] = timed
    storage = Storage(str(options.folder))
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    figures = near_duplicates.update_near_duplicates(storage)
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    used = peak_bytes()
    return {
        **_held_against(options.folder, near_duplicates.read_near_duplicates(storage)),
        "pairs": figures.pairs_compared,
        "search_s": search_s[0],
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "peak_bytes": used,
    }


def _held_against(folder: Path, table: Any) -> dict[str, Any]:
    """By distance: copies, those in the cluster of their original, those in any.

    And how many of the rows that are not to keep are of the family of the kept one.
    """
    import pyarrow.parquet as pq  # noqa: PLC0415 - as above

    planted = pq.read_table(folder / "planted.parquet").to_pydict()
    family = dict(zip(planted["sha256"], planted["family"], strict=True))
    rows = table.select(["image_sha256", "cluster", "keep"]).to_pydict()
    cluster = dict(zip(rows["image_sha256"], rows["cluster"], strict=True))
    kept = {name: family[sha] for sha, name, keep in zip(*rows.values(), strict=True) if keep}
    judged = [
        family[sha] == kept[name]
        for sha, name, keep in zip(*rows.values(), strict=True)
        if not keep
    ]
    original = {one: sha for sha, one, by in zip(*planted.values(), strict=True) if by < 0}
    counts = {by: [0, 0, 0] for by in DISTANCES}
    for sha, one, by in zip(*planted.values(), strict=True):
        if by >= 0:
            theirs = cluster.get(sha)
            counts[by][0] += 1
            counts[by][1] += theirs is not None and theirs == cluster.get(original[one])
            counts[by][2] += theirs is not None
    return {
        "by_distance": list(counts.values()),
        "right": sum(judged),
        "wrong": len(judged) - sum(judged),
    }


def _faiss(options: Namespace, pieces: int, bits: int, flips: int) -> dict[str, Any]:
    import faiss  # type: ignore[import-not-found]  # noqa: PLC0415 - compared where it is there
    import numpy as np  # noqa: PLC0415

    hashes = np.load(options.folder / "hashes.npy")
    began_s = time.perf_counter()
    index = faiss.IndexBinaryMultiHash(256, pieces, bits)
    index.nflip = flips
    index.add(hashes)
    built_s = time.perf_counter() - began_s
    asked = min(_ASKED, len(hashes))
    began_s = time.perf_counter()
    index.range_search(hashes[:asked], 32)  # less than 32
    return {
        "version": faiss.__version__,
        "index": f"IndexBinaryMultiHash(256, {pieces}, {bits}), nflip {flips}",
        "rows": len(hashes),
        "asked": asked,
        "built_s": built_s,
        "asked_s": time.perf_counter() - began_s,
        "peak_bytes": peak_bytes(),
    }


WORK: Final[dict[str, Callable[[Namespace], dict[str, Any]]]] = {
    "make": make,
    "find": find,
    "faiss16": lambda options: _faiss(options, 16, 16, 1),
    "faiss11": lambda options: _faiss(options, 11, 23, 2),
}

if __name__ == "__main__":
    main()
