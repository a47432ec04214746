"""The way from a rejected image to the dataset, as Dagster's UI draws it, in a real browser.

``KREA_DOCS_IMAGES`` names a folder for screenshots (``make docs-images``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import dagster as dg
import pytest
from playwright.sync_api import Page, expect

from krea_dagster import KreaResource, build_krea_definitions
from krea_dagster.application.curation import Curation
from krea_dagster.curation.export.spec import ExportSpec
from krea_dagster.emulator import Emulator
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.verdict_log import REJECT, Verdict
from krea_dagster.manifest import read_manifests
from tests.browser.dagster_server import keep, open_page, project_environment, serving
from tests.curation.accepted.quota_harness import prompts_of
from tests.dagster_bench import QUIET, tick, write_table

pytestmark = pytest.mark.browser

PARTITIONS = ("bucket-000", "bucket-001")

_DEFINITIONS = """
import os
import dagster as dg
from krea_dagster import KreaResource, build_krea_definitions
from krea_dagster.curation.export.spec import ExportSpec
from krea_dagster.application.curation import Curation

defs = build_krea_definitions(
    prompts=os.environ["KREA_PROMPTS"],
    partition_by="hash:2",
    krea=KreaResource(
        api_key=dg.EnvVar("EVOLINK_API_KEY"),
        base_url=os.environ["EVOLINK_BASE_URL"], expected_latency_s=0.02,
        storage=os.environ["KREA_STORAGE"],
    ),
    curation=Curation(wanted=["prompt=2"], exports={"dataset": ExportSpec()}),
)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """The environment of a project whose images were taken as a dataset, and judged since."""
    folder = tmp_path_factory.mktemp("judged-project")
    (folder / "defs.py").write_text(_DEFINITIONS)
    with Emulator(latency_s=0.02) as emulator:
        key = "sk-of-the-judged-project-Zq81"
        emulator.world.add_account(key, 10_000_000)
        prompts = write_table(folder / "prompts.parquet", prompts_of(6, "plain", num_images=2))
        environment = project_environment(
            folder,
            KREA_PROMPTS=prompts,
            EVOLINK_API_KEY=key,
            EVOLINK_BASE_URL=emulator.url,
            PROJECT=str(folder),
        )
        krea = KreaResource(
            api_key=key,
            base_url=emulator.url,
            expected_latency_s=0.02,
            storage=str(folder / "krea"),
        )
        defs = build_krea_definitions(
            prompts=environment["KREA_PROMPTS"],
            partition_by="hash:2",
            krea=krea,
            curation=Curation(wanted=["prompt=2"], exports={"dataset": ExportSpec()}),
        )
        with dg.DagsterInstance.from_config(environment["DAGSTER_HOME"]) as instance:
            _make(defs, instance)
            with krea.krea().open_journal() as journal:
                _reject_one(krea, journal)
            tick(defs, instance, "krea_verdicts")
        yield environment


def _make(defs: dg.Definitions, instance: dg.DagsterInstance) -> None:
    job = defs.resolve_implicit_global_asset_job_def()
    each = ("images", "image_manifest", "image_measures", "accepted_images")
    for partition in PARTITIONS:
        keys = [dg.AssetKey([name]) for name in each]
        assert job.execute_in_process(
            instance=instance, asset_selection=keys, partition_key=partition, run_config=QUIET
        ).success
    keys = [dg.AssetKey([name]) for name in ("near_duplicates", "dataset")]
    assert job.execute_in_process(instance=instance, asset_selection=keys, run_config=QUIET).success


def _reject_one(krea: KreaResource, journal: Journal) -> None:
    row = read_manifests(krea.krea().open_storage(), PARTITIONS).to_pylist()[0]
    names = ("request_key", "prompt_id", "sample", "attempt", "partition_key")
    about = {name: row[name] for name in names}
    journal.verdicts.add([Verdict("one", row["image_sha256"], REJECT, "ann", **about)])


@pytest.fixture(scope="module")
def ui(project: Mapping[str, str]) -> Iterator[str]:
    """The address of ``dg dev`` over the project's instance."""
    folder = Path(project["PROJECT"])
    with serving(project, folder, folder / "defs.py") as url:
        yield url


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    """A page of a headless Chromium."""
    with open_page() as page:
        yield page


def test_the_lineage_leads_from_the_dataset_back_to_verdicts_and_prompts(
    ui: str,
    page: Page,
) -> None:
    page.set_viewport_size({"width": 1900, "height": 760})
    page.goto(f"{ui}/assets/dataset?view=lineage&lineageScope=upstream&lineageDepth=6")
    for name in ("prompts", "images", "image_manifest", "verdicts", "accepted_images", "dataset"):
        expect(page.get_by_text(name, exact=True).first).to_be_visible()
    expect(page.get_by_text("Loading")).to_have_count(0)
    keep(page, "review-lineage")


def test_a_partition_whose_verdicts_have_changed_is_said_to_be_out_of_date(
    ui: str,
    page: Page,
) -> None:
    # The first row of all was rejected, which lies in the first partition.
    page.goto(f"{ui}/assets/accepted_images?view=partitions&partition={PARTITIONS[0]}")
    expect(page.get_by_text("Unsynced").first).to_be_visible()
    keep(page, "review-out-of-date")
    page.goto(f"{ui}/assets/accepted_images?view=partitions&partition={PARTITIONS[1]}")
    expect(page.get_by_text("credits_per_accepted_image").first).to_be_visible()
    expect(page.get_by_text("Unsynced")).to_have_count(0)
