"""Three Celery workers share a backfill while a worker, the bucket and the database are lost."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Final

import dagster as dg
import pytest
from dagster._core.execution.backfill import BULK_ACTION_TERMINAL_STATUSES, BulkActionStatus

from krea_dagster.emulator import Emulator
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.states import State
from tests.cluster.cluster import Cluster, count_by_status, write_prompts
from tests.cluster.servers import Postgres, SeaweedFS, Server, Valkey, wait_until

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(os.geteuid() != 0, reason="hosts of their own need root"),
]

#: Of its storage root and databases: the servers are those of other tests, too.
NAME: Final = "celery"
PARTITIONS: Final = 16
ROWS: Final = PARTITIONS * 60
AWAY_S: Final = 15.0
#: Seconds after which something hangs. On two idle cores it takes less than half as long.
MOST_S: Final = 600.0

#: The shipped times are for runs of an hour.
SHORTER: Final = {
    "run_monitoring": {
        "poll_interval_seconds": 5,
        "start_timeout_seconds": 60,  # a worker that is killed keeps the run that it has taken
        "max_runtime_seconds": 90,
    }
}


def away(server: Server) -> None:
    """Kill a server, and start it again on its data after a while."""
    server.kill()
    time.sleep(AWAY_S)
    server.start()


def test_a_backfill_ends_by_itself_although_a_worker_and_every_server_are_lost_for_a_while(
    tmp_path: Path,
    s3: SeaweedFS,
    postgres: Postgres,
    broker: Valkey,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_prompts(s3, ROWS)
    for database in (f"dagster_{NAME}", f"krea_{NAME}"):
        postgres.create(database)
    with ExitStack() as stack:
        emulator = stack.enter_context(Emulator(state=tmp_path / "emulator", latency_s=1.0))
        cluster = Cluster(
            tmp_path,
            store=s3,
            postgres=postgres,
            broker=broker,
            emulator=emulator,
            partition_by=f"hash:{PARTITIONS}",
            settings=SHORTER,
            name=NAME,
        )
        stack.callback(cluster.kill_all)
        for name, value in cluster.environment.items():
            monkeypatch.setenv(name, value)
        cluster.start_dagster()
        for name in ("worker-1", "worker-2", "worker-3"):
            cluster.start_worker(name)
        started_s = time.monotonic()
        backfill_id = cluster.backfill()

        def bought(share: float) -> None:
            def is_bought() -> bool:
                assert not backfill_ended(instance, backfill_id), why(cluster)
                return cluster.created() >= share * ROWS

            with cluster.instance() as instance:
                wait_until(is_bought, MOST_S, lambda: why(cluster))

        def why(cluster: Cluster) -> str:
            with cluster.instance() as instance:
                runs = count_by_status(instance.get_runs())
            logs = "\n".join(cluster.log(name) for name in ("daemon", "worker-2"))
            return f"{cluster.created()} of {ROWS} bought, runs: {runs}\n{logs}"

        bought(0.15)
        cluster.kill("worker-1")
        bought(0.35)
        away(s3)
        bought(0.6)
        away(postgres)
        bought(0.8)
        cluster.kill_run("worker-2")
        bought(0.9)
        away(broker)
        with cluster.instance() as instance:
            wait_until(
                lambda: backfill_ended(instance, backfill_id),
                started_s + MOST_S - time.monotonic(),
                lambda: why(cluster),
            )
            took_s = time.monotonic() - started_s
            backfill = instance.get_backfill(backfill_id)
            runs = instance.get_runs()
        assert backfill is not None
        assert backfill.status is BulkActionStatus.COMPLETED_SUCCESS
        print(f"{took_s:.0f} s; runs: {dict(count_by_status(runs))}")

        books = emulator.stats()
        assert (books["creates"], books["bodies_bought_more_than_once"]) == (ROWS, 0)
        assert len({task["prompt"] for task in books["tasks"]}) == ROWS
        assert (books["charged_units"], books["held_units"]) == (ROWS * 4_500, 0)
        with closing(Journal(postgres.url(f"krea_{NAME}"))) as journal:
            assert journal.count_by_state() == {State.STORED: ROWS}
        with s3.client() as client:
            assert len(client.find(f"{s3.url}/made_{NAME}/images")) == ROWS


def backfill_ended(instance: dg.DagsterInstance, backfill_id: str) -> bool:
    backfill = instance.get_backfill(backfill_id)
    return backfill is not None and backfill.status in BULK_ACTION_TERMINAL_STATUSES
