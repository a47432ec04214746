"""A run of ``images`` and ``image_manifest``: one step for a range, metadata per partition."""

from __future__ import annotations

import base64
import io
import re
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from krea_dagster import KreaResource, PromptTable, build_krea_assets
from krea_dagster.application.manifest_summary import ManifestSummary
from krea_dagster.application.purchase import buy
from krea_dagster.emulator import Emulator
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.manifest import MANIFEST_SCHEMA
from krea_dagster.plugin.metadata import images_metadata
from krea_dagster.prompts import parse_partition_by
from tests.dagster_bench import bought, check_of, latest, posts, run_job, values
from tests.plugin.bought_run import BUCKETS, MARKER, PREFIX, BoughtRun

IMAGES = (PREFIX, "images")
MANIFEST = (PREFIX, "image_manifest")
#: The partition in which nothing fails.
WHOLE = BUCKETS[0]
DATA_URI = "![images](data:image/jpeg;base64,"


def manifest(bought_run: BoughtRun, bucket: str) -> pa.Table:
    return pq.read_table(bought_run.storage / "manifest" / PREFIX / f"{bucket}.parquet")


# -- one run, two partitions ------------------------------------------------------------------


def test_a_range_of_partitions_is_one_step_and_each_partition_is_materialized(
    bought_run: BoughtRun,
) -> None:
    steps = [event.step_key for event in bought_run.result.all_events if event.is_step_start]
    for step in (f"{PREFIX}__images", f"{PREFIX}__image_manifest"):
        assert steps.count(step) == 1
        done = bought_run.result.asset_materializations_for_node(step)
        assert sorted(str(one.partition) for one in done) == list(BUCKETS)


@pytest.mark.parametrize("bucket", BUCKETS)
def test_a_manifest_holds_the_rows_of_its_own_partition_in_the_tables_order(
    bought_run: BoughtRun, bucket: str
) -> None:
    table = manifest(bought_run, bucket)
    assert list(dict.fromkeys(table["prompt_id"].to_pylist())) == bought_run.ids(bucket)
    assert set(table["partition_key"].to_pylist()) == {bucket}


@pytest.mark.parametrize("bucket", BUCKETS)
def test_the_metadata_of_a_partition_counts_its_own_rows_by_status(
    bought_run: BoughtRun, instance_on_disk: dg.DagsterInstance, bucket: str
) -> None:
    shown = values(latest(instance_on_disk, IMAGES, bucket))
    table = manifest(bought_run, bucket)
    counts = Counter(table["status"].to_pylist())
    assert shown["rows"] == table.num_rows
    assert {name: shown[name] for name in shown if name.startswith("rows_")} == {
        f"rows_{status}": count for status, count in counts.items()
    }
    assert shown["images_bought"] == counts["stored"]
    assert shown["images_reused"] == 0


def test_the_credits_of_all_partitions_are_what_the_account_was_charged(
    bought_run: BoughtRun, instance_on_disk: dg.DagsterInstance, emulator: Emulator
) -> None:
    shown = [values(latest(instance_on_disk, IMAGES, bucket)) for bucket in BUCKETS]
    account = emulator.world.account(bought_run.api_key)
    assert account is not None
    # 10 plain, 2 of other shapes, 2 of a pair, and the twins, who are one purchase. What failed
    # or was refused is not charged.
    assert account.charged == (10 + 2 + 2 + 1) * 4500
    # Each twin's partition shows what its image cost.
    assert sum(one["credits_charged"] for one in shown) == pytest.approx(
        account.charged / 10_000 + 0.45
    )


def test_two_rows_with_the_same_request_are_bought_once_and_both_get_it(
    bought_run: BoughtRun, emulator: Emulator
) -> None:
    assert len(bought(emulator, f"the twins {MARKER}")) == 1
    both = pa.concat_tables([manifest(bought_run, bucket) for bucket in BUCKETS])
    twins = [row for row in both.to_pylist() if row["prompt_id"].startswith("twin")]
    assert len(twins) == 2
    assert len({row["image_path"] for row in twins}) == 1


def test_one_purchase_for_two_rows_of_a_partition_counts_once_in_its_credits(
    bought_run: BoughtRun,
) -> None:
    rows = [
        row for row in manifest(bought_run, BUCKETS[0]).to_pylist() if row["status"] == "stored"
    ]
    doubled = pa.Table.from_pylist([rows[0], {**rows[0], "prompt_id": "its-twin"}], MANIFEST_SCHEMA)
    shown = images_metadata(
        ManifestSummary.of(doubled), Storage(str(bought_run.storage)), seconds=1.0
    )
    assert (shown["rows"], shown["credits_charged"]) == (2, rows[0]["credits_charged"])


@pytest.mark.parametrize("bucket", BUCKETS)
def test_latencies_are_those_of_the_partitions_tasks(
    bought_run: BoughtRun, instance_on_disk: dg.DagsterInstance, bucket: str
) -> None:
    shown = values(latest(instance_on_disk, IMAGES, bucket))
    rows = manifest(bought_run, bucket).to_pylist()
    seconds = [
        (row["completed_at"] - row["submitted_at"]).total_seconds()
        for row in rows
        if row["status"] == "stored"
    ]
    assert min(seconds) <= shown["latency_p50_s"] + 0.001
    assert shown["latency_p50_s"] <= shown["latency_p95_s"] <= max(seconds) + 0.001
    assert shown["images_per_second"] > 0


def test_the_manifest_shows_its_path_its_schema_and_its_row_count(
    bought_run: BoughtRun, instance_on_disk: dg.DagsterInstance
) -> None:
    materialization = latest(instance_on_disk, MANIFEST, BUCKETS[0])
    table = manifest(bought_run, BUCKETS[0])
    assert Path(values(materialization)["path"]).samefile(
        bought_run.storage / "manifest" / PREFIX / f"{BUCKETS[0]}.parquet"
    )
    assert values(materialization)["dagster/partition_row_count"] == table.num_rows
    schema = materialization.metadata["dagster/column_schema"].value
    assert isinstance(schema, dg.TableSchema)
    assert [column.name for column in schema.columns] == table.schema.names
    assert all(column.description for column in schema.columns)


def test_the_log_says_what_will_be_bought_and_how_it_ended(
    bought_run: BoughtRun, instance_on_disk: dg.DagsterInstance
) -> None:
    lines = [entry.user_message for entry in instance_on_disk.all_logs(bought_run.result.run_id)]
    (first,) = [line for line in lines if " stored already, " in line]
    assert re.fullmatch(
        r"\d+ images in 2 partitions: 0 stored already, \d+ to buy in \d+ purchases for at most "
        r"[\d.]+ credits\.",
        first,
    )
    (last,) = [line for line in lines if " images ended: " in line]
    assert f"Images are in {bought_run.storage}/images" in last
    assert lines.index(first) < lines.index(last)


# -- thumbnails -------------------------------------------------------------------------------


@pytest.mark.parametrize("bucket", BUCKETS)
def test_the_thumbnails_are_a_jpeg_that_a_browser_can_decode(
    bought_run: BoughtRun, instance_on_disk: dg.DagsterInstance, bucket: str
) -> None:
    text = values(latest(instance_on_disk, IMAGES, bucket))["thumbnails"]
    assert text.startswith(DATA_URI)
    data = base64.b64decode(text.removeprefix(DATA_URI).removesuffix(")"), validate=True)
    with Image.open(io.BytesIO(data)) as sheet:
        sheet.load()
        assert sheet.format == "JPEG"
        assert len(sheet.getcolors(2**24) or []) > 100  # there are images on it


def test_each_bought_image_has_a_kept_thumbnail(bought_run: BoughtRun) -> None:
    hashes = {
        row["image_sha256"]
        for bucket in BUCKETS
        for row in manifest(bought_run, bucket).to_pylist()
        if row["status"] == "stored"
    }
    kept = {path.name for path in (bought_run.storage / "thumbnails").rglob("*") if path.is_file()}
    assert kept == {f"{sha256}-384.jpg" for sha256 in hashes}


def test_a_materialization_is_under_100_kb_in_dagsters_database(
    bought_run: BoughtRun, dagster_home: Path
) -> None:
    sizes = []
    for run in dagster_home.glob(f"history/runs/{bought_run.result.run_id}.db"):
        with closing(sqlite3.connect(run)) as database:
            sizes += [
                size
                for (size,) in database.execute(
                    "SELECT length(event) FROM event_logs "
                    "WHERE dagster_event_type = 'ASSET_MATERIALIZATION'"
                )
            ]
    assert len(sizes) == 4
    assert max(sizes) < 100_000


# -- the check --------------------------------------------------------------------------------


def test_undelivered_rows_fail_the_check_by_name_and_the_run_succeeds_all_the_same(
    bought_run: BoughtRun,
) -> None:
    assert bought_run.result.success
    check = check_of(bought_run.result)
    assert not check.passed
    assert check.severity is dg.AssetCheckSeverity.ERROR
    assert check.description == (
        "2 of 18 rows have no image: 1 × refused: content_policy_violation; "
        "1 × failed: content_policy_violation"
    )
    table = check.metadata["missing"]
    assert isinstance(table, dg.TableMetadataValue)
    missing = {record.data["prompt_id"]: record.data for record in table.records}
    assert set(missing) == {"refused-00", "failed-00"}
    assert missing["failed-00"]["status"] == "failed"
    assert missing["refused-00"]["error_message"]


def test_the_check_passes_where_every_row_has_its_image_and_a_repeated_run_buys_nothing(
    bought_run: BoughtRun, instance_on_disk: dg.DagsterInstance, emulator: Emulator
) -> None:
    before = posts(emulator)
    result = run_job(bought_run.defs, instance_on_disk, WHOLE, job=f"{PREFIX}_krea_images")
    check = check_of(result)
    assert (result.success, check.passed) == (True, True)
    assert posts(emulator) == before
    shown = values(result.asset_materializations_for_node(f"{PREFIX}__images")[0])
    assert (shown["images_bought"], shown["images_reused"]) == (0, shown["rows"])
    assert "latency_p50_s" not in shown


# -- how they are built -----------------------------------------------------------------------


def test_a_range_is_one_run_by_default_and_several_where_workers_share_it(
    tmp_path: Path,
) -> None:
    table = PromptTable(str(tmp_path / "prompts.parquet"), parse_partition_by("hash:4"))
    assets = build_krea_assets(table)
    assert assets.images.backfill_policy == dg.BackfillPolicy.single_run()
    shared = build_krea_assets(table, backfill_policy=dg.BackfillPolicy.multi_run(2))
    for asset in (shared.images, shared.image_manifest):
        assert asset.backfill_policy == dg.BackfillPolicy.multi_run(2)


def test_a_resource_of_another_kind_is_told_at_once(
    bought_run: BoughtRun, instance_on_disk: dg.DagsterInstance
) -> None:
    class Other(dg.ConfigurableResource[None]):
        name: str = ""

    table = PromptTable(
        str(bought_run.storage.parent / "prompts.parquet"), parse_partition_by("hash:2")
    )
    assets = build_krea_assets(table, key_prefix="other")
    defs = dg.Definitions(
        assets=[assets.prompts, assets.images],
        jobs=[dg.define_asset_job("other", selection=[assets.images])],
        resources={"krea": Other()},
    )
    result = run_job(defs, instance_on_disk, BUCKETS[0], job="other")
    assert not result.success
    (failed,) = result.get_step_failure_events()
    error = failed.step_failure_data.user_failure_data
    assert error is not None
    assert error.description == "resource 'krea' is a Other, not a KreaResource"


def test_the_resource_finds_nothing_to_do_in_an_empty_partition(
    tmp_path: Path, emulator: Emulator
) -> None:
    krea = KreaResource(
        api_key="emulator", base_url=emulator.url, expected_latency_s=0.02, storage=str(tmp_path)
    )
    before = posts(emulator)
    report = buy(krea.krea(), [], run_id="nothing")
    assert (report.progress.total, posts(emulator)) == (0, before)
