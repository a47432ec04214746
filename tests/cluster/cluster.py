"""A cluster on this machine, with the shipped settings: Dagster, and Celery workers as hosts.

Each worker has its own host name, process ids, working folder and ``DAGSTER_HOME``. They share a
bucket, PostgreSQL and a broker, as on several machines.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import dagster as dg
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from krea_dagster.drill.worlds import on_host
from krea_dagster.emulator import Emulator
from tests.cluster.servers import SCRIPTS, Postgres, Store, Valkey, free_ports, wait_until

ROOT: Final = Path(__file__).parents[2]
SHIPPED: Final = ROOT / "examples" / "cluster"

PAGE: Final = ROOT / "docs" / "how-to" / "beyond-one-machine.md"


class Cluster:
    """Processes of a cluster, started and killed by a test."""

    def __init__(
        self,
        folder: Path,
        *,
        store: Store,
        postgres: Postgres,
        broker: Valkey,
        emulator: Emulator,
        partition_by: str,
        settings: Mapping[str, Any],
        name: str = "",
    ) -> None:
        self.folder = folder
        self.emulator = emulator
        self._settings = settings
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        (self._port,) = free_ports(1)
        end = name and f"_{name}"
        self.environment = {
            **store.environment(),
            "DAGSTER_POSTGRES_URL": postgres.url(f"dagster{end}", "psycopg2"),
            "CELERY_BROKER_URL": broker.url(0),
            "CELERY_BACKEND_URL": broker.url(1),
            "KREA_CODE_HOST": "127.0.0.1",
            "KREA_JOURNAL_URL": postgres.url(f"krea{end}"),
            "KREA_STORAGE": f"{store.url}/made{end}",
            "KREA_PROMPTS": f"{store.url}/prompts.parquet",
            "KREA_PARTITION_BY": partition_by,
            "KREA_PARTITIONS_PER_RUN": "1",
            "EVOLINK_BASE_URL": emulator.url,
            "EVOLINK_API_KEY": "emulator",
            # dagster-celery starts celery by its name.
            "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
        }

    def start(self, name: str, *command: str) -> None:
        """Start a process on a host of this name, with the shipped files in its folder."""
        home = self._home(name)
        with (home / "log.txt").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                on_host(name, [str(SCRIPTS / command[0]), *command[1:]]),
                cwd=home,
                env={**os.environ, **self.environment, "DAGSTER_HOME": str(home)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def start_dagster(self) -> None:
        """Start the code server and the daemon, with the commands of compose.yaml."""
        port = str(self._port)
        self.start(
            "code", "dagster", "api", "grpc", "-f", "definitions.py", "-h", "127.0.0.1", "-p", port
        )
        check = [str(SCRIPTS / "dagster"), "api", "grpc-health-check", "-p", port]
        wait_until(
            lambda: subprocess.run(check, check=False, capture_output=True).returncode == 0,
            120,
            lambda: self.log("code"),
        )
        self.start("daemon", "dagster-daemon", "run", "-w", "workspace.yaml")

    def start_worker(self, name: str) -> None:
        """Start a worker, with the command of compose.yaml."""
        self.start(
            name,
            *("dagster-celery", "worker", "start", "-A", "dagster_celery.app", "-y", "celery.yaml"),
        )

    def process(self, name: str) -> psutil.Process:
        """Return the process that holds a host's others."""
        return psutil.Process(self._processes[name].pid)

    def kill(self, name: str) -> None:
        """Kill a host: all of its processes at once."""
        process = self._processes.pop(name)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def kill_run(self, name: str) -> None:
        """Kill only the process of a worker that runs, as the kernel does if memory is short."""
        family = self.process(name).children(recursive=True)
        family[-1].kill()

    def kill_all(self) -> None:
        """Kill every host."""
        for name in list(self._processes):
            self.kill(name)

    def backfill(self) -> str:
        """Launch a backfill of all partitions as the documentation says; return its id."""
        (mutation,) = re.findall(r"--text '(mutation.*?)'", PAGE.read_text(), flags=re.DOTALL)
        home = self._home("person")
        done = subprocess.run(
            [
                *(str(SCRIPTS / "dagster-graphql"), "-w", "workspace.yaml"),
                *("--text", mutation, "--output", "answer.json"),
            ],
            cwd=home,
            env={**os.environ, **self.environment, "DAGSTER_HOME": str(home)},
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        answer = json.loads((home / "answer.json").read_text())
        return str(answer["data"]["launchPartitionBackfill"]["backfillId"])

    @contextmanager
    def instance(self) -> Iterator[dg.DagsterInstance]:
        """Open Dagster's instance as any process of the cluster does."""
        with dg.DagsterInstance.from_config(str(self._home("person"))) as instance:
            yield instance

    def log(self, name: str) -> str:
        """Return the last that a host has written."""
        return (self._home(name) / "log.txt").read_text()[-6000:]

    def created(self) -> int:
        """Return how many tasks have been bought."""
        return int(self.emulator.stats(tasks=False)["creates"])

    def _home(self, name: str) -> Path:
        home = self.folder / name
        if not home.exists():
            home.mkdir(parents=True)
            for file in ("definitions.py", "celery.yaml"):
                shutil.copy(SHIPPED / file, home)
            write_with(SHIPPED / "dagster.yaml", home, self._settings)
            workspace = {"load_from": [{"grpc_server": {"port": self._port}}]}
            write_with(SHIPPED / "workspace.yaml", home, workspace)
        return home


def write_with(shipped: Path, folder: Path, changes: Any) -> None:
    """Write a shipped file with some of its values changed, none added."""
    content = _changed(yaml.safe_load(shipped.read_text()), changes, shipped.name)
    (folder / shipped.name).write_text(yaml.safe_dump(content))


def _changed(content: Any, changes: Any, where: str) -> Any:
    match content, changes:
        case dict(), dict():
            assert set(changes) <= set(content), f"{where} has no {set(changes) - set(content)}"
            return {
                name: _changed(value, changes[name], f"{where}: {name}")
                if name in changes
                else value
                for name, value in content.items()
            }
        case [first], [change]:
            return [_changed(first, change, where)]
    return changes


def write_prompts(store: Store, rows: int, of: str = "image") -> None:
    """Write a table of so many prompts to the bucket."""
    table = pa.table({"prompt": [f"{of} {number}" for number in range(rows)]})
    with store.client() as client, client.open(f"{store.url}/prompts.parquet", "wb") as file:
        pq.write_table(table, file)


def count_by_status(runs: Sequence[dg.DagsterRun]) -> Counter[str]:
    """Return how many runs have each status."""
    return Counter(run.status.value for run in runs)
