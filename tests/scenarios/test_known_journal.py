"""Dagster knows of bought images although everything else looks like a first run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from krea_dagster import KreaResource, build_krea_definitions
from krea_dagster.emulator import Emulator
from tests.spend.project_harness import ProjectHarness

ALL = {
    "dagster/asset_partition_range_start": "bucket-000",
    "dagster/asset_partition_range_end": "bucket-001",
}


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    home = tmp_path / "dagster-home"
    home.mkdir()
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    with dg.DagsterInstance.from_config(str(home)) as instance:
        yield instance


def run(
    shop: ProjectHarness, instance: dg.DagsterInstance, storage: str
) -> dg.ExecuteInProcessResult:
    """Run all partitions, with definitions that are loaded now."""
    krea = KreaResource(api_key=shop.api_key, base_url=shop.emulator.url, storage=storage)
    definitions = build_krea_definitions(
        prompts=shop.table.source, partition_by="hash:2", krea=krea
    )
    job = definitions.resolve_job_def("krea_images")
    return job.execute_in_process(instance=instance, tags=ALL, raise_on_error=False)


def what_failed(result: dg.ExecuteInProcessResult) -> str:
    (failure,) = [one for one in result.all_events if one.event_type_value == "STEP_FAILURE"]
    data = failure.step_failure_data.user_failure_data
    return "" if data is None else str(data.description)


def test_an_unmounted_root_with_its_journal_buys_nothing_again(
    shop: ProjectHarness, server: Emulator, instance: dg.DagsterInstance
) -> None:
    root = shop.folder / "krea"
    assert run(shop, instance, str(root)).success
    root.rename(shop.folder / "away")
    said = what_failed(run(shop, instance, str(root)))
    assert "Either the root is not mounted" in said
    assert server.stats()["creates"] == 4


def test_a_relative_root_in_another_working_folder_creates_no_second_journal(
    shop: ProjectHarness,
    server: Emulator,
    instance: dg.DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(shop.folder)
    assert run(shop, instance, "data/krea").success
    below = shop.folder / "below"
    below.mkdir()
    monkeypatch.chdir(below)
    said = what_failed(run(shop, instance, "data/krea"))
    assert "a relative path is used in another working folder" in said
    assert server.stats()["creates"] == 4


def test_another_root_of_the_same_instance_is_a_first_run(
    shop: ProjectHarness, server: Emulator, instance: dg.DagsterInstance
) -> None:
    assert run(shop, instance, str(shop.folder / "one")).success
    assert run(shop, instance, str(shop.folder / "other")).success
    assert server.stats()["replays"] == 4


def test_another_project_with_the_same_relative_root_and_instance_is_a_first_run(
    shop: ProjectHarness,
    server: Emulator,
    instance: dg.DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("one", "other"):
        folder = shop.folder / name
        folder.mkdir()
        monkeypatch.chdir(folder)
        project = ProjectHarness(folder, server, shop.api_key, shop.rows)
        assert run(project, instance, "data/krea").success
