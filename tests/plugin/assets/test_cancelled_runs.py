"""A cancelled run says what is safe, and Dagster shows the partitions that were finished."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import dagster as dg
import pyarrow.parquet as pq

from krea_dagster import KreaResource, build_krea_definitions
from krea_dagster.application.run_log import RunLog
from krea_dagster.emulator import Emulator
from krea_dagster.engine.run.report import Progress
from krea_dagster.plugin.progress import observed
from tests.dagster_bench import OpenAccount, latest, run_job, values, write_table


class Canceller(RunLog):
    """Interrupts this process, as Dagster's button does, once two images are delivered."""

    def __init__(self) -> None:
        super().__init__(lambda _: None, every_s=3600.0)
        self.pressed = False

    def progress(self, progress: Progress) -> None:
        if progress.delivered == 2 and not self.pressed:
            self.pressed = True
            os.kill(os.getpid(), signal.SIGINT)


def test_finished_partitions_are_materialized_and_the_log_says_what_the_next_run_does(
    tmp_path: Path, instance: dg.DagsterInstance, emulator: Emulator, open_account: OpenAccount
) -> None:
    table = {
        "prompt_id": ["a1", "a2", "b1", "b2"],
        "prompt": [
            "a quiet bay",
            "a loud bay",
            "a cape [emulator:stuck]",
            "cliffs [emulator:stuck]",
        ],
        "bucket": ["a", "a", "b", "b"],
    }
    defs = build_krea_definitions(
        prompts=write_table(tmp_path / "prompts.parquet", table),
        partition_by="column:bucket",
        krea=KreaResource(
            api_key=open_account(),
            base_url=emulator.url,
            expected_latency_s=0.02,
            storage=str(tmp_path / "krea"),
        ),
        key_prefix="cancelled",
    )
    instance.add_dynamic_partitions("cancelled_krea_bucket", ["a", "b"])
    with observed(Canceller(), lambda _: None):
        result = run_job(defs, instance, "a", "b", job="cancelled_krea_images")
    assert not result.success
    for name in ("images", "image_manifest"):
        key = dg.AssetKey(["cancelled", name])
        assert instance.get_materialized_partitions(key) == {"a"}
    assert values(latest(instance, ("cancelled", "images"), "a"))["rows_stored"] == 2
    manifest = pq.read_table(tmp_path / "krea" / "manifest" / "cancelled" / "a.parquet")
    assert manifest["status"].to_pylist() == ["stored", "stored"]
    lines = [entry.user_message for entry in instance.all_logs(result.run_id)]
    assert (
        "Cancelled: this run delivered 2 images for 0.9 credits, which are stored, and no image "
        "that is paid for is lost. The next run of these partitions continues from here. 4 images "
        "in 2 partitions: 2 stored already, none to buy, 2 paid for and to be fetched."
    ) in lines
    assert "Finished and reported to Dagster, with their manifests: 1 of 2 partitions." in lines
