"""Which backfills Dagster's run retries finish: those that are not ended already."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster._core.execution.backfill import BulkActionStatus
from dagster._daemon.auto_run_reexecution.auto_run_reexecution import should_retry

from krea_dagster.emulator import Emulator
from tests.cluster.cluster import SHIPPED
from tests.cluster.servers import SCRIPTS
from tests.dagster_bench import write_table

pytestmark = pytest.mark.cluster


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Make an instance in a folder, with the shipped retries."""
    shipped = yaml.safe_load((SHIPPED / "dagster.yaml").read_text())
    settings = {name: shipped[name] for name in ("run_retries", "telemetry")}
    # Its runs wait in the queue: there is no daemon.
    settings["run_coordinator"] = {
        "module": "dagster._core.run_coordinator",
        "class": "QueuedRunCoordinator",
    }
    (tmp_path / "dagster.yaml").write_text(yaml.safe_dump(settings))
    write_table(tmp_path / "prompts.parquet", {"prompt": ["a gull", "a tern"]})
    return tmp_path


def test_a_failed_run_of_dagster_job_backfill_is_not_retried_because_its_backfill_has_ended(
    home: Path,
) -> None:
    environment = {
        **os.environ,
        "DAGSTER_HOME": str(home),
        "KREA_PROMPTS": str(home / "prompts.parquet"),
        "KREA_STORAGE": str(home / "krea"),
        "KREA_PARTITION_BY": "hash:2",
    }
    command = ["job", "backfill", "-f", str(SHIPPED / "definitions.py"), "-j", "krea_images"]
    with Emulator() as emulator:
        subprocess.run(
            [str(SCRIPTS / "dagster"), *command, "--all", "all", "--noprompt"],
            env={**environment, "EVOLINK_BASE_URL": emulator.url},
            check=True,
            capture_output=True,
        )
    with dg.DagsterInstance.from_config(str(home)) as instance:
        backfills: Any = instance.get_backfills()
        (backfill,) = backfills
        assert backfill.status is BulkActionStatus.COMPLETED
        run, _ = instance.get_runs()
        instance.report_run_failed(run, "the worker died")

        def retried(status: BulkActionStatus) -> bool:
            instance.update_backfill(backfill.with_status(status))
            failed = instance.get_run_by_id(run.run_id)
            assert failed is not None
            return should_retry(failed, instance)

        assert not retried(BulkActionStatus.COMPLETED)
        # As a backfill from the UI stands until its last run has ended.
        assert retried(BulkActionStatus.REQUESTED)
