"""The manifest: a row per requested image that agrees with its file, the journal and the server."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from krea_dagster import PromptTable
from krea_dagster.application.krea import Krea
from krea_dagster.application.purchase import buy
from krea_dagster.application.settings import Settings
from krea_dagster.emulator import Emulator
from krea_dagster.engine.journal.bulk_reads import RECORD_SCHEMA
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.manifest import (
    DESCRIPTIONS,
    MANIFEST_SCHEMA,
    Manifests,
    has_manifest,
    manifest_name,
    manifest_parts,
    manifest_schema,
    manifest_table,
    read_manifests,
    read_missing,
    write_manifest,
    write_manifest_parts,
)
from krea_dagster.models import PIXELS
from krea_dagster.prompts import RECOGNISED_COLUMNS, RESERVED_COLUMNS, Plan, parse_partition_by
from tests.dagster_bench import wanted
from tests.prompts.reference import images_of

RUN = "run-that-bought"
KEY = "bucket-000"

#: The contract with everybody who reads manifests: these columns, these types, this order.
COLUMNS = [
    ("prompt_id", pa.string()),
    ("sample", pa.int32()),
    ("prompt", pa.string()),
    ("model", pa.string()),
    ("size", pa.string()),
    ("quality", pa.string()),
    ("seed", pa.int32()),
    ("nsfw_check", pa.bool_()),
    ("attempt", pa.int32()),
    ("request_key", pa.string()),
    ("partition_key", pa.string()),
    ("status", pa.string()),
    ("task_id", pa.string()),
    ("image_path", pa.string()),
    ("image_sha256", pa.string()),
    ("image_bytes", pa.int64()),
    ("image_format", pa.string()),
    ("width", pa.int32()),
    ("height", pa.int32()),
    ("credits_reserved", pa.float64()),
    ("credits_charged", pa.float64()),
    ("billing_rule", pa.string()),
    ("user_group", pa.string()),
    ("submitted_at", pa.timestamp("us", tz="UTC")),
    ("completed_at", pa.timestamp("us", tz="UTC")),
    ("stored_at", pa.timestamp("us", tz="UTC")),
    ("reused", pa.bool_()),
    ("run_id", pa.string()),
    ("error_code", pa.string()),
    ("error_message", pa.string()),
]


def prompt_rows() -> list[dict[str, Any]]:
    """Rows that end in every way that a first run can end in."""

    def row(prompt_id: str, text: str = "", **wishes: Any) -> dict[str, Any]:
        wanted = {"size": "1:1", "quality": "1K", "seed": None, "num_images": 1, **wishes}
        return {"prompt_id": prompt_id, "prompt": f"{prompt_id} {text}".strip(), **wanted}

    rows = [row("wide", size="16:9"), row("tall", size="9:16"), row("narrow", size="1:2")]
    rows += [row("three", num_images=3), row("seeded", seed=77)]
    twin = {"prompt": "the very same", "seed": 5}
    rows += [{**row("twin-a"), **twin}, {**row("twin-b"), **twin}]
    rows += [row("refused", "[emulator: refuse]")]
    rows += [row("failed", "[emulator: fail content_policy_violation]")]
    rows += [row("unanswered", "with a line that is cut after the purchase")]
    return [
        {**row, "note": {"who": row["prompt_id"], "tags": ["x", "y"][: number % 3]}, "weight": 0.5}
        for number, row in enumerate(rows)
    ]


@dataclass(frozen=True)
class FinishedRun:
    """A finished run: its resource, its plan, and the server's records."""

    krea: Krea
    plan: Plan
    stats: dict[str, Any]

    def build(self, run_id: str = RUN, krea: Krea | None = None) -> pa.Table:
        """The manifest, from the journal and the table alone."""
        krea = krea or self.krea
        locate = krea.open_storage().locate
        with krea.open_journal() as journal:
            parts = manifest_parts(self.plan, KEY, journal, locate=locate, run_id=run_id)
            return pa.concat_tables(parts)

    def by_id(self, run_id: str = RUN) -> dict[str, dict[str, Any]]:
        """Its rows by prompt_id; of several samples the last."""
        return {row["prompt_id"]: row for row in self.build(run_id).to_pylist()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FinishedRun]:
    folder = tmp_path_factory.mktemp("manifest")
    pq.write_table(pa.Table.from_pylist(prompt_rows()), folder / "prompts.parquet")
    table = PromptTable(str(folder / "prompts.parquet"), parse_partition_by("hash:1"))
    images = tuple(images_of(table))
    with Emulator(latency_s=0.02, latency_jitter=0.0) as emulator:
        emulator.world.script("drop_after_create", match="line that is cut")
        krea = Krea(
            Settings(
                api_key="emulator",
                base_url=emulator.url,
                expected_latency_s=0.02,
                storage=str(folder / "krea"),
                on_unknown="hold",
            )
        )
        buy(krea, wanted(images), run_id=RUN)
        stats = emulator.stats()
    with table.plan() as plan:
        yield FinishedRun(krea, plan, stats)


# -- the contract -----------------------------------------------------------------------------


def test_the_columns_are_the_documented_ones_in_order_and_type() -> None:
    assert [(field.name, field.type) for field in MANIFEST_SCHEMA] == COLUMNS


def test_a_built_manifest_has_them_first_and_then_the_tables_further_columns(
    finished: FinishedRun,
) -> None:
    schema = finished.build().schema
    assert [(field.name, field.type) for field in list(schema)[: len(COLUMNS)]] == COLUMNS
    assert schema.names[len(COLUMNS) :] == ["note", "weight"]


def test_every_column_is_described() -> None:
    assert list(DESCRIPTIONS) == MANIFEST_SCHEMA.names
    assert all(DESCRIPTIONS.values())


def test_no_further_column_of_a_table_can_have_the_name_of_a_column_of_the_manifest() -> None:
    assert set(MANIFEST_SCHEMA.names) == set(RESERVED_COLUMNS) | (
        set(RECOGNISED_COLUMNS) - {"num_images"}
    )
    assert not set(RESERVED_COLUMNS) & set(RECOGNISED_COLUMNS)


# -- rows -------------------------------------------------------------------------------------


def test_there_is_one_row_per_image_asked_for_in_the_tables_order(finished: FinishedRun) -> None:
    found = [(row["prompt_id"], row["sample"]) for row in finished.build().to_pylist()]
    assert found == [
        (row["prompt_id"], sample) for row in prompt_rows() for sample in range(row["num_images"])
    ]


@pytest.mark.parametrize(
    ("prompt_id", "status", "credits_in_and_out", "code"),
    [
        ("wide", "stored", (0.45, 0.45), None),
        ("failed", "failed", (0.45, 0.0), "content_policy_violation"),
        ("refused", "refused", (None, 0.0), "content_policy_violation"),
        ("unanswered", "unknown", (None, None), ""),
    ],
)
def test_a_row_says_how_it_ended_and_what_it_cost(
    finished: FinishedRun,
    prompt_id: str,
    status: str,
    credits_in_and_out: tuple[float | None, float | None],
    code: str | None,
) -> None:
    row = finished.by_id()[prompt_id]
    assert row["status"] == status
    # Null means that it is not known.
    assert (row["credits_reserved"], row["credits_charged"]) == credits_in_and_out
    if code is None:
        assert row["error_code"] is row["error_message"] is None
    else:
        assert row["error_code"].startswith(code)
        assert row["error_message"]


def test_every_stored_row_agrees_with_its_file(finished: FinishedRun) -> None:
    stored = [row for row in finished.build().to_pylist() if row["status"] == "stored"]
    assert len(stored) == 9
    for row in stored:
        data = Path(row["image_path"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == row["image_sha256"]
        assert len(data) == row["image_bytes"]
        with Image.open(row["image_path"]) as image:
            assert image.format == row["image_format"]
            assert image.size == (row["width"], row["height"])
            assert image.size == PIXELS[row["size"], row["quality"]]


def test_a_row_without_an_image_has_nothing_of_a_file(finished: FinishedRun) -> None:
    columns = ["image_path", "image_sha256", "image_bytes", "image_format", "width", "height"]
    for row in finished.build().to_pylist():
        if row["status"] != "stored":
            assert {row[name] for name in [*columns, "stored_at"]} == {None}


def test_the_credits_are_those_of_the_server_task_by_task(finished: FinishedRun) -> None:
    tasks = {task["task_id"]: task for task in finished.stats["tasks"]}
    charged: dict[str, float] = {}
    for row in finished.build().to_pylist():
        if row["task_id"] is not None:
            task = tasks[row["task_id"]]
            assert row["credits_reserved"] * 10_000 == task["reserved_units"]
            assert row["credits_charged"] * 10_000 == task["charged_units"]
            assert (row["prompt"], row["size"]) == (task["prompt"], task["size"])
            assert row["seed"] == task["used_seed"]
            charged[row["task_id"]] = row["credits_charged"]
    # What the manifest does not know is the purchase whose answer was cut off, and only that.
    (unknown,) = [task for id_, task in tasks.items() if id_ not in charged]
    assert "line that is cut" in unknown["prompt"]
    known = round(sum(charged.values()) * 10_000)
    assert known + unknown["charged_units"] == finished.stats["charged_units"]


def test_rows_with_the_same_request_share_the_purchase(finished: FinishedRun) -> None:
    rows = finished.by_id()
    same = ("request_key", "task_id", "image_path", "image_sha256", "credits_charged")
    assert [rows["twin-a"][name] for name in same] == [rows["twin-b"][name] for name in same]


def test_times_are_in_order(finished: FinishedRun) -> None:
    for row in finished.build().to_pylist():
        if row["status"] == "stored":
            assert row["submitted_at"] <= row["completed_at"] <= row["stored_at"]
            assert row["submitted_at"].utcoffset() == timedelta(0)


def test_reused_tells_what_this_run_bought_from_what_an_earlier_one_did(
    finished: FinishedRun,
) -> None:
    mine, later = finished.by_id(), finished.by_id("a-later-run")
    assert not any(row["reused"] for row in mine.values())
    assert {id_ for id_, row in later.items() if row["reused"]} >= {"wide", "twin-a", "twin-b"}
    assert not later["refused"]["reused"]
    for rows in (mine, later):
        assert rows["wide"]["run_id"] == RUN, "the run that bought it, for any reader"


def test_columns_of_the_table_are_carried_as_they_are_also_nested_ones(
    finished: FinishedRun,
) -> None:
    wanted = {row["prompt_id"]: (row["note"], row["weight"]) for row in prompt_rows()}
    table = finished.build()
    assert table.schema.field("note").type == pa.struct(
        [("who", pa.string()), ("tags", pa.list_(pa.string()))]
    )
    for row in table.to_pylist():
        assert (row["note"], row["weight"]) == wanted[row["prompt_id"]]


# -- a view of the journal --------------------------------------------------------------------


def test_a_request_that_the_journal_has_never_seen_is_planned(finished: FinishedRun) -> None:
    (images,) = finished.plan.batches(KEY)
    nothing = pa.Table.from_pylist([{}] * images.num_rows, RECORD_SCHEMA)
    table = manifest_table(images, nothing, locate=str, run_id="none")
    assert table["status"].unique().to_pylist() == ["planned"]
    assert table["request_key"].null_count == 0
    nothing = ("task_id", "image_path", "credits_reserved", "run_id", "submitted_at")
    assert all(table[name].null_count == table.num_rows for name in nothing)


def test_it_is_made_again_from_journal_and_table_without_any_server(
    finished: FinishedRun, tmp_path: Path
) -> None:
    # The emulator is down since the fixture; a new process would begin like this.
    elsewhere = Krea(
        Settings(storage=finished.krea.settings.storage, base_url="http://127.0.0.1:9")
    )
    assert finished.build(krea=elsewhere).equals(finished.build())


def test_equal_inputs_give_equal_bytes(finished: FinishedRun, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_manifest(Storage(str(tmp_path / name)), "p", finished.build())
    one, two = (tmp_path / name / manifest_name("p") for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


# -- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["a b&c", "../../etc/passwd", "..", "/", "x" * 250, "émoji 🌊"])
def test_no_partition_key_can_leave_the_folder(key: str, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    table = pa.Table.from_pylist([{"partition_key": key}], MANIFEST_SCHEMA)
    path = Path(write_manifest(storage, key, table))
    assert path.parent == tmp_path / "manifest"
    assert read_manifests(storage, [key]).equals(table)
    below = Path(write_manifest(storage, "k", table, folders=[key]))
    assert below.parent.parent == tmp_path / "manifest"


def test_partitions_that_differ_in_their_further_columns_are_read_as_one(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    plain = pa.Table.from_pylist([{"prompt_id": "a"}], MANIFEST_SCHEMA)
    noted = pa.Table.from_pylist([{"prompt_id": "b"}], MANIFEST_SCHEMA)
    noted = noted.append_column("note", pa.array(["x"]))
    write_manifest(storage, "1", plain)
    write_manifest(storage, "2", noted)
    both = read_manifests(storage, ["1", "never written", "2"])
    assert both.select(["prompt_id", "note"]).to_pylist() == [
        {"prompt_id": "a", "note": None},
        {"prompt_id": "b", "note": "x"},
    ]
    assert read_manifests(storage, ["2"], ["prompt_id"]).to_pylist() == [{"prompt_id": "b"}]


def test_a_manifest_is_replaced_whole_and_leaves_no_scraps(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    for ids in (["a", "b", "c"], ["a"]):
        rows = [{"prompt_id": id_} for id_ in ids]
        write_manifest(storage, "p", pa.Table.from_pylist(rows, MANIFEST_SCHEMA))
    assert read_manifests(storage, ["p"])["prompt_id"].to_pylist() == ["a"]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["p.parquet"]


def test_manifests_that_are_made_part_by_part_are_published_as_they_are(
    finished: FinishedRun, tmp_path: Path
) -> None:
    made, whole = Manifests(), finished.build()
    parts = [whole.slice(0, 3), whole.slice(3, 0), whole.slice(3)]
    made.add("p", manifest_schema(finished.plan), parts)
    made.add("empty", manifest_schema(finished.plan), [])
    assert made.partition_keys == ["empty", "p"]
    assert made.to_table().equals(whole)
    storage = Storage(str(tmp_path / "made"))
    assert not (tmp_path / "made").exists()
    for key in made.partition_keys:
        made.publish(storage, key)
    made.close()
    assert pq.read_table(storage.locate(manifest_name("p"))).equals(whole)
    assert read_manifests(storage, ["empty"]).schema.equals(whole.schema)


def test_a_large_manifest_has_row_groups_that_fit_into_memory(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    table = pa.Table.from_pylist([{"prompt_id": "a"}] * 25_000, MANIFEST_SCHEMA)
    metadata = pq.read_metadata(write_manifest(storage, "p", table))
    groups = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    assert groups == [10_000, 10_000, 5_000]


def test_a_manifest_that_would_be_written_as_it_is_needs_no_writing(
    finished: FinishedRun, tmp_path: Path
) -> None:
    storage, whole = Storage(str(tmp_path)), finished.build()
    parts = [whole.slice(0, 3), whole.slice(3, 0), whole.slice(3)]

    def is_there(*parts: pa.Table, ignored: Sequence[str] = ()) -> bool:
        rows = sum(part.num_rows for part in parts)
        return has_manifest(storage, "p", whole.schema, parts, rows=rows, ignored=ignored)

    assert not is_there(*parts)
    write_manifest_parts(storage, "p", whole.schema, parts)
    assert is_there(*parts)
    assert not is_there(*parts[:2])
    assert not is_there(*parts[:2], whole.slice(4), whole.slice(3, 1))
    other = finished.build("a later run")
    assert not is_there(other.slice(0, 3), *parts[1:])
    assert is_there(other.slice(0, 3), *parts[1:], ignored=["reused"])
    Path(tmp_path, manifest_name("p")).write_bytes(b"PAR1 cut off")
    assert not is_there(*parts)


def test_the_rows_without_an_image_are_read_back_alone(
    finished: FinishedRun, tmp_path: Path
) -> None:
    storage, whole = Storage(str(tmp_path)), finished.build()
    write_manifest(storage, "p", whole)
    write_manifest(storage, "none", whole.slice(0, 0))
    missing = read_missing(storage, ["none", "p", "never written"], ["prompt_id", "error_code"])
    assert missing.to_pylist() == [
        {"prompt_id": row["prompt_id"], "error_code": row["error_code"]}
        for row in whole.to_pylist()
        if row["status"] != "stored"
    ]
    assert missing.num_rows == 3
