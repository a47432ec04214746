"""The checks of a manifest: what each finds, in which rows, and how grave it is."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from krea_dagster import KreaResource
from krea_dagster.emulator import Emulator
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import ConfigError
from krea_dagster.manifest import MANIFEST_SCHEMA, manifest_name, write_manifest
from krea_dagster.plugin.checks import (
    CheckFactory,
    build_failure_share_check,
    build_files_check,
    build_images_check,
    build_manifest_schema_check,
    build_spend_check,
    default_checks,
)
from tests.dagster_bench import QUIET, RANGE_END, RANGE_START
from tests.plugin.bought_partitions import BUCKETS, PREFIX, Trip

MANIFEST = dg.AssetKey(["shop", "image_manifest"])
FOLDERS = ["shop"]
KEYS = ("a", "b/1", "c")
MOODS = "moods"
DAYS = dg.DailyPartitionsDefinition("2026-11-01")
BY_MOOD: dg.DynamicPartitionsDefinition = dg.DynamicPartitionsDefinition(name=MOODS)
ERROR, WARN = dg.AssetCheckSeverity.ERROR, dg.AssetCheckSeverity.WARN
NOW = datetime(2026, 11, 2, tzinfo=timezone.utc)


@dataclass
class Shelf:
    """A storage root with manifests and files that were made by hand."""

    root: str
    krea: KreaResource = field(init=False)
    storage: Storage = field(init=False)

    def __post_init__(self) -> None:
        self.krea = KreaResource(storage=self.root)
        self.storage = Storage(self.root)

    def row(self, number: int, **different: Any) -> dict[str, Any]:
        """A stored row; its file is written as its content says."""
        key = hashlib.sha256(f"{number}".encode()).hexdigest()
        content = different.pop("content", f"content {number}".encode())
        name = f"images/{key[:2]}/{key}.png"
        if content is not None:
            self.storage.write(name, lambda file: _put(file, content))
        row = {
            "prompt_id": f"row-{number:04d}",
            "sample": 0,
            "prompt": "a heron",
            "model": "krea-2-turbo",
            "size": "1:1",
            "quality": "1K",
            "seed": number + 1,
            "nsfw_check": False,
            "attempt": 0,
            "request_key": key,
            "partition_key": KEYS[0],
            "status": "stored",
            "task_id": f"task-{number}",
            "image_path": self.storage.locate(name),
            "image_sha256": hashlib.sha256(content or b"").hexdigest(),
            "image_bytes": len(content or b""),
            "image_format": "PNG",
            "width": 1024,
            "height": 1024,
            "credits_charged": 0.45,
            "stored_at": NOW,
            "reused": False,
        }
        return {**row, **different}

    def failed(self, number: int, code: str = "content_policy_violation") -> dict[str, Any]:
        """A row that failed."""
        nothing = dict.fromkeys(
            [
                "image_path", "image_sha256", "image_bytes", "image_format", "width", "height",
                "stored_at",
            ]
        )  # fmt: skip
        return self.row(
            number, **nothing, status="failed", credits_charged=0.0, error_code=code, content=b""
        )

    def write(self, rows: list[dict[str, Any]], key: str = KEYS[0]) -> None:
        """Write the manifest of a partition."""
        rows = [{**row, "partition_key": row.get("lies_in", key)} for row in rows]
        write_manifest(self.storage, key, pa.Table.from_pylist(rows, MANIFEST_SCHEMA), FOLDERS)

    def check(
        self,
        factory: CheckFactory,
        first: str | None = None,
        last: str | None = None,
        partitions_def: dg.PartitionsDefinition[str] = dg.StaticPartitionsDefinition(list(KEYS)),
    ) -> dg.AssetCheckEvaluation:
        """Run a check alone, or after a run of the manifest of one partition or a range."""

        @dg.asset(
            key=MANIFEST,
            partitions_def=partitions_def,
            backfill_policy=dg.BackfillPolicy.single_run(),
        )
        def made() -> None:
            """Lies there already."""

        check = factory(MANIFEST, resource_key="shop_krea")
        defs = dg.Definitions(
            assets=[made],
            asset_checks=[check],
            resources={"shop_krea": self.krea},
            jobs=[
                dg.define_asset_job("alone", selection=dg.AssetSelection.checks(check)),
                dg.define_asset_job("both", selection=dg.AssetSelection.assets(made)),
            ],
        )
        job = defs.resolve_job_def("alone" if first is None else "both")
        how: dict[str, Any] = {}
        if last is not None:
            how["tags"] = {RANGE_START: first, RANGE_END: last}
        elif first is not None:
            how["partition_key"] = first
        with dg.DagsterInstance.ephemeral() as instance:
            instance.add_dynamic_partitions(MOODS, ["wild", "calm", "grim"])
            result = job.execute_in_process(instance=instance, run_config=QUIET, **how)
        (found,) = result.get_asset_check_evaluations()
        return found


pytestmark = pytest.mark.filterwarnings("ignore::dagster.BetaWarning")  # backfill_policy is beta


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(str(tmp_path / "krea"))


def _put(file: BinaryIO, content: bytes) -> None:
    file.write(content)


def named(check: dg.AssetCheckEvaluation) -> dict[str, str]:
    """The rows of a check's table, and why."""
    table = check.metadata["findings"]
    assert isinstance(table, dg.TableMetadataValue)
    return {str(one.data["prompt_id"]): str(one.data["why"]) for one in table.records}


def number(check: dg.AssetCheckEvaluation, name: str) -> Any:
    return check.metadata[name].value


# -- which manifests --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "last", "rows"), [("b/1", None, 2), ("a", "b/1", 3), ("a", "c", 3), (None, None, 3)]
)
def test_a_check_looks_at_the_partitions_of_its_run_and_at_all_on_file_without_any(
    shelf: Shelf, first: str | None, last: str | None, rows: int
) -> None:
    shelf.write([shelf.row(1)])
    shelf.write([shelf.row(2), shelf.row(3)], "b/1")
    # Of another asset, in a folder further down: never looked at.
    write_manifest(
        shelf.storage, "a", pa.Table.from_pylist([shelf.row(9)], MANIFEST_SCHEMA), ["shop", "best"]
    )
    check = shelf.check(build_failure_share_check, first, last)
    assert (check.passed, number(check, "rows_checked")) == (True, rows)


@pytest.mark.parametrize(
    ("partitions_def", "keys"),
    [
        (DAYS, ["2026-11-01", "2026-11-02", "2026-11-03"]),
        (BY_MOOD, ["wild", "calm", "grim"]),
        (
            dg.MultiPartitionsDefinition({"column": BY_MOOD, "day": DAYS}),
            ["calm|2026-11-01", "calm|2026-11-02", "wild|2026-11-02"],
        ),
    ],
)
def test_a_range_of_any_partitions_is_looked_at_whole_and_no_other(
    shelf: Shelf, partitions_def: dg.PartitionsDefinition[str], keys: list[str]
) -> None:
    for place, key in enumerate(keys):
        shelf.write([shelf.row(place, partition_key=key)], key)
    check = shelf.check(build_manifest_schema_check, keys[0], keys[1], partitions_def)
    assert check.passed, check.description
    assert (number(check, "partitions_checked"), number(check, "rows_checked")) == (2, 2)


@pytest.mark.parametrize("factory", [*default_checks(), build_images_check, build_spend_check])
def test_without_a_manifest_nothing_is_called_good(shelf: Shelf, factory: CheckFactory) -> None:
    check = shelf.check(factory)
    assert (check.passed, check.severity) == (False, WARN)
    assert "no manifest yet" in (check.description or "")


@pytest.mark.parametrize("factory", [*default_checks(), build_images_check, build_spend_check])
def test_a_manifest_that_cannot_be_read_fails_each_check_by_its_name(
    shelf: Shelf, factory: CheckFactory
) -> None:
    shelf.storage.write(manifest_name("a", FOLDERS), lambda file: _put(file, b"torn"))
    check = shelf.check(factory)
    assert (check.passed, check.severity) == (False, ERROR)
    assert "shop/a.parquet cannot be read" in (check.description or "")


@pytest.mark.parametrize("factory", [*default_checks(), build_images_check, build_spend_check])
def test_an_empty_manifest_passes_each_check(shelf: Shelf, factory: CheckFactory) -> None:
    shelf.write([])
    assert shelf.check(factory, "a").passed


def test_what_a_check_tells_of_very_many_rows_stays_small(shelf: Shelf) -> None:
    long = "x" * 5_000
    rows = [{**shelf.failed(n, code=long), "prompt_id": f"{n}-{long}"} for n in range(200)]
    shelf.write(rows)
    check = shelf.check(build_failure_share_check)
    assert number(check, "findings_count") == 200
    table = check.metadata["findings"]
    assert isinstance(table, dg.TableMetadataValue)
    assert len(table.records) == 50
    assert len(json.dumps([dict(one.data) for one in table.records])) < 40_000
    assert len(check.description or "") < 2_000


# -- failure share ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failed", "passed", "severity"),
    [(0, True, None), (1, True, None), (2, False, WARN), (6, False, ERROR)],
)
def test_few_failures_pass_more_warn_and_many_are_an_error(
    shelf: Shelf, failed: int, passed: bool, severity: dg.AssetCheckSeverity | None
) -> None:
    shelf.write([*map(shelf.failed, range(failed)), *map(shelf.row, range(failed, 100))])
    check = shelf.check(build_failure_share_check)
    assert check.passed is passed
    assert number(check, "failure_share") == failed / 100
    if severity:
        assert check.severity is severity
        assert f"{failed} × failed content_policy_violation" in (check.description or "")
        assert named(check)["row-0001"] == "failed: content_policy_violation"


def test_rows_that_wait_for_a_later_run_are_no_failures(shelf: Shelf) -> None:
    waiting = [shelf.row(n, status=status) for n, status in enumerate(["deferred", "submitted"])]
    shelf.write(waiting)
    assert shelf.check(build_failure_share_check).passed


@pytest.mark.parametrize("shares", [(0.2, 0.1), (-0.1, 0.1), (0.1, 1.1)])
def test_shares_that_cannot_be_are_refused(shares: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="must be shares"):
        build_failure_share_check(MANIFEST, warn_above=shares[0], error_above=shares[1])


# -- files ------------------------------------------------------------------------------------


def test_a_missing_a_short_and_a_changed_file_are_found(shelf: Shelf) -> None:
    rows = [shelf.row(n) for n in range(6)]
    shelf.write([*rows, shelf.failed(9), shelf.row(7, image_path="/elsewhere/7.png")])
    path = [Path(row["image_path"]) for row in rows]
    path[1].unlink()
    path[2].write_bytes(b"cut")
    path[3].write_bytes(b"CONTENT 3")  # of the same size
    check = shelf.check(functools.partial(build_files_check, sample=None))
    assert (check.passed, check.severity) == (False, ERROR)
    found = named(check)
    assert set(found) == {"row-0001", "row-0002", "row-0003", "row-0007"}
    assert "is not there" in found["row-0001"]
    assert "3 bytes instead of 9" in found["row-0002"]
    assert "another content" in found["row-0003"]
    assert "does not lie under" in found["row-0007"]
    assert (number(check, "rows_checked"), number(check, "files_hashed")) == (7, 4)
    # The sizes alone do not tell of the changed one.
    check = shelf.check(functools.partial(build_files_check, sample=0))
    assert set(named(check)) == set(found) - {"row-0003"}


def test_the_sample_is_the_same_for_the_same_seed_and_its_seed_is_told(shelf: Shelf) -> None:
    rows = [shelf.row(n) for n in range(40)]
    shelf.write(rows[:25])
    shelf.write(rows[25:], "c")
    for row in rows:
        Path(row["image_path"]).write_bytes(b"x" * row["image_bytes"])
    found = []
    for seed in (1, 1, 2):
        check = shelf.check(functools.partial(build_files_check, sample=8, seed=seed))
        assert (number(check, "files_hashed"), number(check, "findings_count")) == (8, 8)
        assert number(check, "sample_seed") == seed
        found.append(set(named(check)))
    assert found[0] == found[1] != found[2]
    drawn = [
        number(shelf.check(functools.partial(build_files_check, sample=8)), "sample_seed")
        for _ in range(2)
    ]
    assert drawn[0] != drawn[1]  # from the run, so that in time all files have their turn


def test_files_behind_a_url_are_looked_at_there() -> None:
    shelf = Shelf("memory://checks/krea")
    shelf.write([shelf.row(n, content=None if n == 3 else b"picture") for n in range(5)])
    check = shelf.check(functools.partial(build_files_check, sample=None))
    assert list(named(check)) == ["row-0003"]
    assert number(check, "files_hashed") == 4


# -- pictures ---------------------------------------------------------------------------------


def picture(seed: int, width: int = 1024, height: int = 1024, *, flat: bool = False) -> bytes:
    import io  # noqa: PLC0415 - of this function only

    small = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)
    image = Image.fromarray(small * (not flat)).resize((width, height))
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def test_a_flat_a_damaged_and_a_wrong_size_picture_are_found(shelf: Shelf) -> None:
    shelf.write(
        [
            shelf.row(0, content=picture(0)),
            shelf.row(1, content=picture(1, flat=True)),
            shelf.row(2, content=picture(2)[:5000]),
            shelf.row(3, content=picture(3, 1152, 896)),
            shelf.row(4, content=picture(4), width=1152, height=896),
            shelf.row(5, content=picture(5, 1344, 768), size="16:9", width=1344, height=768),
        ]
    )
    check = shelf.check(build_images_check)
    assert (check.passed, check.severity) == (False, ERROR)
    found = named(check)
    assert set(found) == {"row-0001", "row-0002", "row-0003", "row-0004"}
    assert "one flat colour" in found["row-0001"]
    assert "cut short" in found["row-0002"]
    assert "1152×896 pixels instead of 1024×1024" in found["row-0003"]
    assert "the manifest says 1152×896" in found["row-0004"]
    assert number(check, "pictures_decoded") == 5


def test_a_picture_twice_under_different_seeds_is_named_with_the_other_and_twins_are_not(
    shelf: Shelf,
) -> None:
    same = b"the same"
    shelf.write([shelf.row(0), shelf.row(1, content=same), shelf.row(2)])
    twin = {**shelf.row(1, content=same), "prompt_id": "twin-of-1"}
    shelf.write([twin, shelf.row(3, content=same), shelf.row(4, content=same)], "b/1")
    check = shelf.check(functools.partial(build_images_check, sample=0))
    assert (check.passed, check.severity) == (False, WARN)
    assert number(check, "pictures_twice") == 2
    why = "gave the same picture as row-0001 sample 0 (partition a) with seed 2"
    assert named(check) == {"row-0003": f"seed 4 {why}", "row-0004": f"seed 5 {why}"}


def test_the_sample_bounds_what_is_decoded(shelf: Shelf) -> None:
    shelf.write([shelf.row(n) for n in range(10)])  # none of them is a picture
    check = shelf.check(functools.partial(build_images_check, sample=4))
    assert (number(check, "pictures_decoded"), len(named(check))) == (4, 4)


@pytest.mark.parametrize("build", [build_files_check, build_images_check])
def test_a_negative_sample_is_refused(build: Callable[..., object]) -> None:
    with pytest.raises(ConfigError, match="sample is -1"):
        build(MANIFEST, sample=-1)


# -- spend ------------------------------------------------------------------------------------


def test_a_dearer_image_and_a_charge_without_an_image_are_warnings(shelf: Shelf) -> None:
    shelf.write(
        [
            shelf.row(0),
            shelf.row(1, credits_charged=0.5),
            shelf.row(2, credits_charged=1.8, quality="2K"),
            {**shelf.failed(3), "credits_charged": 0.45},
            shelf.row(4, credits_charged=None),
        ]
    )
    check = shelf.check(build_spend_check)
    assert (check.passed, check.severity) == (False, WARN)
    assert named(check) == {
        "row-0001": "0.5 credits charged instead of 0.45 for 1K",
        "row-0003": "0.45 credits charged, and it failed",
    }
    assert number(check, "credits_charged") == pytest.approx(0.45 + 0.5 + 1.8 + 0.45)
    assert number(check, "credits_expected") == pytest.approx(0.45 * 3 + 1.8)
    assert number(check, "charges_unknown") == 1
    allowed = functools.partial(build_spend_check, tolerance=0.2)
    assert set(named(shelf.check(allowed))) == {"row-0003"}


def test_a_partition_above_its_most_is_an_error_and_twins_count_once(shelf: Shelf) -> None:
    shelf.write([shelf.row(0), {**shelf.row(0), "prompt_id": "twin"}])
    shelf.write([shelf.row(1), shelf.row(2), shelf.row(3)], "c")
    limit = functools.partial(build_spend_check, most_credits=0.9)
    assert shelf.check(limit, "a").passed
    check = shelf.check(limit)
    assert (check.passed, check.severity) == (False, ERROR)
    assert "partition c cost 1.35 credits, more than 0.9" in (check.description or "")
    assert number(check, "credits_charged") == pytest.approx(4 * 0.45)


def test_other_prices_can_be_agreed_on(shelf: Shelf) -> None:
    shelf.write(
        [shelf.row(0, credits_charged=0.3), shelf.row(1, credits_charged=9.0, quality="8K")]
    )
    check = shelf.check(functools.partial(build_spend_check, prices={"1K": 0.25}))
    assert set(named(check)) == {"row-0000", "row-0001"}


# -- schema -----------------------------------------------------------------------------------


def rewritten(shelf: Shelf, change: Callable[[pa.Table], pa.Table]) -> dg.AssetCheckEvaluation:
    """The check of a manifest of three rows that somebody has changed."""
    shelf.write([shelf.row(0), shelf.row(1), shelf.failed(2)])
    path = Path(shelf.storage.locate(manifest_name("a", FOLDERS)))
    pq.write_table(change(pq.read_table(path)), path)
    return shelf.check(build_manifest_schema_check, "a")


def put(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    at = table.schema.get_field_index(name)
    return table.set_column(at, table.schema.field(at), pa.array(values, table.schema.types[at]))


def test_a_whole_manifest_with_further_columns_keeps_the_contract(shelf: Shelf) -> None:
    check = rewritten(shelf, lambda table: table.append_column("mood", pa.array(["x"] * 3)))
    assert check.passed, check.description


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda table: table.drop_columns(["seed"]), "column seed is missing"),
        (
            lambda table: table.select(["sample", "prompt_id", *table.schema.names[2:]]),
            "column prompt_id is in place 2, not 1",
        ),
        (
            lambda table: table.set_column(1, "sample", pa.array([0, 0, 0], pa.int64())),
            "column sample is int64, not int32",
        ),
        (lambda table: put(table, "seed", [1, None, 3]), "row-0001: seed is null"),
        (
            lambda table: put(table, "image_path", ["x", None, None]),
            "row-0001: image_path is null, and it is stored",
        ),
        (lambda table: put(table, "status", ["stored", "stored", "odd"]), "its status is odd"),
        (
            lambda table: put(table, "prompt_id", ["row-0000", "row-0001", "row-0001"]),
            "1 breaches of the manifest's contract in 3 rows: row-0001: there is an earlier row",
        ),
        (
            lambda table: put(table, "partition_key", ["a", "a", "c"]),
            "row-0002: it is in the file of another partition, a.parquet",
        ),
    ],
)  # fmt: skip
def test_a_breach_of_the_contract_is_an_error_and_named(
    shelf: Shelf, change: Callable[[pa.Table], pa.Table], said: str
) -> None:
    check = rewritten(shelf, change)
    assert (check.passed, check.severity) == (False, ERROR)
    assert said in (check.description or "")


def test_a_partition_of_the_run_without_a_manifest_is_named(shelf: Shelf) -> None:
    shelf.write([shelf.row(0)])
    check = shelf.check(build_manifest_schema_check, "a", "b/1")
    assert not check.passed
    assert "partition b/1: it has no manifest" in (check.description or "")


# -- with real runs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "passes"),
    [
        (build_manifest_schema_check, True),
        (functools.partial(build_files_check, sample=None), True),
        (functools.partial(build_images_check, sample=None), True),
        (functools.partial(build_spend_check, most_credits=8.1), True),
        (build_failure_share_check, False),  # two rows fail on purpose
    ],
)
def test_what_a_real_run_has_made_passes(
    trip: Trip, emulator: Emulator, factory: CheckFactory, passes: bool
) -> None:
    manifest = trip.defs.resolve_asset_graph().get(dg.AssetKey([PREFIX, "image_manifest"])).key
    check = factory(manifest, resource_key="krea")
    defs = dg.Definitions(
        assets=[dg.AssetSpec(manifest)],
        asset_checks=[check],
        resources={"krea": KreaResource(storage=str(trip.storage))},
        jobs=[dg.define_asset_job("checks", selection=dg.AssetSelection.checks(check))],
    )
    with dg.DagsterInstance.ephemeral() as instance:
        result = defs.resolve_job_def("checks").execute_in_process(
            instance=instance, run_config=QUIET
        )
    (found,) = result.get_asset_check_evaluations()
    assert found.passed is passes, found.description
    assert number(found, "partitions_checked") == len(BUCKETS)
