"""Partitions that have left the table are removed, if that is asked for; what was bought stays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import dagster as dg
import pytest
from dagster._core.definitions.sensor_definition import SensorExecutionData

from krea_dagster import KreaResource, build_krea_definitions, on_prompts_changed
from krea_dagster.emulator import Emulator
from tests.dagster_bench import OpenAccount, posts, run_job, tick, write_table

NAME: Final = "krea_sku"


class PrunedTable:
    """A table partitioned by a column, and its sensor from tick to tick."""

    def __init__(
        self, folder: Path, krea: KreaResource, instance: dg.DagsterInstance, **options: Any
    ) -> None:
        self.folder, self.instance = folder, instance
        self.write(["a", "b", "c"])
        self.defs = build_krea_definitions(
            prompts=str(folder / "prompts.parquet"),
            krea=krea,
            **{"partition_by": "column:sku", "prune_partitions": True, **options},
        )
        self.cursor: str | None = None

    def write(self, skus: Sequence[str]) -> None:
        columns = {
            "prompt_id": [f"row {sku}" for sku in skus],
            "prompt": [f"{sku} of {self.folder.name}" for sku in skus],
            "sku": skus,
            "day": ["2026-11-02"] * len(skus),
        }
        write_table(self.folder / "prompts.parquet", columns)

    def tick(self) -> SensorExecutionData:
        outcome = tick(self.defs, self.instance, "krea_prompts", self.cursor)
        self.cursor = outcome.cursor
        return outcome

    def settle(self) -> list[str]:
        """Tick until nothing happens; return what was said."""
        said = []
        while (message := str(self.tick().skip_message)) not in said:
            said.append(message)
        return said

    @property
    def known(self) -> set[str]:
        return set(self.instance.get_dynamic_partitions(NAME))


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as own:
        yield own


@pytest.fixture
def krea(tmp_path: Path, emulator: Emulator, open_account: OpenAccount) -> KreaResource:
    return KreaResource(
        api_key=open_account(),
        base_url=emulator.url,
        expected_latency_s=0.02,
        storage=str(tmp_path / "krea"),
    )


def test_a_value_that_left_the_table_is_removed_and_a_renamed_one_is_added(
    tmp_path: Path, krea: KreaResource, instance: dg.DagsterInstance
) -> None:
    table = PrunedTable(tmp_path, krea, instance)
    assert table.settle()[0] == "Reported 3 changed partitions. Registered 3 new partitions."
    table.write(["a", "c", "b-renamed"])
    said = table.settle()
    assert said[0] == (
        "Reported 1 changed partitions. Registered 1 new partitions. "
        "Removed 1 partitions that have left the table: b."
    )
    assert said[-1] == "The prompt table requests the same images as before."
    assert table.known == {"a", "c", "b-renamed"}


def test_by_default_it_stays_and_is_reported_as_empty(
    tmp_path: Path, krea: KreaResource, instance: dg.DagsterInstance
) -> None:
    table = PrunedTable(tmp_path, krea, instance, prune_partitions=False)
    table.settle()
    table.write(["a", "c"])
    assert table.settle()[0] == "Reported 1 changed partitions."
    assert table.known == {"a", "b", "c"}


def test_pruning_that_is_turned_on_later_removes_what_had_left_before(
    tmp_path: Path, krea: KreaResource, instance: dg.DagsterInstance
) -> None:
    before = PrunedTable(tmp_path, krea, instance, prune_partitions=False)
    before.settle()
    before.write(["a", "c"])
    before.settle()
    table = PrunedTable(tmp_path, krea, instance)
    table.write(["a", "c"])
    table.cursor = before.cursor
    table.settle()
    assert table.known == {"a", "c"}


@pytest.mark.parametrize(
    "tags",
    [
        {"dagster/partition": "b"},
        {
            "dagster/asset_partition_range_start": "a",
            "dagster/asset_partition_range_end": "c",
        },
    ],
)
def test_a_partition_with_a_run_under_way_is_removed_after_it(
    tmp_path: Path, krea: KreaResource, instance: dg.DagsterInstance, tags: dict[str, str]
) -> None:
    table = PrunedTable(tmp_path, krea, instance)
    table.settle()
    run = instance.create_run_for_job(table.defs.resolve_job_def("krea_images"), tags=tags)
    table.write(["a", "c"])
    assert table.settle() == ["1 partitions that have left the table have a run under way: b."]
    assert table.known == {"a", "b", "c"}
    instance.report_run_canceled(run)
    table.settle()
    assert table.known == {"a", "c"}


def test_an_empty_table_removes_nothing(
    tmp_path: Path, krea: KreaResource, instance: dg.DagsterInstance
) -> None:
    table = PrunedTable(tmp_path, krea, instance)
    table.settle()
    table.write([])
    table.settle()
    assert table.known == {"a", "b", "c"}


@pytest.mark.filterwarnings("ignore::dagster.BetaWarning")  # Dagster's own, of the evaluation
@pytest.mark.filterwarnings("ignore:Function `AssetSelection.sources`")
def test_what_was_bought_stays_and_a_value_that_comes_back_is_not_bought_again(
    tmp_path: Path, krea: KreaResource, instance: dg.DagsterInstance, emulator: Emulator
) -> None:
    table = PrunedTable(tmp_path, krea, instance, automation_condition=on_prompts_changed())
    table.settle()
    for key in "abc":
        assert run_job(table.defs, instance, key).success
    before = posts(emulator)
    manifest = tmp_path / "krea" / "manifest" / "b.parquet"
    bought = manifest.read_bytes()
    cursor = dg.evaluate_automation_conditions(defs=table.defs, instance=instance).cursor
    table.write(["a", "c"])
    table.settle()
    launched = dg.evaluate_automation_conditions(defs=table.defs, instance=instance, cursor=cursor)
    assert launched.total_requested == 0, "a run would make the manifest empty"
    assert manifest.read_bytes() == bought
    krea_app = krea.krea()
    with krea_app.open_journal() as journal:
        assert sum(journal.count_by_state().values()) == 3
    table.write(["a", "b", "c"])
    table.settle()
    assert table.known == {"a", "b", "c"}
    assert run_job(table.defs, instance, "b").success
    assert posts(emulator) == before


def test_with_days_the_values_of_the_column_are_removed(
    tmp_path: Path, krea: KreaResource, instance: dg.DagsterInstance
) -> None:
    by = {"partition_by": "day:day,column:sku", "start": "2026-11-01"}
    table = PrunedTable(tmp_path, krea, instance, **by)
    table.settle()
    assert table.known == {"a", "b", "c"}
    table.write(["a"])
    table.settle()
    assert table.known == {"a"}
