"""From a verdict to the accepted images: which partitions become stale."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.definitions.sensor_definition import SensorExecutionData
from dagster._core.loader import LoadingContextForTest

from krea_dagster.curation.accepted.accepted_table import ACCEPTED_COLUMNS
from krea_dagster.curation.accepted.quota import WantedImages
from krea_dagster.curation.accepted.rules import Rules
from krea_dagster.emulator import Emulator
from krea_dagster.errors import ConfigError
from krea_dagster.manifest import MANIFEST_SCHEMA
from tests.curation.accepted.quota_harness import QuotaProject, prompts_of
from tests.dagster_bench import OpenAccount, failure_text, latest, tick, values

PREFIX = "judged"
SENSOR = f"{PREFIX}_krea_verdicts"
VERSION = "dagster/data_version"
SAME = "There are no new verdicts."


@pytest.fixture(scope="module")
def project(
    tmp_path_factory: pytest.TempPathFactory,
    emulator: Emulator,
    open_account: OpenAccount,
    instance: dg.DagsterInstance,
) -> QuotaProject:
    """Six images in two partitions, bought, and taken as they are: there is no verdict."""
    prompts = prompts_of(6, PREFIX, num_images=1, campaign=["autumn"] * 6)
    folder = tmp_path_factory.mktemp(PREFIX)
    made = QuotaProject(folder, emulator, open_account(), prompts, WantedImages(1), Rules(), PREFIX)
    assert made.buy(instance).success
    assert made.accept(instance).success
    return made


class ReviewHarness:
    """The project's definitions, and the sensor from tick to tick."""

    def __init__(self, project: QuotaProject, instance: dg.DagsterInstance) -> None:
        self.project, self.instance = project, instance
        self.defs = project.defs
        self.cursor: str | None = None

    def tick(self) -> SensorExecutionData:
        outcome = tick(self.defs, self.instance, SENSOR, self.cursor)
        self.cursor = outcome.cursor
        return outcome

    def reported(self) -> set[str]:
        return {str(event.partition) for event in self.tick().asset_events}

    def stale(self, asset: str = "accepted_images") -> list[str]:
        """The partitions that Dagster's UI calls out of date."""
        resolver = CachingStaleStatusResolver(
            self.instance,
            self.defs.resolve_asset_graph(),
            LoadingContextForTest(self.instance),
        )
        key = dg.AssetKey([PREFIX, asset])
        return [
            partition
            for partition in self.project.partitions
            if resolver.get_status(key, partition) is StaleStatus.STALE
        ]


@pytest.fixture
def review(project: QuotaProject, instance: dg.DagsterInstance) -> ReviewHarness:
    return ReviewHarness(project, instance)


def home(project: QuotaProject, prompt_id: str) -> str:
    """The partition of a prompt."""
    (found,) = {row["partition_key"] for row in project.manifest() if row["prompt_id"] == prompt_id}
    return str(found)


# -- the story, told by one test: each goes on from the one before -----------------------------


def without_a_review_every_image_is_accepted_with_its_columns_and_the_tables(
    review: ReviewHarness, project: QuotaProject, instance: dg.DagsterInstance
) -> None:
    key = project.partitions[0]
    file = project.folder / "krea" / "accepted" / PREFIX / f"{key}.parquet"
    table = pq.read_table(file)
    manifest = pq.read_table(project.folder / "krea" / "manifest" / PREFIX / f"{key}.parquet")
    assert table.schema.names == [*MANIFEST_SCHEMA.names, "campaign", *ACCEPTED_COLUMNS]
    assert table.select(manifest.schema.names).equals(manifest)
    assert table["verdict"].null_count == table.num_rows
    shown = values(latest(instance, (PREFIX, "accepted_images"), key))
    assert shown["accepted"] == shown["dagster/partition_row_count"] == table.num_rows
    assert (shown["rejected"], shown["waiting"]) == (0, 0)
    assert shown["credits_per_accepted_image"] == 0.45
    assert Path(shown["path"]).samefile(file)


def the_runs_own_report_of_the_verdicts_leaves_nothing_stale_and_nothing_to_report(
    review: ReviewHarness, project: QuotaProject, instance: dg.DagsterInstance
) -> None:
    assert review.stale() == []
    assert review.reported() == set()
    assert review.tick().skip_message == SAME


def a_verdict_makes_its_own_partition_stale_and_no_other(
    review: ReviewHarness, project: QuotaProject, instance: dg.DagsterInstance
) -> None:
    review.tick()
    project.judge({("judged-000", 0): "reject"})
    touched = home(project, "judged-000")
    assert review.reported() == {touched}
    assert review.stale() == [touched]
    # Nothing that spends is asked for by it.
    assert review.stale("images") == review.stale("image_manifest") == []
    assert review.tick().skip_message == SAME
    result = project.accept(instance, [touched])
    assert result.success
    assert review.stale() == []
    shown = values(latest(instance, (PREFIX, "accepted_images"), touched))
    assert shown["rejected"] == 1
    reasons = [
        (row.data["reason"], row.data["rows"])
        for row in latest(instance, (PREFIX, "accepted_images"), touched)
        .metadata["krea/reasons"]
        .records  # type: ignore[attr-defined]
    ]
    assert ("rejected", 1) in reasons
    assert "judged-000" not in {row["prompt_id"] for row in project.accepted()}


def a_verdict_that_is_given_and_taken_at_once_leaves_nothing_stale(
    review: ReviewHarness, project: QuotaProject, instance: dg.DagsterInstance
) -> None:
    review.tick()
    project.judge({("judged-001", 0): "flag"})
    project.judge({("judged-001", 0): "none"})
    assert review.reported() == set()
    assert review.stale() == []


def a_run_that_is_launched_before_the_sensor_has_seen_the_verdicts_is_not_stale_after_it(
    review: ReviewHarness, project: QuotaProject, instance: dg.DagsterInstance
) -> None:
    review.tick()
    project.judge({("judged-002", 0): "keep"}, reviewer="ben")
    assert project.accept(instance, [home(project, "judged-002")]).success
    assert review.reported() == set()
    assert review.stale() == []
    (row,) = [row for row in project.accepted() if row["prompt_id"] == "judged-002"]
    assert (row["verdict"], row["reviewer"]) == ("keep", "ben")
    assert row["reviewed_at"] is not None


def from_rejected_to_replaced_to_accepted_again_as_lineage(
    review: ReviewHarness, project: QuotaProject, instance: dg.DagsterInstance
) -> None:
    graph = review.defs.resolve_asset_graph()

    def parents(asset: str) -> set[str]:
        found = graph.get(dg.AssetKey([PREFIX, asset])).parent_keys
        return {key.path[-1] for key in found}

    assert parents("accepted_images") == {"image_manifest", "verdicts"}
    assert parents("verdicts") == {"image_manifest"}
    assert parents("image_manifest") == {"images", "prompt_columns"}
    assert parents("images") == {"prompts"}
    touched = home(project, "judged-000")
    before = latest(instance, (PREFIX, "prompts"), touched).tags or {}
    old = {row["prompt_id"]: row for row in project.manifest()}
    # One run replaces what was rejected: its attempt is raised, so that the prompts change.
    assert project.buy(instance, [touched]).success
    new = {row["prompt_id"]: row for row in project.manifest()}
    assert new["judged-000"]["attempt"] == 1
    assert new["judged-000"]["image_sha256"] != old["judged-000"]["image_sha256"]
    for prompt_id in set(new) - {"judged-000"}:
        assert new[prompt_id]["task_id"] == old[prompt_id]["task_id"]
    after = latest(instance, (PREFIX, "prompts"), touched).tags or {}
    assert after[VERSION] != before[VERSION]
    assert review.stale() == [touched]
    assert review.stale("images") == []
    assert project.accept(instance, [touched]).success
    assert review.stale() == []
    review.tick()
    assert review.stale() == []
    (row,) = [row for row in project.accepted() if row["prompt_id"] == "judged-000"]
    assert row["image_sha256"] == new["judged-000"]["image_sha256"]
    # The refused image's price is part of what the accepted ones came to.
    shown = values(latest(instance, (PREFIX, "accepted_images"), touched))
    assert shown["images_bought"] == shown["accepted"] + 1
    cost = shown["images_bought"] * 0.45
    assert shown["credits"] == pytest.approx(cost)
    assert shown["credits_per_accepted_image"] == pytest.approx(cost / shown["accepted"], abs=1e-4)


def test_the_story_of_a_review(
    review: ReviewHarness, project: QuotaProject, instance: dg.DagsterInstance
) -> None:
    """One after the other: each goes on from where the one before it ended."""
    without_a_review_every_image_is_accepted_with_its_columns_and_the_tables(
        review, project, instance
    )
    the_runs_own_report_of_the_verdicts_leaves_nothing_stale_and_nothing_to_report(
        review, project, instance
    )
    a_verdict_makes_its_own_partition_stale_and_no_other(review, project, instance)
    a_verdict_that_is_given_and_taken_at_once_leaves_nothing_stale(review, project, instance)
    a_run_that_is_launched_before_the_sensor_has_seen_the_verdicts_is_not_stale_after_it(
        review, project, instance
    )
    from_rejected_to_replaced_to_accepted_again_as_lineage(review, project, instance)


def test_made_again_the_file_is_the_same_to_the_byte(
    project: QuotaProject, instance: dg.DagsterInstance
) -> None:
    files = sorted((project.folder / "krea" / "accepted" / PREFIX).glob("*.parquet"))
    before = [file.read_bytes() for file in files]
    assert project.accept(instance).success
    assert [file.read_bytes() for file in files] == before


def test_a_column_of_the_table_that_is_in_the_way_is_named(
    tmp_path: Path, emulator: Emulator, open_account: OpenAccount, instance: dg.DagsterInstance
) -> None:
    prompts = prompts_of(1, "taken", num_images=1, reviewer=["ann"])
    made = QuotaProject(
        tmp_path, emulator, open_account(), prompts, None, Rules(), "taken", "hash:1"
    )
    made.carry()
    with pytest.raises(ConfigError, match="column 'reviewer'"):
        made.outcomes()
    result = made.accept(instance)
    assert "rename it in the prompt table" in failure_text(result, "taken__accepted_images")


def write(folder: Path, kind: str, columns: dict[str, Sequence[object]]) -> None:
    target = folder / "krea" / kind / "rules" / "bucket-000.parquet"
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), target)


def test_measures_and_likeness_count_where_the_rules_name_them(
    tmp_path: Path, emulator: Emulator, open_account: OpenAccount
) -> None:
    rules = Rules.parse(["sharpness>=50"], one_of_duplicates=True)
    prompts = prompts_of(4, "rules", num_images=1)
    made = QuotaProject(tmp_path, emulator, open_account(), prompts, None, rules, "rules", "hash:1")
    made.carry()
    rows = sorted(made.manifest(), key=lambda row: str(row["prompt_id"]))
    assert made.outcomes() == {}
    # Nothing is measured yet.
    assert made.accepted() == []
    images = [row["image_sha256"] for row in rows]
    write(tmp_path, "measures", {"image_sha256": images, "sharpness": [90.0, 10.0, 90.0, 90.0]})
    pair = rows[2:]
    write(
        tmp_path,
        "near_duplicates",
        {
            "image_sha256": images[2:],
            "partition_key": [row["partition_key"] for row in pair],
            "prompt_id": [row["prompt_id"] for row in pair],
            "request_key": [row["request_key"] for row in pair],
            "sample": pa.array([0, 0], pa.int32()),
            "cluster": [images[2]] * 2,
            "keep": [True, False],
            "distance": pa.array([0, 5], pa.int32()),
        },
    )  # fmt: skip
    made.outcomes()
    assert {row["prompt_id"] for row in made.accepted()} == {"rules-000", "rules-002"}
    # The one to keep is rejected: the one like it takes its place.
    made.judge({("rules-002", 0): "reject"})
    made.outcomes()
    assert {row["prompt_id"] for row in made.accepted()} == {"rules-000", "rules-003"}
    made.rules = Rules.parse(["sharpnes>=50"])
    with pytest.raises(ConfigError, match="no column 'sharpnes'"):
        made.outcomes()
