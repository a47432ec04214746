"""The cost of an export, compared with a loop that copies files or puts them into a tar file.

python -m benchmarks.export [--images N] [--rows N] [--quick] [--json]

The loops do what users write: no hashes, no reading back, no splits and no retries. The last part
plans an export of many rows without reading an image.
"""

from __future__ import annotations

import hashlib
import json
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from benchmarks.harness import note_progress, peak_bytes, run
from benchmarks.report import Report, finish, options_of

IMAGES: Final = 2_000
ROWS: Final = 100_000
FILE_BYTES: Final = 600_000

#: Seconds to plan ``ROWS``; CPU to that of a loop that hashes as often; memory of an export, MB.
PLAN_S: Final = 20.0
TO_LOOP: Final = 2.0
MEMORY_MB: Final = 700.0

FORMS: Final = ("webdataset", "parquet", "imagefolder", "jsonl")
LOOPS: Final = {
    "copy": "shutil.copy and a JSONL",
    "tar": "tarfile.add and a JSONL",
    "checked": "the same, each file hashed before and after",
}


def main() -> None:
    """Run the command: the report, or with ``--work`` one of its processes."""
    parser = options_of("export")
    parser.add_argument("--images", type=int, default=IMAGES, help="files that are exported")
    parser.add_argument("--rows", type=int, default=ROWS, help="rows that are planned")
    parser.add_argument("--work", help="do this")
    parser.add_argument("--folder", type=Path, help="for --work")
    options = parser.parse_args()
    if options.work:
        print(json.dumps(_work(options)))
        return
    if options.quick:
        options.images //= 5
        options.rows //= 5
    with TemporaryDirectory() as name:
        options.folder = Path(name)
        _measure(options)


def _measure(options: Namespace) -> None:
    report = Report(
        "export",
        "Export of a dataset",
        setting=(
            f"{options.images:,} JPEG files of {FILE_BYTES / 1e6:g} MB in a folder, in the page "
            "cache, to shards of 500 MB in the same file system; wall time with fsync"
        ),
        columns=["what", "wall, s", "MB/s", "CPU, s", "peak memory, MB"],
    )
    _do("draw", options)
    megabytes = options.images * FILE_BYTES / 1e6
    cpu: dict[str, float] = {}
    for what in (*LOOPS, *FORMS):
        found = _do(what, options)
        cpu[what] = found["cpu_s"]
        peak_mb = found["peak_bytes"] / 1e6
        wall_s = found["wall_s"]
        report.add(
            LOOPS.get(what, what),
            f"{wall_s:.2f}",
            f"{megabytes / wall_s:.0f}",
            f"{found['cpu_s']:.2f}",
            f"{peak_mb:.0f}",
        )
        if what in FORMS:
            report.claim(f"memory of {what}", peak_mb, MEMORY_MB, "MB")
    for form in FORMS:
        ratio = cpu[form] / cpu["checked"]
        report.claim(f"CPU of {form} to the loop that hashes as often", ratio, TO_LOOP)
    _do("many", options)
    for what, named in (
        ("grow", "webdataset again, with 10 % more images"),
        ("plan", f"plan of {options.rows:,} rows"),
    ):
        found = _do(what, options)
        memory = f"{found['peak_bytes'] / 1e6:.0f}"
        report.add(named, f"{found['wall_s']:.2f}", "", f"{found['cpu_s']:.2f}", memory)
        if what == "plan":
            report.claim(named, found["wall_s"], PLAN_S, "s")
    report.note(
        "An export reads each file once, compares its sha256 with the manifest's, writes it, reads "
        "the shard back and hashes each image again. Most of its cost is these two hashes."
    )
    finish(report, options)


def _do(work: str, options: Namespace) -> dict[str, Any]:
    note_progress(work)
    command = ["benchmarks.export", "--work", work, "--folder", str(options.folder)]
    command += ["--images", str(options.images), "--rows", str(options.rows)]
    return run(command).output


# -- the processes --------------------------------------------------------------------------------


def _work(options: Namespace) -> dict[str, Any]:
    work = {"draw": draw, "copy": copy, "tar": tar, "checked": tar, "many": many, "plan": plan}
    return work.get(options.work, export)(options)


def _row(number: int, path: str, sha256: str, size: int) -> dict[str, Any]:
    key = hashlib.sha256(b"%d" % number).hexdigest()
    return {
        "prompt_id": f"row-{number:07d}",
        "sample": 0,
        "prompt": f"prompt {number}: a harbor at dawn, film grain, " + "slow water, " * 15,
        "model": "krea-2-turbo",
        "size": "1:1",
        "quality": "1K",
        "seed": 1 + number % 1_000_000,
        "attempt": 0,
        "request_key": key,
        "partition_key": "a",
        "status": "stored",
        "task_id": f"task-{number}",
        "image_path": path,
        "image_sha256": sha256,
        "image_bytes": size,
        "image_format": "JPEG",
        "width": 1024,
        "height": 1024,
        "credits_charged": 0.9,
    }


def _accept(options: Namespace, rows: Iterator[dict[str, Any]], key: str = "a") -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from krea_dagster.curation.accepted.accepted_table import accepted_name, accepted_schema
    from krea_dagster.engine.storage.storage import Storage
    from krea_dagster.manifest import MANIFEST_SCHEMA

    table = pa.Table.from_pylist(list(rows), accepted_schema(MANIFEST_SCHEMA))
    store = Storage(str(options.folder / "krea"))
    store.write(accepted_name(key), lambda file: pq.write_table(table, file))


def draw(options: Namespace) -> dict[str, Any]:
    """Write the images, and a tenth more, and the tables of both."""
    from benchmarks.image_files import draw as drawn
    from benchmarks.image_files import marked

    image = drawn((1024, 1024), FILE_BYTES, "jpeg")
    home = options.folder / "krea" / "images"
    rows = []
    for number in range(options.images + options.images // 10):
        data = b"".join(marked(image, "jpeg", number))
        path = home / f"{number % 256:02x}" / f"{number:07d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        rows.append(_row(number, str(path), hashlib.sha256(data).hexdigest(), len(data)))
    _accept(options, iter(rows[: options.images]), "a")
    _accept(options, iter(rows[options.images :]), "b")
    return {}


def _rows(options: Namespace) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    path = options.folder / "krea" / "accepted" / "a.parquet"
    columns = ["prompt_id", "prompt", "seed", "image_path"]
    found: list[dict[str, Any]] = pq.read_table(path, columns=columns).to_pylist()
    return found


def copy(options: Namespace) -> dict[str, Any]:
    """Copy the files, and write a line for each."""
    import os
    import shutil

    rows = _rows(options)
    began = _now()
    target = options.folder / "copied"
    target.mkdir()
    with (target / "metadata.jsonl").open("w") as lines:
        for row in rows:
            path = Path(row.pop("image_path"))
            shutil.copy(path, target / path.name)
            lines.write(json.dumps({"file_name": path.name, **row}) + "\n")
    os.sync()
    return _took(began)


def tar(options: Namespace) -> dict[str, Any]:
    """Put the files into one tar file, and write a line for each; ``checked`` hashes them twice."""
    import os
    import tarfile

    rows = _rows(options)
    began = _now()
    hashed = options.work == "checked"
    target = options.folder / options.work
    target.mkdir()
    with (
        (target / "metadata.jsonl").open("w") as lines,
        tarfile.open(target / "all.tar", "w") as all_files,
    ):
        for row in rows:
            path = Path(row.pop("image_path"))
            if hashed:
                hashlib.sha256(path.read_bytes()).hexdigest()
            all_files.add(path, path.name)
            lines.write(json.dumps({"file_name": path.name, **row}) + "\n")
    if hashed:
        with tarfile.open(target / "all.tar") as all_files:
            for member in all_files:
                file = all_files.extractfile(member)
                assert file is not None
                hashlib.sha256(file.read()).hexdigest()
    os.sync()
    return _took(began)


def export(options: Namespace) -> dict[str, Any]:
    """Export in one form; ``grow`` takes the further images too."""
    from krea_dagster.curation.export.export import export as exported
    from krea_dagster.curation.export.spec import ExportSpec
    from krea_dagster.engine.storage.storage import Storage

    grow = options.work == "grow"
    form = "webdataset" if grow else options.work
    spec = ExportSpec.parse(
        splits=["train=0.9", "test=0.1"], form=form, partitions=("a", "b") if grow else ("a",)
    )
    began = _now()
    exported(Storage(str(options.folder / "krea")), spec, str(options.folder / "out" / form))
    return _took(began)


def many(options: Namespace) -> dict[str, Any]:
    """Write the tables of many rows."""
    few = options.rows // 10
    for part in range(10):
        rows = (
            _row(
                number, f"/nowhere/{number}.png", hashlib.sha256(b"%d" % number).hexdigest(), 10**6
            )
            for number in range(part * few, (part + 1) * few)
        )
        _accept(options, rows, f"many-{part}")
    return {}


def plan(options: Namespace) -> dict[str, Any]:
    """Choose and plan many rows; none has a file."""
    from krea_dagster.curation.export.card import write_card
    from krea_dagster.curation.export.dataset_facts import facts_of
    from krea_dagster.curation.export.plan import make_plan
    from krea_dagster.curation.export.selected_rows import select_rows
    from krea_dagster.curation.export.spec import ExportSpec
    from krea_dagster.engine.storage.storage import Storage

    began = _now()
    spec = ExportSpec.parse(
        splits=["train=0.9", "test=0.1"], partitions=tuple(f"many-{n}" for n in range(10))
    )
    with select_rows(Storage(str(options.folder / "krea")), spec) as chosen:
        planned = make_plan(chosen, spec, None, None)
        planned.version(write_card(facts_of(chosen, planned, spec), spec, planned, version=""))
    return _took(began)


def _now() -> tuple[float, float]:
    return time.monotonic(), time.process_time()


def _took(began: tuple[float, float]) -> dict[str, Any]:
    return {
        "wall_s": time.monotonic() - began[0],
        "cpu_s": time.process_time() - began[1],
        "peak_bytes": peak_bytes(),
    }


if __name__ == "__main__":
    main()
