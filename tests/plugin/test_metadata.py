"""What a materialization shows: money, failures, lineage, links; small, and without a secret."""

from __future__ import annotations

import io
import os
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, cast

import dagster as dg
import pyarrow as pa
import pytest
from dagster_shared.serdes import serialize_value
from PIL import Image

from krea_dagster.application.manifest_summary import ManifestSummary, StoredFile
from krea_dagster.curation.thumbnails import Thumbnails
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.manifest import MANIFEST_SCHEMA
from krea_dagster.plugin.metadata import (
    contact_sheet,
    images_metadata,
    krea_entry,
    krea_metadata,
    location_value,
    manifest_metadata,
    missing_table,
    prompts_lineage,
    table_schema,
)
from tests.dagster_bench import latest, values
from tests.plugin.bought_run import BUCKETS, PREFIX, BoughtRun

NOW = datetime(2026, 11, 2, 12, tzinfo=timezone.utc)
#: Takes twelve bytes in Dagster's database, where it is written as two escapes.
HERON = "\N{OWL}"


def row(number: int, **different: Any) -> dict[str, Any]:
    plain = {
        "prompt_id": f"row-{number:04d}",
        "sample": 0,
        "request_key": f"{number:064x}",
        "partition_key": "a",
        "status": "stored",
        "credits_reserved": 0.45,
        "credits_charged": 0.45,
        "submitted_at": NOW + timedelta(seconds=number),
        "completed_at": NOW + timedelta(seconds=number + 8),
        "stored_at": NOW + timedelta(seconds=number + 9),
        "reused": False,
    }
    return {**plain, **different}


def failed(number: int, **different: Any) -> dict[str, Any]:
    nothing = {"completed_at": None, "stored_at": None, "credits_charged": 0.0}
    said = {"error_code": "content_policy_violation", "error_message": f"why {number}"}
    return row(number, **{**nothing, **said, "status": "failed", **different})


def figures(rows: list[dict[str, Any]]) -> ManifestSummary:
    return ManifestSummary.of(pa.Table.from_pylist(rows, MANIFEST_SCHEMA))


def shown(rows: list[dict[str, Any]], storage: Storage) -> dict[str, Any]:
    return dict(images_metadata(figures(rows), storage, seconds=1.0))


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


# -- money ------------------------------------------------------------------------------------


def test_what_the_rows_cost_is_told_apart_from_what_this_run_spent(storage: Storage) -> None:
    rows = [row(0), row(1), row(2, reused=True), row(3, reused=True), failed(4)]
    twin = row(1, prompt_id="twin")  # shares the purchase of row 1
    told = shown([*rows, twin], storage)
    assert told["credits_charged"] == pytest.approx(4 * 0.45)
    assert told["credits_spent_by_run"] == pytest.approx(2 * 0.45)
    # Three rows did not have to be bought: two of an earlier run, and the twin.
    assert told["credits_saved_by_reuse"] == pytest.approx(3 * 0.45)


def test_a_real_runs_spending_adds_up(
    bought_run: BoughtRun, instance_on_disk: dg.DagsterInstance
) -> None:
    first = bought_run.result.asset_materializations_for_node(f"{PREFIX}__images")
    told = {str(one.partition): values(one) for one in first}
    for bucket in BUCKETS:
        assert told[bucket]["credits_spent_by_run"] == told[bucket]["credits_charged"] > 0
        manifest = values(latest(instance_on_disk, (PREFIX, "image_manifest"), bucket))
        assert manifest["credits_charged"] == told[bucket]["credits_charged"]


# -- failures ---------------------------------------------------------------------------------


def test_the_newest_twenty_failures_are_a_table(storage: Storage) -> None:
    rows = [failed(n) for n in range(30)] + [row(n) for n in range(100, 110)]
    rows += [failed(50, status="refused", submitted_at=None), row(51, status="deferred")]
    table = shown(rows, storage)["newest_failures"]
    assert isinstance(table, dg.TableMetadataValue)
    assert [one.data["prompt_id"] for one in table.records] == [
        f"row-{n:04d}" for n in range(29, 9, -1)
    ]
    assert table.records[0].data == {
        "prompt_id": "row-0029",
        "sample": 0,
        "status": "failed",
        "error_code": "content_policy_violation",
        "message": "why 29",
        "at": "2026-11-02 12:00:29 UTC",
    }


def test_failures_that_evolink_never_took_come_last_and_two_partitions_are_merged() -> None:
    one = figures([failed(1, status="refused", submitted_at=None), failed(2), failed(5)])
    both = one + figures([failed(3)])
    assert [found["prompt_id"] for found in both.failures] == [
        "row-0005", "row-0003", "row-0002", "row-0001",
    ]  # fmt: skip


def test_without_a_failure_there_is_no_table(storage: Storage) -> None:
    assert "newest_failures" not in shown([row(0), row(1, status="deferred")], storage)


# -- lineage and schema -----------------------------------------------------------------------


def test_the_lineage_leads_to_the_columns_of_the_prompt_table() -> None:
    schema = pa.schema([*MANIFEST_SCHEMA, ("mood", pa.string())])
    prompts = dg.AssetKey(["art", "prompts"])
    found = prompts_lineage(schema, prompts).deps_by_column
    lineage = {name: [(one.asset_key, one.column_name) for one in found[name]] for name in found}
    same = ("prompt_id", "prompt", "size", "quality", "seed", "nsfw_check", "mood")
    assert lineage == {
        **{name: [(prompts, name)] for name in same},
        "sample": [(prompts, "num_images")],
    }  # fmt: skip


def test_a_schema_of_very_many_columns_says_how_many_it_leaves_out() -> None:
    further = [
        (f"{HERON * 50}{n}", pa.struct([(f"x{i}", pa.int8()) for i in range(99)]))
        for n in range(900)
    ]
    schema = table_schema(pa.schema([*MANIFEST_SCHEMA, *further]))  # fmt: skip
    assert [column.name for column in schema.columns][:30] == MANIFEST_SCHEMA.names
    assert schema.constraints.other == [f"and {930 - len(schema.columns)} more columns"]
    whole = table_schema(pa.schema([*MANIFEST_SCHEMA, ("mood", pa.string())]))
    assert (len(whole.columns), whole.constraints.other) == (31, [])


# -- size -------------------------------------------------------------------------------------


def written(metadata: Any) -> int:
    """Bytes that a materialization with this metadata takes in Dagster's database."""
    return len(serialize_value(dg.AssetMaterialization("images", metadata=metadata)).encode())


def test_the_worst_materialization_stays_under_100_kb(storage: Storage) -> None:
    """Long prompts and ids, 200 failures with long messages, a sheet of pure noise, 900 columns."""
    image = Image.frombytes("RGB", (512, 512), os.urandom(3 * 512 * 512))
    storage.write("images/no/noise.png", lambda file: image.save(file, "PNG"))
    path = storage.locate("images/no/noise.png")
    long = HERON * 2_000
    rows = [
        failed(n, prompt_id=f"{n}-{long}", prompt=long, error_code=long, error_message=long)
        for n in range(200)
    ]
    rows += [row(n, prompt_id=f"{n}-{long}", prompt=long, image_path=path) for n in range(200, 230)]
    of_images = shown(rows, storage)
    assert len(of_images["thumbnails"].value) > 20_000  # the sheet is there
    assert of_images["newest_failures"].records
    assert written(of_images) < 100_000
    further = [(f"{HERON * 50}{n}", pa.string()) for n in range(900)]
    schema = pa.schema([*MANIFEST_SCHEMA, *further])
    of_manifest = {
        **manifest_metadata(figures(rows), path),
        "dagster/column_schema": table_schema(schema),
        "dagster/column_lineage": prompts_lineage(schema, dg.AssetKey(["art", "prompts"])),
    }
    assert written(of_manifest) < 100_000
    assert written({"missing": missing_table(figures(rows))}) < 100_000


def test_a_usual_manifest_shows_all_its_columns_and_their_lineage() -> None:
    further = [(f"attribute_{n:02d}", pa.string()) for n in range(60)]
    schema = pa.schema([*MANIFEST_SCHEMA, *further])
    assert len(table_schema(schema).columns) == 90
    assert len(prompts_lineage(schema, dg.AssetKey("prompts")).deps_by_column) == 67


# -- links ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("location", "told"),
    [
        ("/data/a@b?c", "/data/a@b?c"),
        ("s3://key:s3cret@bucket/krea", "s3://bucket/krea"),
        ("https://host/p.parquet?X-Amz-Signature=s3cret", "https://host/p.parquet"),
    ],
)
def test_no_user_password_or_signature_of_a_url_is_shown(location: str, told: str) -> None:
    value = location_value(location).value
    assert value == told
    assert "s3cret" not in str(value)


def test_the_storage_is_a_link_where_a_browser_can_follow_it(storage: Storage) -> None:
    link = shown([row(0)], storage)["storage"]
    assert isinstance(link, dg.PathMetadataValue)
    assert link.value == storage.locate("")
    assert isinstance(location_value("https://host/krea"), dg.UrlMetadataValue)
    assert isinstance(location_value("s3://bucket/krea"), dg.PathMetadataValue)


def test_a_materialization_tells_dagster_its_row_count(storage: Storage) -> None:
    assert shown([row(0), failed(1)], storage)["dagster/partition_row_count"] == 2


def noise(storage: Storage, count: int, *, side: int, files: int) -> pa.Table:
    """Return rows of stored noise images, the worst case for JPEG, that share some files."""
    names = [f"images/no/noise-{number % files}.png" for number in range(count)]
    for name in names[:files]:
        image = Image.frombytes("RGB", (side, side), os.urandom(3 * side * side))
        storage.write(name, lambda file, image=image: image.save(file, "PNG"))  # type: ignore[misc]  # mypy cannot infer a lambda with a default
    rows = [
        {
            "prompt_id": f"{number:05d}-{'x' * 100}",
            "request_key": f"{number:064x}",
            "status": "stored",
            "reused": False,
            "image_path": storage.locate(name),
        }
        for number, name in enumerate(names)
    ]
    return pa.Table.from_pylist(rows, MANIFEST_SCHEMA)


def test_a_sheet_stays_small_for_any_images(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    table = noise(storage, 2_000, side=1024, files=1)
    sheet = contact_sheet(ManifestSummary.of(table).shown, storage)
    assert sheet is not None
    assert len(sheet) <= 45_000
    shown = images_metadata(ManifestSummary.of(table), storage, seconds=1.0)
    assert len(shown["thumbnails"].value) < 65_000


def test_a_damaged_image_is_left_out_of_the_sheet_and_does_not_fail_the_run(
    tmp_path: Path,
) -> None:
    storage = Storage(str(tmp_path))
    table = noise(storage, 5, side=64, files=5)
    # In the signature, in the length of the pixels' chunk, and in the pixels.
    for number, at, damage in ((0, 4, b"?"), (1, 33, b"\0\0\0\x40"), (2, 60, bytes(20))):
        path = tmp_path / f"images/no/noise-{number}.png"
        data = bytearray(path.read_bytes())
        data[at : at + len(damage)] = damage
        path.write_bytes(data)
    (tmp_path / "images/no/noise-3.png").unlink()
    assert contact_sheet(ManifestSummary.of(table).shown, storage) is not None


def test_a_sheet_shows_kept_thumbnails_of_the_files_that_exist(tmp_path: Path) -> None:
    storage, sha256 = Storage(str(tmp_path)), "ab" * 32
    storage.write(
        "images/ab/a.png", lambda file: Image.new("RGB", (64, 64), "red").save(file, "PNG")
    )
    files = [StoredFile(storage.locate("images/ab/a.png"), sha256)]
    assert colour_of(contact_sheet(files, storage)) == "red"
    Thumbnails(storage).add(sha256, Image.new("RGB", (64, 64), "blue"))
    assert colour_of(contact_sheet(files, storage)) == "blue", "the file is not decoded again"
    (kept,) = (tmp_path / "thumbnails").rglob("*.jpg")
    kept.write_bytes(b"\xff\xd8 damaged \xff\xd9")
    assert colour_of(contact_sheet(files, storage)) == "red"
    storage.remove("images/ab/a.png")
    assert contact_sheet(files, storage) is None


def colour_of(sheet: bytes | None) -> str:
    assert sheet is not None
    red, _, blue = cast("tuple[int, int, int]", Image.open(io.BytesIO(sheet)).getpixel((38, 38)))
    return "red" if red > blue else "blue"


def test_without_a_single_image_there_is_no_sheet(tmp_path: Path) -> None:
    assert contact_sheet([], Storage(str(tmp_path))) is None


# -- names and order --------------------------------------------------------------------------


def test_thumbnails_come_first_and_what_is_nothing_is_left_out(storage: Storage) -> None:
    told = shown([row(0, reused=True), row(1, reused=True)], storage)
    assert list(told) == [
        *(["thumbnails"] if "thumbnails" in told else []),
        "images_bought", "images_reused", "credits_spent_by_run", "credits_charged",
        "credits_saved_by_reuse", "rows", "rows_stored", "storage", "dagster/partition_row_count",
    ]  # fmt: skip


def test_entries_have_the_prefix_of_the_package_except_those_of_dagster() -> None:
    values = {"rows": 1, "dagster/row_count": 1}
    assert krea_metadata(values) == {"krea/rows": 1, "dagster/row_count": 1}


@pytest.mark.parametrize("name", ["krea/rows", "rows"])
def test_an_entry_is_also_found_as_earlier_versions_stored_it(name: str) -> None:
    assert krea_entry({name: 7}, "rows") == 7
    assert krea_entry({}, "rows") is None
