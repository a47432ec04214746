"""Read this first: the package from ten lines of definitions to a review.

An emulator of EvoLink's API replaces EvoLink. With your own key, only ``api_key`` and ``base_url``
change.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import httpx
import pandas as pd
import pytest

from krea_dagster import KreaResource, build_krea_definitions
from krea_dagster.emulator import Emulator


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prompt table with two columns; only ``prompt`` is required."""
    folder = tmp_path_factory.mktemp("tutorial")
    pd.DataFrame(
        {
            "prompt": [
                "A red kite over stubble fields, wide angle",
                "A tram in the rain at night, reflections on the rails",
                "Still life with three lemons and a tin jug",
            ],
            "size": ["16:9", "3:4", "1:1"],
        }
    ).to_parquet(folder / "prompts.parquet")
    return folder


@pytest.fixture(scope="module")
def defs(folder: Path, emulator: Emulator) -> dg.Definitions:
    """A whole ``definitions.py``."""
    return build_krea_definitions(
        prompts=str(folder / "prompts.parquet"),
        partition_by="hash:1",
        krea=KreaResource(
            api_key="emulator",  # yours: dg.EnvVar("EVOLINK_API_KEY")
            base_url=emulator.url,  # yours: leave it out
            storage=str(folder / "krea"),
        ),
    )


@pytest.fixture(scope="module")
def first_run(defs: dg.Definitions, instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    """What "Materialize" in the UI does, or ``krea-dagster materialize`` in a terminal."""
    job = defs.resolve_job_def("krea_images")
    return job.execute_in_process(instance=instance, partition_key="bucket-000")


def test_1_materializing_a_partition_buys_its_images_and_writes_its_manifest(
    first_run: dg.ExecuteInProcessResult, folder: Path
) -> None:
    assert first_run.success

    manifest = pd.read_parquet(folder / "krea" / "manifest" / "bucket-000.parquet")
    assert list(manifest["status"]) == ["stored", "stored", "stored"]
    assert manifest["credits_charged"].sum() == pytest.approx(3 * 0.45)
    for image in manifest.to_dict("records"):
        assert Path(image["image_path"]).stat().st_size == image["image_bytes"]


@pytest.mark.usefixtures("first_run")
def test_2_your_own_asset_reads_the_manifest_as_pandas(
    defs: dg.Definitions, instance: dg.DagsterInstance
) -> None:
    @dg.asset(ins={"image_manifest": dg.AssetIn(input_manager_key="krea_manifest")})
    def wide_images(image_manifest: pd.DataFrame) -> int:
        return len(image_manifest.query("status == 'stored' and width > height"))

    yours = dg.Definitions(assets=[wide_images])
    job = dg.Definitions.merge(defs, yours).resolve_implicit_global_asset_job_def()
    result = job.execute_in_process(instance=instance, asset_selection=[wide_images.key])
    assert result.output_for_node("wide_images") == 1


@pytest.mark.usefixtures("first_run")
def test_3_running_it_again_buys_nothing(
    defs: dg.Definitions, emulator: Emulator, instance: dg.DagsterInstance
) -> None:
    before = emulator.stats(tasks=False)
    job = defs.resolve_job_def("krea_images")
    result = job.execute_in_process(instance=instance, partition_key="bucket-000")
    assert result.success

    after = emulator.stats(tasks=False)
    assert after["submit_posts"] == before["submit_posts"]
    assert after["charged_units"] == before["charged_units"]
    images = result.asset_materializations_for_node("images")[0]
    assert images.metadata["krea/images_reused"].value == 3


#: The manifest's rows by prompt_id.
Rows = dict[str, dict[Any, Any]]


def statuses(rows: Rows) -> list[str]:
    return sorted(row["status"] for row in rows.values())


class Project:
    """A prompt table with one prompt per row, its definitions, and an emulator."""

    def __init__(self, folder: Path, instance: dg.DagsterInstance, emulator: Emulator) -> None:
        self.folder, self.instance, self.emulator = folder, instance, emulator

    def write_prompts(self, **prompts: str) -> None:
        """Write the table; the names are the rows' ``prompt_id``."""
        columns = {"prompt_id": list(prompts), "prompt": list(prompts.values())}
        pd.DataFrame(columns).to_parquet(self.folder / "prompts.parquet")

    def materialize(self, *, config: dict[str, Any] | None = None, **settings: Any) -> Rows:
        """Run the job with settings of the resource and run config; return the manifest's rows."""
        krea = KreaResource(
            api_key="emulator",
            base_url=self.emulator.url,
            storage=str(self.folder / "krea"),
            **settings,
        )
        defs = build_krea_definitions(
            prompts=str(self.folder / "prompts.parquet"), partition_by="hash:1", krea=krea
        )
        defs.resolve_job_def("krea_images").execute_in_process(
            instance=self.instance,
            partition_key="bucket-000",
            run_config={"ops": {"images": {"config": config or {}}}},
        )
        return self.rows()

    def rows(self) -> Rows:
        manifest = pd.read_parquet(self.folder / "krea" / "manifest" / "bucket-000.parquet")
        return {row["prompt_id"]: row for row in manifest.to_dict("records")}

    def tasks(self, prompt: str) -> list[dict[str, Any]]:
        """Return the tasks of a prompt at the server, as the account's owner sees them."""
        return [task for task in self.emulator.stats()["tasks"] if task["prompt"] == prompt]


@pytest.fixture
def project(tmp_path: Path, instance: dg.DagsterInstance, emulator: Emulator) -> Project:
    return Project(tmp_path, instance, emulator)


def test_4_after_a_lost_response_the_purchase_is_repeated_under_its_key_and_charged_once(
    project: Project,
) -> None:
    project.write_prompts(fog="A lighthouse in fog, long exposure")
    project.emulator.world.script("drop_after_create", match="A lighthouse in fog")

    rows = project.materialize()
    assert rows["fog"]["status"] == "stored"
    assert rows["fog"]["credits_charged"] == 0.45
    assert len(project.tasks("A lighthouse in fog, long exposure")) == 1


def test_5_with_hold_the_outcome_stays_unknown_until_you_decide(project: Project) -> None:
    project.write_prompts(dawn="A glacier at dawn, from above")
    project.emulator.world.script("drop_after_create", match="A glacier at dawn")

    rows = project.materialize(on_unknown="hold")
    assert rows["dawn"]["status"] == "unknown"
    assert math.isnan(rows["dawn"]["credits_charged"])

    (task,) = project.tasks("A glacier at dawn, from above")
    decision = {"resolve": {"dawn": f"task:{task['task_id']}"}}
    rows = project.materialize(on_unknown="hold", config=decision)
    assert rows["dawn"]["status"] == "stored"
    assert len(project.tasks("A glacier at dawn, from above")) == 1


def test_6_a_budget_defers_the_rows_beyond_it(project: Project) -> None:
    project.write_prompts(oak="An oak in spring", elm="An elm in autumn", fir="A fir in snow")

    rows = project.materialize(budgets=["month=1"])  # credits; each image costs 0.45
    assert statuses(rows) == ["deferred", "stored", "stored"]

    rows = project.materialize(budgets=["month=2"])
    assert statuses(rows) == ["stored", "stored", "stored"]
    assert sum(row["credits_charged"] for row in rows.values()) == pytest.approx(1.35)


def test_7_a_run_that_is_killed_and_started_again_buys_nothing_twice(
    project: Project, command: Callable[..., subprocess.Popen[str]]
) -> None:
    project.write_prompts(hen="A hen in a yard", fox="A fox in snow", owl="An owl at dusk")
    project.emulator.world.script("slow_task", n=3, arg=1.0)  # seconds
    prompts = ("A hen in a yard", "A fox in snow", "An owl at dusk")

    run = command("materialize")
    while run.poll() is None and not any(project.tasks(prompt) for prompt in prompts):
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL

    assert command("materialize").wait() == 0
    assert statuses(project.rows()) == ["stored", "stored", "stored"]
    assert [len(project.tasks(prompt)) for prompt in prompts] == [1, 1, 1]


def test_8_a_rejected_image_is_bought_again_with_another_seed(
    project: Project, command: Callable[..., subprocess.Popen[str]]
) -> None:
    project.write_prompts(boat="A boat on a lake", pier="A pier at low tide")
    first = project.materialize()

    review = command("review", "--no-open", "--reviewer", "ada")
    assert review.stdout is not None
    reject(review.stdout.readline().strip(), first["boat"])

    second = project.materialize(config={"regenerate": ["rejected"]})
    assert (second["boat"]["attempt"], second["pier"]["attempt"]) == (1, 0)
    assert second["boat"]["seed"] != first["boat"]["seed"]
    assert second["boat"]["image_sha256"] != first["boat"]["image_sha256"]
    assert second["pier"]["task_id"] == first["pier"]["task_id"]


@pytest.fixture
def command(project: Project) -> Any:
    """Start ``krea-dagster`` in the project's environment; stopped after the test."""
    running: list[subprocess.Popen[str]] = []
    environment = {
        **os.environ,
        "EVOLINK_API_KEY": "emulator",
        "EVOLINK_BASE_URL": project.emulator.url,
        "KREA_PROMPTS": str(project.folder / "prompts.parquet"),
        "KREA_STORAGE": str(project.folder / "krea"),
        "KREA_PARTITION_BY": "hash:1",
    }

    def start(*arguments: str) -> subprocess.Popen[str]:
        code = "from krea_dagster.cli import run; run()"
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


def reject(url: str, row: dict[Any, Any]) -> None:
    """Reject an image as the review page does on the key r."""
    names = ("image_sha256", "request_key", "prompt_id", "partition_key", "sample", "attempt")
    verdict = {"verdict_id": "0" * 16, "verdict": "reject", "reviewer": "ada"}
    verdict.update({name: row[name] for name in names})
    with httpx.Client(base_url=url, trust_env=False) as page:
        journal = page.get("api/start").json()["journal"]
        answer = page.post(
            "api/verdicts",
            json={"journal": journal, "verdicts": [verdict]},
            headers={"Origin": f"http://{page.base_url.netloc.decode()}"},
        )
    assert answer.raise_for_status().json()["refused"] == []
