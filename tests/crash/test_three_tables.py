"""Three tables share a journal: spend, budgets, regeneration and salvage stay separate."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow.parquet as pq
import pytest

from krea_dagster.emulator import Emulator
from krea_dagster.engine.states import State
from tests.crash.three_tables import JOBS, ROWS, TABLES, resource, separately, together, write
from tests.dagster_bench import bought, latest, posts, run_job, tick, values
from tests.engine.harness import ServerClock

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0
KEY = "bucket-000"


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as own:
        yield own


@pytest.fixture
def clock() -> ServerClock:
    return ServerClock()


@pytest.fixture
def server(tmp_path: Path, clock: ServerClock) -> Iterator[Emulator]:
    state = tmp_path / "server"
    with Emulator(latency_s=0.02, latency_jitter=0.0, state=state, clock=clock) as emulator:
        write(tmp_path)
        yield emulator


def run_all(defs: dg.Definitions, instance: dg.DagsterInstance) -> None:
    for job in JOBS.values():
        assert run_job(defs, instance, KEY, job=job).success


def kill_a_run(folder: Path, server: Emulator, clock: ServerClock, prefix: str) -> None:
    """Kill a run of a table with SIGKILL when all its images are bought; then they are ready."""
    server.world.latency_s = 3600.0
    command = [sys.executable, "-m", "tests.crash.three_tables", str(folder), server.url]
    krea = resource(folder, server.url).krea()

    def all_bought() -> bool:
        if not krea.has_journal():
            return False
        with krea.open_journal() as journal:
            return journal.count_by_state().get(State.SUBMITTED) == len(ROWS)

    with subprocess.Popen([*command, JOBS[prefix]], cwd=ROOT) as process:
        wait_for(all_bought, process)
        process.kill()
    server.world.latency_s = 0.02
    clock.move(3601.0)


def wait_for(what: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not what():
        assert process.poll() is None, "the process ended too early"
        assert time.monotonic() < until_s
        time.sleep(0.02)


def rows_of(folder: Path, table: str) -> list[dict[str, Any]]:
    """The rows of a spend table."""
    (file,) = (folder / "krea" / "spend" / table).glob("*.parquet")
    rows: list[dict[str, Any]] = pq.read_table(file).to_pylist()
    return rows


def has_manifest(instance: dg.DagsterInstance, prefix: str) -> bool:
    key = dg.AssetKey([*prefix.split("/"), "image_manifest"])
    return instance.get_latest_materialization_event(key) is not None


# -- spend ------------------------------------------------------------------------------------


def test_the_spend_tables_tell_the_prompt_tables_apart(
    tmp_path: Path, server: Emulator, instance: dg.DagsterInstance
) -> None:
    defs = together(tmp_path, server.url, by=("campaign",))
    run_all(defs, instance)
    assert run_job(defs, instance, job="krea_spend").success
    ledger = rows_of(tmp_path, "ledger")
    assert {(row["prompt_table"], row["partition_key"]) for row in ledger} == {
        (prefix, KEY) for prefix in TABLES
    }
    assert len(ledger) == len(TABLES) * len(ROWS)
    for prefix in TABLES:
        own = [row for row in rows_of(tmp_path, "daily") if row["prompt_table"] == prefix]
        assert sum(row["images_asked"] for row in own) == len(ROWS)
        assert {row["campaign"] for row in own} == {f"{prefix} {name}" for name in ROWS}


def test_the_spend_of_rows_with_equal_prompt_ids_is_summed_by_the_columns_of_each(
    tmp_path: Path, server: Emulator, instance: dg.DagsterInstance
) -> None:
    defs = together(tmp_path, server.url)
    run_all(defs, instance)
    krea = (defs.resources or {})["krea"].krea()
    spend = {line.of[0]: line.purchases for line in krea.spend(["campaign"]).lines}
    assert spend == {f"{prefix} {name}": 1 for prefix in TABLES for name in ROWS}


def test_each_table_has_its_own_budget_of_a_partition(
    tmp_path: Path, server: Emulator, instance: dg.DagsterInstance
) -> None:
    defs = together(tmp_path, server.url, budgets=["partition=0.9"], soft_budgets=["partition=1"])
    for prefix in TABLES:
        assert run_job(defs, instance, KEY, job=JOBS[prefix]).success
        assert len(bought(server, f"of {prefix}")) == 2, "0.45 credits each"
    assert run_job(defs, instance, job="krea_spend").success
    key = dg.AssetCheckKey(dg.AssetKey("spend_daily"), "spend_budget_used")
    record = instance.event_log_storage.get_latest_asset_check_execution_by_key([key])[key]
    assert record.event is not None
    assert record.event.dagster_event is not None
    evaluation = record.event.dagster_event.asset_check_evaluation_data
    found = evaluation.metadata["findings"].value
    assert isinstance(found, dg.TableMetadataValue)
    about = {row.data["about"] for row in found.records}
    assert about == {f"partition {prefix}/{KEY}" for prefix in TABLES}


def test_two_ledgers_of_the_same_purchases_name_each_other(
    tmp_path: Path, server: Emulator, instance: dg.DagsterInstance
) -> None:
    defs = separately(tmp_path, server.url, spend=TABLES[:2])
    run_all(defs, instance)
    for job in ("ads_krea_spend", "shelf_books_krea_spend"):
        assert run_job(defs, instance, job=job).success
    ads, books = (dg.AssetKey([*one.split("/"), "spend_ledger"]) for one in TABLES[:2])
    made = instance.get_latest_materialization_event(books)
    assert made is not None
    assert made.asset_materialization is not None
    assert values(made.asset_materialization)["same_purchases_as"] == ads.to_user_string()


# -- another image ----------------------------------------------------------------------------


def test_another_image_of_a_row_is_bought_in_one_table_only(
    tmp_path: Path, server: Emulator, instance: dg.DagsterInstance
) -> None:
    defs = together(tmp_path, server.url)
    run_all(defs, instance)
    again = {"ops": {"cards__images": {"config": {"regenerate": ["ash"]}}}}
    result = defs.resolve_job_def(JOBS["cards"]).execute_in_process(
        instance=instance, partition_key=KEY, run_config=again
    )
    assert result.success
    run_all(defs, instance)
    counts = {prefix: len(bought(server, f"ash of {prefix}")) for prefix in TABLES}
    assert counts == {"ads": 1, "shelf/books": 1, "cards": 2}


# -- a killed run -----------------------------------------------------------------------------


def test_the_one_salvage_takes_up_a_killed_run_and_rewrites_the_manifest_of_its_table(
    tmp_path: Path, server: Emulator, clock: ServerClock, instance: dg.DagsterInstance
) -> None:
    kill_a_run(tmp_path, server, clock, "shelf/books")
    defs = together(tmp_path, server.url)
    (tmp_path / "ads.parquet").rename(tmp_path / "away.parquet")  # which is of another table
    looked = tick(defs, instance, "krea_salvage")
    (request,) = looked.run_requests or ()
    assert request.tags["krea/left_behind"] == "3"
    job = defs.resolve_job_def("krea_salvage")
    assert job.execute_in_process(instance=instance, tags=dict(request.tags)).success
    assert {prefix for prefix in TABLES if has_manifest(instance, prefix)} == {"shelf/books"}
    made = values(latest(instance, ("shelf", "books", "image_manifest"), KEY))
    assert made["dagster/partition_row_count"] == len(ROWS)
    # Nothing was bought twice, and the others' images are still to be bought.
    assert posts(server) == len(ROWS)
    (tmp_path / "away.parquet").rename(tmp_path / "ads.parquet")
    run_all(defs, instance)
    assert posts(server) == len(TABLES) * len(ROWS)
    assert server.stats()["bodies_bought_more_than_once"] == 0


def test_of_three_salvages_that_of_the_killed_table_is_launched(
    tmp_path: Path, server: Emulator, clock: ServerClock, instance: dg.DagsterInstance
) -> None:
    kill_a_run(tmp_path, server, clock, "cards")
    defs = separately(tmp_path, server.url)
    looked = {
        name: tick(defs, instance, f"{name}_krea_salvage").run_requests or ()
        for name in ("ads", "shelf_books", "cards")
    }
    assert {name: len(requests) for name, requests in looked.items()} == {
        "ads": 0, "shelf_books": 0, "cards": 1,
    }  # fmt: skip
    assert run_job(defs, instance, job="cards_krea_salvage").success
    assert {prefix for prefix in TABLES if has_manifest(instance, prefix)} == {"cards"}
    assert posts(server) == len(ROWS)
