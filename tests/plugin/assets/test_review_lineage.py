"""From rejected to replaced to exported, followed in Dagster as a person's lineage shows it."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.loader import LoadingContextForTest

from krea_dagster import KreaResource, build_krea_definitions
from krea_dagster.application.curation import Curation
from krea_dagster.curation.export.spec import ExportSpec
from krea_dagster.emulator import Emulator
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.verdict_log import Verdict
from tests.curation.accepted.quota_harness import prompts_of
from tests.dagster_bench import (
    QUIET,
    OpenAccount,
    bought,
    latest,
    run_job,
    tick,
    values,
    write_table,
)

PREFIX = "trail"
PARTITION = "bucket-000"


def stale(defs: dg.Definitions, instance: dg.DagsterInstance) -> list[str]:
    """The assets that the UI calls out of date, in the one partition, or as a whole."""
    graph = defs.resolve_asset_graph()
    resolver = CachingStaleStatusResolver(instance, graph, LoadingContextForTest(instance))
    found = []
    for key in graph.materializable_asset_keys:
        partition = PARTITION if graph.get(key).is_partitioned else None
        if resolver.get_status(key, partition) is StaleStatus.STALE:
            found.append(key.path[-1])
    return sorted(found)


def make(defs: dg.Definitions, instance: dg.DagsterInstance, *assets: str) -> None:
    """Materialize these as a person does in the UI."""
    keys = [dg.AssetKey([PREFIX, name]) for name in assets]
    graph = defs.resolve_asset_graph()
    partition = PARTITION if graph.get(keys[0]).is_partitioned else None
    job = defs.resolve_implicit_global_asset_job_def()
    result = job.execute_in_process(
        instance=instance, asset_selection=keys, partition_key=partition, run_config=QUIET
    )
    assert result.success


def exported(instance: dg.DagsterInstance) -> tuple[str, list[dict[str, Any]]]:
    """The data version of the export, and the index of its images."""
    event = instance.get_latest_materialization_event(dg.AssetKey([PREFIX, "dataset"]))
    assert event is not None
    materialization = event.asset_materialization
    assert materialization is not None
    assert materialization.tags is not None
    index = pq.read_table(str(values(materialization)["index"])).to_pylist()
    return materialization.tags["dagster/data_version"], index


def chain(defs: dg.Definitions, start: str) -> Sequence[str]:
    """All upstream assets of an asset."""
    graph = defs.resolve_asset_graph()
    found: set[dg.AssetKey] = set()
    left = [dg.AssetKey([PREFIX, start])]
    while left:
        for parent in graph.get(left.pop()).parent_keys - found:
            found.add(parent)
            left.append(parent)
    return sorted(key.path[-1] for key in found)


def test_from_rejected_to_replaced_to_exported(
    tmp_path: Path, emulator: Emulator, open_account: OpenAccount, instance: dg.DagsterInstance
) -> None:
    defs = build_krea_definitions(
        prompts=write_table(tmp_path / "prompts.parquet", prompts_of(3, PREFIX, num_images=1)),
        partition_by="hash:1",
        krea=KreaResource(
            api_key=open_account(),
            base_url=emulator.url,
            expected_latency_s=0.02,
            storage=str(tmp_path / "krea"),
        ),
        key_prefix=PREFIX,
        curation=Curation(wanted=["prompt=1"], exports={"dataset": ExportSpec()}),
    )
    # The way back from the dataset to the prompts, and to what people think.
    assert set(chain(defs, "dataset")) >= {
        "accepted_images", "verdicts", "image_manifest", "images", "prompts"
    }  # fmt: skip

    assert run_job(defs, instance, PARTITION, job=f"{PREFIX}_krea_images").success
    make(defs, instance, "image_measures")
    make(defs, instance, "near_duplicates")
    make(defs, instance, "accepted_images")
    make(defs, instance, "dataset")
    assert stale(defs, instance) == []
    first, images = exported(instance)
    assert len(images) == 3

    # Rejected: what depends on the verdict is out of date, and nothing else.
    rows = pq.read_table(tmp_path / "krea" / "manifest" / PREFIX / f"{PARTITION}.parquet")
    refused = rows.to_pylist()[1]
    with closing(Journal(f"sqlite:///{tmp_path / 'krea' / 'journal.db'}")) as journal:
        names = ("request_key", "prompt_id", "sample", "attempt", "partition_key")
        about = {name: refused[name] for name in names}
        journal.verdicts.add(
            [Verdict(uuid.uuid4().hex, refused["image_sha256"], "reject", "ann", **about)]
        )
    tick(defs, instance, f"{PREFIX}_krea_verdicts")
    assert stale(defs, instance) == ["accepted_images"]

    # Replaced: one image is bought, and all that is made of images is out of date.
    assert run_job(defs, instance, PARTITION, job=f"{PREFIX}_krea_images").success
    assert len(bought(emulator, f"[{PREFIX}]")) == 4
    shown = values(latest(instance, (PREFIX, "images"), PARTITION))
    assert (shown["slots_asked_again"], shown["wanted_accepted"]) == (1, 2)
    assert "accepted_images" in stale(defs, instance)
    assert not {"images", "image_manifest"} & set(stale(defs, instance))

    # Exported: the refused image is gone, its successor is there, and nothing is out of date.
    make(defs, instance, "image_measures")
    make(defs, instance, "near_duplicates")
    make(defs, instance, "accepted_images")
    assert stale(defs, instance) == ["dataset"]
    make(defs, instance, "dataset")
    assert stale(defs, instance) == []
    second, after = exported(instance)
    assert second != first
    before_images = {row["image_sha256"] for row in images}
    after_images = {row["image_sha256"] for row in after}
    assert before_images - after_images == {refused["image_sha256"]}
    (new,) = after_images - before_images
    now = ds.dataset(tmp_path / "krea" / "accepted" / PREFIX).to_table().to_pylist()
    (successor,) = [row for row in now if row["image_sha256"] == new]
    assert (successor["prompt_id"], successor["attempt"]) == (refused["prompt_id"], 1)
