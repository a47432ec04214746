"""The command's runs: a partition that needs none is left out, and every other one is run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow.parquet as pq
import pytest

from krea_dagster import BuyOptions, Krea, Settings
from krea_dagster.emulator import Emulator
from krea_dagster.engine.run.report import Progress
from krea_dagster.engine.verdict import Verdict
from krea_dagster.plugin.materialize import Materialized, materialize
from tests.dagster_bench import posts, write_table

BUCKETS = ("a", "b", "c")


class ProjectHarness:
    """Two rows in each of three partitions, and the command that materializes them."""

    def __init__(self, folder: Path, emulator: Emulator) -> None:
        self.folder = folder
        self.rows: dict[str, list[Any]] = {"prompt_id": [], "prompt": [], "bucket": []}
        for bucket in BUCKETS:
            for number in range(2):
                self.add_row(f"{bucket}{number}", bucket)
        self.settings = Settings(
            api_key="emulator",
            base_url=emulator.url,
            expected_latency_s=0.02,
            prompts=str(folder / "prompts.parquet"),
            partition_by="column:bucket",
            storage=str(folder / "krea"),
        )

    def add_row(self, prompt_id: str, bucket: str, prompt: str = "") -> None:
        for name, value in zip(self.rows, (prompt_id, prompt or prompt_id, bucket), strict=True):
            self.rows[name].append(value)
        write_table(self.folder / "prompts.parquet", self.rows)

    def remove_bucket(self, bucket: str) -> None:
        kept = [at for at, name in enumerate(self.rows["bucket"]) if name != bucket]
        self.rows = {name: [values[at] for at in kept] for name, values in self.rows.items()}
        write_table(self.folder / "prompts.parquet", self.rows)

    def materialize(
        self, partitions: Sequence[str] = (), options: BuyOptions | None = None
    ) -> Materialized:
        done = materialize(self.settings, partitions, options)
        assert not done.failures
        return done

    def run_partitions(self, done: Materialized) -> list[list[str]]:
        """Return the partitions whose images each run has materialized."""
        with dg.DagsterInstance.from_config(str(self.folder / "krea" / "dagster")) as instance:
            return [
                sorted(
                    str(one.partition)
                    for event in instance.all_logs(
                        run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION
                    )
                    if event.dagster_event is not None
                    and event.dagster_event.asset_key == dg.AssetKey("images")
                    and (one := event.asset_materialization) is not None
                )
                for run_id in done.run_ids
            ]

    def manifest(self, bucket: str) -> Path:
        return self.folder / "krea" / "manifest" / f"{bucket}.parquet"


class Listening:
    """Keeps what a run tells."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.told: list[Progress] = []

    def say(self, line: str) -> None:
        self.said.append(line)

    def doing(self, what: str) -> None:
        self.said.append(f"({what})")

    def progress(self, progress: Progress) -> None:
        self.told.append(progress)


def test_a_run_says_what_it_does_from_the_quote_to_the_place_of_its_files(
    project: ProjectHarness,
) -> None:
    listener = Listening()
    materialize(project.settings, listener=listener)
    lines = [line for line in listener.said if not line.startswith("(")]
    first, last = lines
    assert first == "6 images in 3 partitions: 0 stored already, 6 to buy for at most 2.7 credits."
    root = project.folder / "krea"
    assert last.startswith("6 of 6 images ended: 6 delivered, 0 reused. 2.7 credits, ")
    assert last.endswith(f"Images are in {root}/images, manifests in {root}/manifest.")
    # Phases without a purchase have a name, so that none of them is silent.
    phases = [line for line in listener.said if line not in lines]
    assert phases[1:4] == [
        "(reading the prompt table)",
        "(comparing the prompts with the journal and the stored images)",
        "(reading what became of each partition)",
    ]
    assert "(making the manifests)" in phases
    assert "(2 of 3 manifests written)" in phases
    assert "(comparing the manifests with the files)" in phases


@pytest.fixture
def project(tmp_path: Path, emulator: Emulator) -> ProjectHarness:
    return ProjectHarness(tmp_path, emulator)


def test_with_nothing_to_do_no_run_is_launched_and_all_images_count_as_reused(
    project: ProjectHarness, emulator: Emulator
) -> None:
    first = project.materialize()
    assert project.run_partitions(first) == [list(BUCKETS)]
    before = posts(emulator)
    listener = Listening()
    again = materialize(project.settings, listener=listener)
    assert (again.run_ids, again.missing.num_rows, posts(emulator)) == ([], 0, before)
    assert (again.progress.total, again.progress.reused) == (6, 6)
    assert list(again.partitions) == list(BUCKETS)
    assert listener.told == [again.progress]


def test_a_partition_that_is_named_is_run_also_with_nothing_to_do(project: ProjectHarness) -> None:
    project.materialize()
    assert project.run_partitions(project.materialize(["b"])) == [["b"]]


def test_only_the_partitions_from_the_first_to_the_last_with_something_to_do_are_run(
    project: ProjectHarness,
) -> None:
    """Those in between are run with them, because more runs would take longer."""
    project.materialize()
    project.add_row("c2", "c")
    done = project.materialize()
    assert project.run_partitions(done) == [["c"]]
    assert (done.progress.total, done.progress.reused, done.progress.delivered) == (7, 6, 1)
    project.add_row("a2", "a")
    project.add_row("c3", "c")
    done = project.materialize()
    assert project.run_partitions(done) == [["a", "b", "c"]]
    assert (done.progress.total, done.progress.reused, done.progress.delivered) == (9, 7, 2)


def test_a_missing_row_is_asked_for_in_every_run(project: ProjectHarness) -> None:
    project.add_row("refused", "b", "[emulator: refuse] this")
    for _ in range(2):
        done = project.materialize()
        assert done.missing["prompt_id"].to_pylist() == ["refused"]
        assert "b" in project.run_partitions(done)[0]


def test_only_the_partitions_of_rows_that_are_regenerated_are_run(
    project: ProjectHarness, emulator: Emulator
) -> None:
    project.materialize()
    before = posts(emulator)
    done = project.materialize(options=BuyOptions(regenerate=["b1"]))
    assert posts(emulator) == before + 1
    assert project.run_partitions(done) == [["b"]]
    assert (done.progress.total, done.progress.reused, done.progress.delivered) == (6, 5, 1)


def test_only_the_partition_of_a_rejected_image_is_run(
    project: ProjectHarness, emulator: Emulator
) -> None:
    project.materialize()
    before = posts(emulator)
    row = pq.read_table(project.manifest("c")).to_pylist()[0]
    named = (row["request_key"], row["prompt_id"], row["sample"], row["attempt"], "c")
    with Krea(project.settings).open_journal() as journal:
        journal.verdicts.add([Verdict("v", row["image_sha256"], "reject", "ann", *named)])
    done = project.materialize(options=BuyOptions(regenerate=["rejected"]))
    assert posts(emulator) == before + 1
    assert project.run_partitions(done) == [["c"]]


@pytest.mark.parametrize("rows", ["rejected", "pruned", "error:content_policy_violation"])
def test_a_keyword_that_selects_no_row_is_said_and_launches_no_run(
    project: ProjectHarness, emulator: Emulator, rows: str
) -> None:
    project.materialize()
    before, listener = posts(emulator), Listening()
    done = materialize(project.settings, options=BuyOptions(regenerate=[rows]), listener=listener)
    assert f"Note: --again {rows} selects no row." in listener.said
    assert (done.run_ids, posts(emulator)) == ([], before)


def test_a_row_that_failed_is_bought_again_by_its_error_code(
    project: ProjectHarness, emulator: Emulator
) -> None:
    """Its partition is never finished, so that no option has to say so."""
    project.add_row("refused", "b", "[emulator: refuse] this")
    code = project.materialize().missing["error_code"][0].as_py()
    before = posts(emulator)
    done = project.materialize(options=BuyOptions(retry_errors=[code]))
    assert project.run_partitions(done) == [["b"]]
    assert posts(emulator) == before + 1


def test_a_partition_whose_files_are_not_as_they_should_be_is_run(project: ProjectHarness) -> None:
    project.materialize()
    manifest = project.manifest("b")
    before = pq.read_table(manifest)
    image = Path(before["image_path"][0].as_py())
    for lose in (
        image.unlink,
        manifest.unlink,
        lambda: pq.write_table(before.slice(1), manifest),
    ):
        lose()
        assert project.run_partitions(project.materialize()) == [["b"]]
        assert image.exists()
        assert pq.read_table(manifest)["prompt_id"].to_pylist() == ["b0", "b1"]


def test_a_passthrough_column_that_changed_is_written_by_a_run(project: ProjectHarness) -> None:
    for notes, changed in (
        (["old"] * 6, list(BUCKETS)),
        ([*["old"] * 3, "new", "old", "old"], ["b"]),
    ):
        project.rows["note"] = notes
        write_table(project.folder / "prompts.parquet", project.rows)
        assert project.run_partitions(project.materialize()) == [changed]


def test_images_that_were_delivered_without_dagster_are_shown_in_dagster_by_a_run(
    project: ProjectHarness,
) -> None:
    """Until then the last materialization says that a row is missing."""
    project.add_row("b2", "b", "[emulator: fail content_policy_violation once] a boat")
    (code,) = project.materialize().missing["error_code"].to_pylist()
    Krea(project.settings).run(options=BuyOptions(retry_errors=[code]))
    assert project.run_partitions(project.materialize()) == [["b"]]


def test_the_manifest_of_a_partition_that_left_the_table_is_left_out(
    project: ProjectHarness,
) -> None:
    """By the command, also if no partition needs a run, and by a run of another partition."""
    project.materialize()
    project.remove_bucket("c")
    assert project.materialize().run_ids == []
    assert [project.manifest(bucket).exists() for bucket in BUCKETS] == [True, True, False]
    project.remove_bucket("b")
    assert len(project.materialize(["a"]).run_ids) == 1
    assert [project.manifest(bucket).exists() for bucket in BUCKETS] == [True, False, False]
    assert sorted(Krea(project.settings).earlier()["prompt_id"]) == ["b0", "b1", "c0", "c1"]
