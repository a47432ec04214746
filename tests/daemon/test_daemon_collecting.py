"""Submit now, collect later, by Dagster's own daemon: no process waits for an image."""

from __future__ import annotations

import socket
import sqlite3
from contextlib import closing
from pathlib import Path

import dagster as dg
import pytest

from krea_dagster import KreaResource
from krea_dagster.emulator import Emulator
from krea_dagster.engine.states import State
from krea_dagster.plugin.sensors.collect import COLLECTS_TAG
from tests.callbacks.callback_flood import SECRET, serving
from tests.callbacks.tls_certificates import TlsCertificates
from tests.daemon.daemon_bench import Dagster, dagster_dev
from tests.dagster_bench import write_table
from tests.engine.harness import ServerClock

pytestmark = pytest.mark.daemon

BUCKETS = [f"bucket-{number:03}" for number in range(3)]
COUNT = 18


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def collections(dagster: Dagster) -> list[dg.DagsterRun]:
    """The runs that the sensor has launched, the oldest first."""
    return [run for run in dagster.runs() if COLLECTS_TAG in run.tags]


def states(krea: KreaResource) -> dict[State, int]:
    with krea.krea().open_journal() as journal:
        return journal.count_by_state()


def test_runs_submit_and_end_and_later_runs_collect_what_is_ready_the_most_urgent_first(
    tmp_path: Path,
) -> None:
    """One partition by a callback over TLS, two by the clock, whose callbacks are not received."""
    prompts = [f"image {number}" for number in range(COUNT)]
    write_table(tmp_path / "prompts.parquet", {"prompt": prompts})
    storage, tls, port = tmp_path / "krea", TlsCertificates.make(tmp_path), free_port()
    krea = KreaResource(storage=str(storage))
    clock = ServerClock()
    with (
        Emulator(
            latency_s=3600.0, latency_jitter=0.0, clock=clock, state=tmp_path / "emulator",
            callbacks_to_private=True, callback_ca=tls.ca,
        ) as emulator,
        dagster_dev(
            tmp_path,
            base_url=emulator.url,
            api_key="emulator",
            partition_by="hash:3",
            collect="later",
            callbacks={
                "CALLBACK_BASE_URL": f"https://localhost:{port}", "CALLBACK_SECRET": SECRET
            },
        ) as dagster,
    ):  # fmt: skip
        # The submitting run: over within seconds, while its images take an hour.
        first = dagster.launch(BUCKETS[0])
        dagster.wait(lambda: _is_over(dagster, first))
        at_server = emulator.stats(tasks=False)["in_flight"]
        assert at_server > 0
        assert states(krea) == {State.SUBMITTED: at_server}
        dagster.wait_until_quiet()
        assert not collections(dagster)

        # They announce themselves, and the next run collects them.
        with serving(storage, *tls.options, port=port):
            clock.move(3601.0)
            dagster.wait(lambda: states(krea) == {State.STORED: at_server})
        dagster.wait_until_quiet()
        assert {run.tags["dagster/partition"] for run in collections(dagster)} == {BUCKETS[0]}
        assert all(run.is_success for run in collections(dagster))

        # The callbacks of the other two are not received; the one with the older links comes first.
        before = len(collections(dagster))
        runs = [dagster.launch(bucket) for bucket in BUCKETS[1:]]
        dagster.wait(lambda: all(_is_over(dagster, run) for run in runs))
        clock.move(3601.0)
        _make_older(storage / "journal.db", {runs[0]: 700.0, runs[1]: 21 * 3600.0})
        dagster.wait(lambda: states(krea) == {State.STORED: COUNT})
        dagster.wait_until_quiet()
        collected = [run.tags["dagster/partition"] for run in collections(dagster)[before:]]
        assert collected[:2] == [BUCKETS[2], BUCKETS[1]]
        books = emulator.stats(tasks=False)
    assert (books["creates"], books["submit_posts"]) == (COUNT, COUNT)
    assert books["bodies_bought_more_than_once"] == 0


def _is_over(dagster: Dagster, run_id: str) -> bool:
    run = dagster.instance.get_run_by_id(run_id)
    assert run is not None
    assert run.status is not dg.DagsterRunStatus.FAILURE, dagster.log()
    return run.is_success


def _make_older(journal: Path, seconds: dict[str, float]) -> None:
    with closing(sqlite3.connect(journal, timeout=60.0)) as connection, connection:
        for run_id, older_s in seconds.items():
            connection.execute(
                "UPDATE submissions SET submitted_at = submitted_at - ? WHERE run_id = ?",
                [int(older_s * 1e6), run_id],
            )
