"""What one, two and four Celery workers do together: ``python -m tests.cluster.throughput``.

Real servers on this machine: an object store, PostgreSQL, a broker, and the emulator without limits
and with 0.1 s a task. Printed are images per second, from the first purchase to the last stored
image, and the processor time of an image by where it is spent.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from unittest.mock import patch

import psutil
import psycopg

from krea_dagster.emulator import Emulator
from tests.cluster.cluster import Cluster, write_prompts
from tests.cluster.servers import Postgres, SeaweedFS, Server, Valkey, running

PARTITIONS: Final = 8


@dataclass
class Figures:
    """What was measured of one number of workers."""

    workers: int
    images: int
    span_s: float
    cpu_s: Mapping[str, float]
    worker_bytes: int
    connections: int

    def line(self) -> str:
        """Return the figures as a row of a table."""
        parts = ", ".join(f"{name} {1000 * s / self.images:.1f}" for name, s in self.cpu_s.items())
        total_ms = 1000 * sum(self.cpu_s.values()) / self.images
        return (
            f"{self.workers} workers: {self.images / self.span_s:.1f} images/s; "
            f"CPU ms an image: {total_ms:.1f} ({parts}); "
            f"cores busy: {sum(self.cpu_s.values()) / self.span_s:.2f}; "
            f"a worker {self.worker_bytes / 1e6:.0f} MB; "
            f"journal's connections {self.connections}"
        )


def cpu_s(process: psutil.Process) -> float:
    """Return the processor time of a process and all that it started."""
    total = 0.0
    for one in [process, *process.children(recursive=True)]:
        times = one.cpu_times()
        total += times.user + times.system
    return total


class Bench:
    """The servers, and a cluster on them for each number of workers."""

    def __init__(self, folder: Path, images: int, stack: ExitStack) -> None:
        self.folder = folder
        self.images = images
        self.s3 = SeaweedFS(folder / "s3")
        self.postgres = Postgres(folder / "postgres")
        self.broker = Valkey(folder / "broker")
        for server in (self.s3, self.postgres, self.broker):
            stack.enter_context(running(server))
        self.emulator = stack.enter_context(Emulator(state=folder / "emulator", latency_s=0.1))

    def measure(self, workers: int) -> Figures:
        """Run a backfill on so many workers."""
        journal = f"krea_{workers}"
        self.postgres.create(journal)
        self.postgres.create(f"dagster_{workers}")
        write_prompts(self.s3, self.images, of=f"{workers} workers")
        settings = {"concurrency": {"runs": {"max_concurrent_runs": workers}}}
        cluster = Cluster(
            self.folder / str(workers),
            store=self.s3,
            postgres=self.postgres,
            broker=self.broker,
            emulator=self.emulator,
            partition_by=f"hash:{PARTITIONS}",
            settings=settings,
            name=str(workers),
        )
        names = [f"worker-{number}" for number in range(workers)]
        with ExitStack() as stack:
            stack.callback(cluster.kill_all)
            stack.enter_context(patch.dict(os.environ, cluster.environment))
            cluster.start_dagster()
            for name in names:
                cluster.start_worker(name)
            time.sleep(15)  # until they wait for runs
            before = self._cpu_s(cluster, names)
            cluster.backfill()
            most_bytes = connections = 0
            while self._stored(journal) < self.images:
                time.sleep(0.5)
                connections = max(connections, self._connections(journal))
                most_bytes = max(most_bytes, *(_largest(cluster.process(one)) for one in names))
            after = self._cpu_s(cluster, names)
        return Figures(
            workers=workers,
            images=self.images,
            span_s=self._span_s(journal),
            cpu_s={name: after[name] - before[name] for name in after},
            worker_bytes=most_bytes,
            connections=connections,
        )

    def _cpu_s(self, cluster: Cluster, names: list[str]) -> dict[str, float]:
        def of(server: Server) -> float:
            assert server.process is not None
            return cpu_s(psutil.Process(server.process.pid))

        return {
            "workers": sum(cpu_s(cluster.process(name)) for name in names),
            "Dagster": sum(cpu_s(cluster.process(name)) for name in ("code", "daemon")),
            "object store": of(self.s3),
            "PostgreSQL": of(self.postgres),
            "emulator and this": cpu_s_of_itself(),
        }

    def _stored(self, journal: str) -> int:
        return int(self._ask(journal, "SELECT count(*) FROM requests WHERE state = 'stored'") or 0)

    def _span_s(self, journal: str) -> float:
        asked = "SELECT max(stored_at) - (SELECT min(sent_at) FROM submissions) FROM requests"
        return self._ask(journal, asked) / 1e6  # in microseconds

    def _connections(self, journal: str) -> int:
        asked = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        return int(self._ask(journal, asked)) - 1  # without this one

    def _ask(self, database: str, statement: str) -> float:
        with closing(self.postgres.connect(database)) as connection:
            try:
                row = connection.execute(statement.encode()).fetchone()
            except psycopg.errors.UndefinedTable:  # no run has begun
                return 0.0
        assert row is not None
        return float(row[0])


def cpu_s_of_itself() -> float:
    """Return the processor time of this process, which the emulator is in."""
    times = psutil.Process().cpu_times()
    return times.user + times.system


def _largest(process: psutil.Process) -> int:
    return max(
        (one.memory_info().rss for one in process.children(recursive=True)),
        default=0,
    )


def main() -> None:
    """Print a line for each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1200)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4])
    given = parser.parse_args()
    # Ended from outside, it ends its servers and workers, too.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="krea-cluster-") as folder, ExitStack() as stack:
        Path(folder).chmod(0o755)
        bench = Bench(Path(folder), given.images, stack)
        for workers in given.workers:
            print(bench.measure(workers).line(), flush=True)


if __name__ == "__main__":
    main()
