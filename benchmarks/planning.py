"""The time before a run buys: it reads, checks and identifies a large table, and skips stored rows.

python -m benchmarks.planning [--rows N] [--large N] [--quick] [--json]

Each step is measured in a new process, and compared with the loop that a user would write: pandas,
hashlib and a set of the stored keys.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sqlite3
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

from benchmarks.harness import (
    BenchmarkServer,
    EndedProcess,
    RunningProcess,
    note_progress,
    peak_bytes,
    run,
)
from benchmarks.report import Report, finish, options_of

if TYPE_CHECKING:
    from krea_dagster import Krea

#: The rows, and the most time and memory for them.
ROWS: Final = 1_000_000
LARGE: Final = 10_000_000
PLAN_S: Final = 4.0
PLAN_BYTES: Final = 700_000_000
PARTITION_S: Final = 5.0

#: Of the rows, one in a hundred is bought: the time to the first POST, and the peak memory as a
#: multiple of that of the imports.
FIRST_POST_S: Final = 6.0
PEAK_RATIO: Final = 2.2

SENTENCE: Final = "harbor dawn red kite quiet city soft light film grain portrait sailor lake fog"
_AT_ONCE: Final = 100_000
_BUCKETS: Final = 64


def main() -> None:
    """Run the command: the report, or with ``--work`` one of its processes."""
    parser = options_of("planning")
    parser.add_argument(
        "--rows", type=int, default=ROWS, help="rows of the table whose images are all stored"
    )
    parser.add_argument("--large", type=int, default=LARGE, help="rows of the large table")
    parser.add_argument("--work", choices=sorted(WORK), help="do this step, and print its cost")
    parser.add_argument("--folder", type=Path, help="for --work")
    options = parser.parse_args()
    if options.work:
        print(json.dumps(WORK[options.work](options)))
        return
    if options.quick:
        options.rows, options.large = options.rows // 10, options.large // 10
    with TemporaryDirectory() as name:
        _measure(options, Path(name))


def _measure(options: Namespace, folder: Path) -> None:
    report = Report(
        "planning",
        f"A table of {options.rows:,} rows, all done; one of {_BUCKETS} partitions of "
        f"{options.large:,} rows",
        setting=(
            "Rows of prompt_id, prompt (14 words), size, quality, seed (half of them drawn) and "
            "one further column; Parquet, row groups of 100,000. Every row stored in a SQLite "
            "journal, and its file in its folder. n = 1, both cores."
        ),
        columns=["what", "wall, s", "CPU, s", "peak memory, MB", "images left to do"],
    )
    times = 1 if options.quick else 2
    _do("table", folder, options.rows)
    _do("done", folder, options.rows)
    plan = _best("journal", folder, options.rows, times)
    _row(report, "read, check, identify, skip what the journal has", plan)
    files = _best("files", folder, options.rows, times)
    _row(report, "the same, and look for each file and its size", files)
    _row(report, "read, check and identify alone", _best("identify", folder, options.rows, times))
    loop = _best("loop", folder, options.rows, 1)
    _row(report, "pandas, hashlib and a set, without checks and files", loop)
    alone = _do("imports", folder, options.rows)
    _row(report, "the imports of the command alone", alone)
    new = _do("forget", folder, options.rows).output["left"]
    ended, first_post_s = _materialize(folder, new)
    report.add(
        f"materialize, {new:,} images to buy",
        f"{ended.wall_s:.2f}",
        f"{ended.cpu_s:.2f}",
        f"{ended.peak_bytes / 1e6:.0f}",
        "0",
    )
    report.claim(
        f"start of materialize to its first POST, {new:,} to buy", first_post_s, FIRST_POST_S, "s"
    )
    report.claim(
        "its peak memory to that of the imports",
        ended.peak_bytes / alone.output["peak_bytes"],
        PEAK_RATIO,
    )
    _do("table", folder, options.large)
    part = _best("partition", folder, options.large, times)
    _row(report, f"one partition of hash:{_BUCKETS} of {options.large:,} rows", part)
    whole = options.rows / ROWS
    report.claim(f"planning {options.rows:,} rows", plan.output["wall_s"], PLAN_S * whole, "s")
    peak = max(plan.output["peak_bytes"], files.output["peak_bytes"])
    report.claim("its peak memory with the files, MB", peak / 1e6, PLAN_BYTES / 1e6)
    limit_s = PARTITION_S * options.large / LARGE
    report.claim("one partition", part.output["wall_s"], limit_s, "s")
    late = first_post_s / loop.output["wall_s"]
    report.note(
        "Seconds are without Python's start and imports, memory is with them; those of materialize "
        f"are of the whole command. Its first POST took {late:.1f} times as long as the loop."
    )
    finish(report, options)


def _do(work: str, folder: Path, rows: int) -> EndedProcess:
    note_progress(f"{work}, {rows:,} rows")
    command = ["benchmarks.planning", "--work", work, "--folder", str(folder), "--rows", str(rows)]
    return run(command)


def _best(work: str, folder: Path, rows: int, times: int) -> EndedProcess:
    return min(
        (_do(work, folder, rows) for _ in range(times)), key=lambda ended: ended.output["wall_s"]
    )


def _row(report: Report, what: str, ended: EndedProcess) -> None:
    said = ended.output
    memory = f"{said['peak_bytes'] / 1e6:.0f}"
    report.add(what, f"{said['wall_s']:.2f}", f"{said['cpu_s']:.2f}", memory, said.get("left", "–"))


# -- the processes --------------------------------------------------------------------------------


def _timed(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    found = work()
    return {
        **found,
        "wall_s": time.perf_counter() - wall_s,
        "cpu_s": time.process_time() - cpu_s,
        "peak_bytes": peak_bytes(),
    }


def write_table(options: Namespace) -> dict[str, Any]:
    """Write the table."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    chance = np.random.default_rng(1)
    known = np.array(SENTENCE.split())
    writer = None
    for start in range(0, options.rows, _AT_ONCE):
        rows = min(_AT_ONCE, options.rows - start)
        words = known[chance.integers(0, len(known), (rows, 14))]
        drawn = chance.random(rows) < 0.5
        table = pa.table(
            {
                "prompt_id": [f"row-{start + at:08d}" for at in range(rows)],
                "prompt": [f"{' '.join(row)} {start + at}" for at, row in enumerate(words)],
                "size": np.array(["1:1", "16:9", "2:1"])[chance.integers(0, 3, rows)],
                "quality": ["1K"] * rows,
                "seed": np.where(drawn, 0, chance.integers(1, 1_048_577, rows)).astype(np.int32),
                "campaign": np.array(["a", "b", "c"])[chance.integers(0, 3, rows)],
            }
        )
        writer = writer or pq.ParquetWriter(options.folder / "prompts.parquet", table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()
    return {}


def write_done(options: Namespace) -> dict[str, Any]:
    """Write a journal and files in which every row of the table is stored."""
    from krea_dagster.engine.journal.journal import Journal

    krea = _krea(options)
    table = _table(options, "hash:8")
    root = options.folder / "krea"
    with closing(Journal(f"sqlite:///{root / 'journal.db'}")) as journal:
        journal.bind("an emulator")
    for number in range(256):
        (root / "images" / f"{number:02x}").mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(root / "journal.db")) as database, table.plan() as plan:
        # Only reading is measured, so this journal is written in a quick way.
        database.executescript("pragma synchronous = off; pragma foreign_keys = off;")
        for key in plan.keys:
            for batch in plan.batches(key):
                _fill(database, root, batch.to_pylist())
                database.commit()
    assert krea.has_journal()
    return {}


_NOW_US: Final = 1_780_000_000_000_000


def _fill(database: sqlite3.Connection, root: Path, rows: list[dict[str, Any]]) -> None:
    stored = [_stored(row) for row in rows]
    for table in ("requests", "submissions"):
        known = [row[1] for row in database.execute(f"pragma table_info({table})")]
        columns = [name for name in known if name in stored[0]]  # others have defaults
        marks = ", ".join("?" for _ in columns)
        database.executemany(
            f"insert into {table} ({', '.join(columns)}) values ({marks})",
            ([row[column] for column in columns] for row in stored),
        )
    for row in rows:
        key = row["request_key"]
        path = root / "images" / key[:2] / f"{key}.png"
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY)
        os.write(descriptor, _content(key))
        os.close(descriptor)


def _content(key: str) -> bytes:
    return key[:10].encode()


def _stored(row: dict[str, Any]) -> dict[str, Any]:
    key = row["request_key"]
    times = ("sent_at", "submitted_at", "completed_at", "settled_at", "stored_at", "updated_at")
    money = ("expected_units", "committed_units", "reserved_units", "charged_units")
    return {
        **{name: row[name] for name in ("request_key", "prompt", "size", "quality", "seed")},
        **{name: row[name] for name in ("nsfw_check", "attempt", "partition_key")},
        **dict.fromkeys(times, _NOW_US),
        **dict.fromkeys(money, 4500),
        "model": "krea-2-turbo",
        "state": "stored",
        "seq": 5,
        "idempotency_key": f"krea-{key}-1",
        "result_url": f"https://files.example/{key}.png",
        "image_path": f"images/{key[:2]}/{key}.png",
        "image_sha256": hashlib.sha256(_content(key)).hexdigest(),
        "image_bytes": 10,
        "image_format": "PNG",
        "width": 1024,
        "height": 1024,
        "number": 1,
        "run_id": "an-earlier-run",
        "posts": 1,
        "task_id": f"task-{key[:32]}",
        "billing_rule": "standard",
        "user_group": "default",
    }


_OF_THE_NEW: Final = "select request_key from requests where rowid % 100 = 0"


def forget(options: Namespace) -> dict[str, Any]:
    """Make of every hundredth row one that was never bought."""
    root = options.folder / "krea"
    with closing(sqlite3.connect(root / "journal.db")) as database:
        keys = [key for (key,) in database.execute(_OF_THE_NEW)]
        database.execute(f"delete from submissions where request_key in ({_OF_THE_NEW})")
        database.execute(f"delete from requests where request_key in ({_OF_THE_NEW})")
        database.commit()
    for key in keys:
        (root / "images" / key[:2] / f"{key}.png").unlink()
    return {"left": len(keys)}


def imports(_: Namespace) -> dict[str, Any]:
    """Import what the command imports."""

    def work() -> dict[str, Any]:
        importlib.import_module("krea_dagster.plugin.materialize")
        return {}

    return _timed(work)


def _materialize(folder: Path, new: int) -> tuple[EndedProcess, float]:
    """Run the command; return its cost, and the seconds from its start to its first POST."""
    note_progress(f"materialize, {new:,} images to buy")
    with BenchmarkServer.start("--latency", 0, "--image-bytes", 1) as server:
        process = RunningProcess(
            ["krea_dagster.cli", "materialize", "--json"],
            environ={
                "EVOLINK_API_KEY": "bench",
                "EVOLINK_BASE_URL": server.url,
                "KREA_PROMPTS": str(folder / "prompts.parquet"),
                "KREA_STORAGE": str(folder / "krea"),
                "KREA_PARTITION_BY": "hash:8",
            },
        )
        ended, stats = process.wait(), server.stats(brief=True)
    if stats["accepted"] != new:
        raise RuntimeError(f"{stats['accepted']} images were bought instead of {new}")
    return ended, stats["first_post_s"] - process.started_s


def _krea(options: Namespace) -> Krea:
    from krea_dagster import Krea, Settings

    # An address without a server: planning needs no network.
    storage = str(options.folder / "krea")
    return Krea(Settings(api_key="none", base_url="http://127.0.0.1:9", storage=storage))


def _table(options: Namespace, by: str) -> Any:
    from krea_dagster.prompts import PromptTable, parse_partition_by

    return PromptTable(str(options.folder / "prompts.parquet"), parse_partition_by(by))


def plan(options: Namespace) -> dict[str, Any]:
    """Plan as a run does, up to the rows that are left."""
    from krea_dagster.application.batch import Batch

    krea, table = _krea(options), _table(options, "hash:8")

    def work() -> dict[str, Any]:
        with Batch.read(table, table.partition_keys(), krea, look=True) as batch:
            standing = batch.state(krea)
            return {"left": sum(1 for _ in standing.wanted())}

    return _timed(work)


def journal_only(options: Namespace) -> dict[str, Any]:
    """Plan as a run does, but take every file of the journal as present."""
    from krea_dagster.engine.journal import bulk_reads

    vars(bulk_reads)["_intact_by_listing"] = lambda _, known: known.values >= 0  # noqa: PD011 - no pandas
    return plan(options)


def identify(options: Namespace) -> dict[str, Any]:
    """Read, check and identify all rows."""
    table = _table(options, "hash:8")

    def work() -> dict[str, Any]:
        with table.plan(keep=False) as found:
            return {"left": len(found.all_digests)}

    return _timed(work)


def partition(options: Namespace) -> dict[str, Any]:
    """Plan one partition of a large table."""
    table = _table(options, f"hash:{_BUCKETS}")

    def work() -> dict[str, Any]:
        with table.plan(["bucket-007"]) as found:
            return {"left": len(found.all_digests)}

    return _timed(work)


def loop(options: Namespace) -> dict[str, Any]:
    """Loop over a data frame as a user would write it. It checks nothing, and no files."""
    import pandas as pd

    def digest(*parts: object) -> str:
        return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()

    def keys() -> Iterator[str]:
        frame = pd.read_parquet(options.folder / "prompts.parquet")
        for row in frame.itertuples():
            seed = row.seed or 1 + int(digest("krea-dagster/1/seed", 0, 0, row.prompt_id)[:5], 16)
            digest(row.prompt_id)  # the partition
            fields = (row.size, row.quality, seed, 0, 0, row.prompt)
            yield digest("krea-dagster/1", "krea-2-turbo", *fields)

    def work() -> dict[str, Any]:
        with closing(sqlite3.connect(options.folder / "krea" / "journal.db")) as database:
            query = "select request_key from requests where state = 'stored'"
            done = {key for (key,) in database.execute(query)}
        return {"left": sum(1 for key in keys() if key not in done)}

    return _timed(work)


WORK: Final[dict[str, Callable[[Namespace], dict[str, Any]]]] = {
    "table": write_table,
    "done": write_done,
    "forget": forget,
    "imports": imports,
    "files": plan,
    "journal": journal_only,
    "identify": identify,
    "partition": partition,
    "loop": loop,
}

if __name__ == "__main__":
    main()
