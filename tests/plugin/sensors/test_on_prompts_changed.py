"""What the condition launches, by events alone: no run, no network, no clock."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
import pytest

from krea_dagster import KreaAssets, KreaManifestIOManager, KreaResource, build_krea_assets
from krea_dagster.plugin.data_versions import report_prompts
from krea_dagster.plugin.sensors.prompts import build_automation_sensor, on_prompts_changed
from krea_dagster.prompts import PromptTable, parse_partition_by
from tests.dagster_bench import QUIET

#: The tester of automation conditions uses a beta parameter of Dagster's own.
pytestmark = pytest.mark.filterwarnings("ignore::dagster.BetaWarning")

BUCKETS = ("bucket-000", "bucket-001", "bucket-002")


def _stand_in(asset: dg.AssetsDefinition) -> dg.AssetsDefinition:
    """An asset of the same key, that needs nothing and buys nothing."""

    @dg.asset(key=asset.key, partitions_def=asset.partitions_def)
    def made() -> None: ...

    return made


class AutomationHarness:
    """Three partitions of a table in an instance of their own, and what Dagster would launch."""

    def __init__(self, folder: Path, instance: dg.DagsterInstance) -> None:
        table = PromptTable(str(folder / "prompts.parquet"), parse_partition_by("hash:3"))
        assets = build_krea_assets(table)
        self.instance = instance
        self.assets: KreaAssets = assets
        with_condition = dg.map_asset_specs(
            lambda spec: spec.replace_attributes(automation_condition=on_prompts_changed()),
            [assets.images, assets.image_manifest],
        )
        self.defs = dg.Definitions(
            assets=[assets.prompts, assets.prompt_columns, *with_condition],
            resources={
                "krea": KreaResource(storage=str(folder)),
                "krea_manifest": KreaManifestIOManager(storage=str(folder)),
            },
        )
        self.stand_ins = dg.Definitions(
            [_stand_in(assets.images), _stand_in(assets.image_manifest)]
        )
        self._last: dg.EvaluateAutomationConditionsResult | None = None

    def prompts(self, version: str, *partitions: str) -> None:
        """The sensor reports these partitions with a version."""
        versions = dict.fromkeys(partitions, version)
        self.columns("the same", *partitions)
        report_prompts(self.instance, self.assets.prompts.key, versions)

    def columns(self, version: str, *partitions: str) -> None:
        """The sensor reports the columns that these partitions carry along with a version."""
        versions = dict.fromkeys(partitions, version)
        report_prompts(self.instance, self.assets.prompt_columns.key, versions)

    def made(self, *partitions: str, manifest: bool = True) -> None:
        """A run for each materializes these partitions; of what it does, only that counts."""
        keys = [self.assets.images.key, self.assets.image_manifest.key][: 1 + manifest]
        job = self.stand_ins.resolve_implicit_global_asset_job_def()
        for partition in partitions:
            job.execute_in_process(
                partition_key=partition,
                asset_selection=keys,
                instance=self.instance,
                run_config=QUIET,
            )

    @contextmanager
    def running(self, partition: str) -> Iterator[None]:
        """A run of this partition is under way, and is cancelled at the end."""
        run = self.instance.create_run_for_job(
            self.stand_ins.resolve_implicit_global_asset_job_def(),
            tags={"dagster/partition": partition},
            asset_selection=frozenset([self.assets.images.key, self.assets.image_manifest.key]),
            status=dg.DagsterRunStatus.STARTED,
        )
        yield
        self.instance.report_run_canceled(run)

    def tick(self) -> tuple[set[str], set[str]]:
        """The partitions of images, and of image_manifest, that are launched now."""
        self._last = dg.evaluate_automation_conditions(
            self.defs, self.instance, cursor=None if self._last is None else self._last.cursor
        )
        images, manifest = (
            {str(partition) for partition in self._last.get_requested_partitions(asset.key)}
            for asset in (self.assets.images, self.assets.image_manifest)
        )
        return images, manifest


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[AutomationHarness]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield AutomationHarness(tmp_path, instance)


NOTHING: tuple[set[str], set[str]] = (set(), set())


def both(*partitions: str) -> tuple[set[str], set[str]]:
    return set(partitions), set(partitions)


def test_what_is_missing_is_launched_once_and_then_only_what_changed(
    harness: AutomationHarness,
) -> None:
    harness.prompts("v1", *BUCKETS)
    assert harness.tick() == both(*BUCKETS)
    harness.made(*BUCKETS)
    assert harness.tick() == NOTHING
    harness.prompts("v2", BUCKETS[1])
    assert harness.tick() == both(BUCKETS[1])
    harness.made(BUCKETS[1])
    assert harness.tick() == NOTHING
    assert harness.tick() == NOTHING


def test_what_was_made_before_the_condition_was_given_is_left_alone(
    harness: AutomationHarness,
) -> None:
    harness.prompts("v1", *BUCKETS)
    harness.made(BUCKETS[0])
    assert harness.tick() == both(*BUCKETS[1:])


def test_a_partition_whose_prompts_are_not_known_yet_waits_for_them(
    harness: AutomationHarness,
) -> None:
    assert harness.tick() == NOTHING
    harness.prompts("v1", BUCKETS[2])
    assert harness.tick() == both(BUCKETS[2])


def test_a_run_that_fails_is_launched_again_by_new_prompts_and_never_by_a_tick(
    harness: AutomationHarness,
) -> None:
    """Nothing was materialized: the account refused the key, say."""
    harness.prompts("v1", *BUCKETS)
    assert harness.tick() == both(*BUCKETS)
    for _ in range(5):
        assert harness.tick() == NOTHING
    harness.prompts("v2", BUCKETS[0])
    assert harness.tick() == both(BUCKETS[0])
    for _ in range(3):
        assert harness.tick() == NOTHING


def test_a_run_that_ends_with_rows_missing_is_not_launched_again_before_its_prompts_change(
    harness: AutomationHarness,
) -> None:
    """An account stop and a cap materialize what there is: after a top-up, a person launches it."""
    harness.prompts("v1", *BUCKETS)
    harness.tick()
    harness.made(*BUCKETS)
    assert [harness.tick() for _ in range(3)] == [NOTHING] * 3
    harness.made(BUCKETS[0])  # by a person, after the top-up
    assert harness.tick() == NOTHING
    harness.prompts("v2", BUCKETS[0])
    assert harness.tick() == both(BUCKETS[0])


def test_prompts_that_change_while_their_partition_is_run_are_not_forgotten(
    harness: AutomationHarness,
) -> None:
    """The run read the table before: what it materializes is not what is asked for now."""
    harness.prompts("v1", *BUCKETS)
    harness.tick()
    harness.prompts("v2", BUCKETS[0])
    harness.made(*BUCKETS)
    images, _ = harness.tick()
    assert images == {BUCKETS[0]}
    harness.made(BUCKETS[0])
    assert [harness.tick()[0] for _ in range(3)] == [set()] * 3


def test_prompts_that_change_under_a_run_wait_for_its_end_through_all_ticks(
    harness: AutomationHarness,
) -> None:
    harness.prompts("v1", *BUCKETS)
    harness.tick()
    harness.made(*BUCKETS)
    harness.tick()
    with harness.running(BUCKETS[0]):
        harness.prompts("v2", *BUCKETS[:2])
        assert harness.tick()[0] == {BUCKETS[1]}
        assert [harness.tick()[0] for _ in range(3)] == [set()] * 3
    assert harness.tick()[0] == {BUCKETS[0]}
    assert harness.tick()[0] == set()


def test_prompts_that_change_again_right_after_a_launch_are_launched_again(
    harness: AutomationHarness,
) -> None:
    harness.prompts("v1", *BUCKETS)
    harness.tick()
    harness.made(*BUCKETS)
    harness.tick()
    harness.prompts("v2", BUCKETS[1])
    assert harness.tick()[0] == {BUCKETS[1]}
    harness.prompts("v3", BUCKETS[1])
    assert harness.tick()[0] == {BUCKETS[1]}
    assert harness.tick()[0] == set()


def test_images_that_a_person_made_alone_get_their_manifest(harness: AutomationHarness) -> None:
    harness.prompts("v1", *BUCKETS)
    harness.tick()
    harness.made(*BUCKETS)
    harness.tick()
    harness.made(BUCKETS[0], manifest=False)
    assert harness.tick() == (set(), {BUCKETS[0]})


def test_a_carried_column_that_changes_makes_the_manifest_and_buys_nothing(
    harness: AutomationHarness,
) -> None:
    harness.prompts("v1", *BUCKETS)
    harness.tick()
    harness.made(*BUCKETS)
    harness.tick()
    harness.columns("others", BUCKETS[1])
    assert harness.tick() == (set(), {BUCKETS[1]})
    assert harness.tick() == NOTHING


def test_a_version_that_was_reported_already_launches_nothing(harness: AutomationHarness) -> None:
    harness.prompts("v1", *BUCKETS)
    harness.tick()
    harness.made(*BUCKETS)
    harness.prompts("v1", *BUCKETS)
    assert harness.tick() == NOTHING


def test_the_sensor_is_on_and_launches_the_two_assets_only(harness: AutomationHarness) -> None:
    sensor = build_automation_sensor(
        [harness.assets.images, harness.assets.image_manifest], name="krea_automation"
    )
    assert sensor.default_status is dg.DefaultSensorStatus.RUNNING
    graph = harness.defs.resolve_asset_graph()
    assert sensor.asset_selection.resolve(graph) == {
        harness.assets.images.key,
        harness.assets.image_manifest.key,
    }
