"""All checks: which manifests they read, and what they do without a readable one."""

from __future__ import annotations

import functools
import json

import dagster as dg
import pyarrow as pa
import pytest

from krea_dagster import KreaResource
from krea_dagster.emulator import Emulator
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
from tests.dagster_bench import QUIET
from tests.plugin.bought_run import BUCKETS, PREFIX, BoughtRun
from tests.plugin.checks.stored_manifests import (
    BY_MOOD,
    DAYS,
    ERROR,
    FOLDERS,
    WARN,
    StoredManifests,
    number,
    put_bytes,
)

pytestmark = pytest.mark.filterwarnings("ignore::dagster.BetaWarning")  # backfill_policy is beta


@pytest.mark.parametrize(
    ("first", "last", "rows"), [("b/1", None, 2), ("a", "b/1", 3), ("a", "c", 3), (None, None, 3)]
)
def test_a_check_looks_at_the_partitions_of_its_run_and_at_all_on_file_without_any(
    stored: StoredManifests, first: str | None, last: str | None, rows: int
) -> None:
    stored.write([stored.row(1)])
    stored.write([stored.row(2), stored.row(3)], "b/1")
    # Of another asset, in a folder further down: never looked at.
    write_manifest(
        stored.storage,
        "a",
        pa.Table.from_pylist([stored.row(9)], MANIFEST_SCHEMA),
        ["shop", "best"],
    )
    check = stored.check(build_failure_share_check, first, last)
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
    stored: StoredManifests, partitions_def: dg.PartitionsDefinition[str], keys: list[str]
) -> None:
    for place, key in enumerate(keys):
        stored.write([stored.row(place, partition_key=key)], key)
    check = stored.check(build_manifest_schema_check, keys[0], keys[1], partitions_def)
    assert check.passed, check.description
    assert (number(check, "partitions_checked"), number(check, "rows_checked")) == (2, 2)


@pytest.mark.parametrize("factory", [*default_checks(), build_images_check, build_spend_check])
def test_without_a_manifest_nothing_is_called_good(
    stored: StoredManifests, factory: CheckFactory
) -> None:
    check = stored.check(factory)
    assert (check.passed, check.severity) == (False, WARN)
    assert "no manifest yet" in (check.description or "")


@pytest.mark.parametrize("factory", [*default_checks(), build_images_check, build_spend_check])
def test_a_manifest_that_cannot_be_read_fails_each_check_by_its_name(
    stored: StoredManifests, factory: CheckFactory
) -> None:
    stored.storage.write(manifest_name("a", FOLDERS), lambda file: put_bytes(file, b"torn"))
    check = stored.check(factory)
    assert (check.passed, check.severity) == (False, ERROR)
    assert "shop/a.parquet cannot be read" in (check.description or "")


@pytest.mark.parametrize("factory", [*default_checks(), build_images_check, build_spend_check])
def test_an_empty_manifest_passes_each_check(
    stored: StoredManifests, factory: CheckFactory
) -> None:
    stored.write([])
    assert stored.check(factory, "a").passed


def test_what_a_check_tells_of_very_many_rows_stays_small(stored: StoredManifests) -> None:
    long = "x" * 5_000
    rows = [{**stored.failed(n, code=long), "prompt_id": f"{n}-{long}"} for n in range(200)]
    stored.write(rows)
    check = stored.check(build_failure_share_check)
    assert number(check, "findings_count") == 200
    table = check.metadata["findings"]
    assert isinstance(table, dg.TableMetadataValue)
    assert len(table.records) == 50
    assert len(json.dumps([dict(one.data) for one in table.records])) < 40_000
    assert len(check.description or "") < 2_000


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
    bought_run: BoughtRun, emulator: Emulator, factory: CheckFactory, passes: bool
) -> None:
    manifest = (
        bought_run.defs.resolve_asset_graph().get(dg.AssetKey([PREFIX, "image_manifest"])).key
    )
    check = factory(manifest, resource_key="krea")
    defs = dg.Definitions(
        assets=[dg.AssetSpec(manifest)],
        asset_checks=[check],
        resources={"krea": KreaResource(storage=str(bought_run.storage))},
        jobs=[dg.define_asset_job("checks", selection=dg.AssetSelection.checks(check))],
    )
    with dg.DagsterInstance.ephemeral() as instance:
        result = defs.resolve_job_def("checks").execute_in_process(
            instance=instance, run_config=QUIET
        )
    (found,) = result.get_asset_check_evaluations()
    assert found.passed is passes, found.description
    assert number(found, "partitions_checked") == len(BUCKETS)
