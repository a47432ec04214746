"""Prompts that another asset of the project makes: order, purchases, lineage, foreign events."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from krea_dagster import KreaResource, build_krea_definitions, on_prompts_changed
from krea_dagster.emulator import Emulator
from krea_dagster.prompts import HashPartitions
from tests.dagster_bench import QUIET, RANGE_END, RANGE_START, OpenAccount, tick
from tests.prompts.reference import key_for

#: Conditions are evaluated by hand here, which is beta in Dagster; its daemon does the same.
pytestmark = pytest.mark.filterwarnings("ignore::dagster.BetaWarning")

COUNT = 12
BY = HashPartitions(4)
BUCKETS = BY.keys()
#: Rows of which the change of three touches two partitions.
CHANGED = (0, 1, 4)
IMAGES, MANIFEST = dg.AssetKey("images"), dg.AssetKey("image_manifest")
UPSTREAM = dg.AssetKey(["raw", "prompts"])  # named as the plugin's own, and still foreign


class Project:
    """A project in which an asset makes the prompts; what a test's own account has bought."""

    def __init__(
        self,
        folder: Path,
        instance: dg.DagsterInstance,
        emulator: Emulator,
        api_key: str,
        wiring: str,
    ) -> None:
        self.wiring = wiring
        self.folder, self.instance, self.api_key = folder, instance, api_key
        self.world = emulator.world
        self.rows = [
            {"prompt_id": f"u-{number:02d}", "prompt": f"image {number}", "campaign": "autumn"}
            for number in range(COUNT)
        ]
        self.fails = False
        self._krea = KreaResource(
            api_key=api_key,
            base_url=emulator.url,
            expected_latency_s=0.02,
            storage=str(folder / "krea"),
        )
        self.upstream, options = self.wired()
        images = build_krea_definitions(
            krea=self._krea,
            partition_by=str(BY),
            automation_condition=on_prompts_changed(),
            checks=(),
            **options,
        )
        own = [UPSTREAM, IMAGES, MANIFEST]
        together = dg.define_asset_job("together", selection=dg.AssetSelection.assets(*own))
        self.defs = dg.Definitions.merge(
            images,
            dg.Definitions(
                assets=[self.upstream],
                jobs=[together],
                resources={"io_manager": dg.FilesystemIOManager(base_dir=str(folder / "values"))},
            ),
        )
        self._evaluated: dg.EvaluateAutomationConditionsResult | None = None

    def wired(self) -> tuple[dg.AssetsDefinition, dict[str, Any]]:
        """The upstream asset, and the arguments that say so to the plugin."""
        if self.wiring == "writes the file":
            path = self.folder / "tables" / "prompts.parquet"

            @dg.asset(key=UPSTREAM)
            def prompts() -> None:
                path.parent.mkdir(exist_ok=True)
                self.table().to_parquet(path)

            return prompts, {"prompts": str(path), "deps": [prompts]}

        @dg.asset(key=UPSTREAM)
        def value() -> Any:
            return _VALUES[self.wiring](self.table(), self.folder)

        return value, {"prompts": value}

    def table(self) -> pd.DataFrame:
        """What the upstream computes."""
        assert not self.fails
        table: pd.DataFrame = pd.DataFrame(self.rows)
        return table

    def change_three_rows(self) -> None:
        for number in CHANGED:
            self.rows[number]["prompt"] += ", in the rain"

    def run(self, *partitions: str, job: str = "together") -> dg.ExecuteInProcessResult:
        """Run upstream, images and manifest in one job: a partition, or a range in one step."""
        resolved = self.defs.resolve_job_def(job)
        one = partitions[0] if len(partitions) == 1 else None
        tags = {} if one else {RANGE_START: partitions[0], RANGE_END: partitions[-1]}
        return resolved.execute_in_process(
            instance=self.instance,
            partition_key=one,
            tags=tags,
            run_config=QUIET,
            raise_on_error=False,
        )

    def launched(self) -> list[str]:
        """Tick the sensor, and return the partitions that the condition launches."""
        tick(self.defs, self.instance, "krea_prompts")
        self._evaluated = dg.evaluate_automation_conditions(
            self.defs,
            self.instance,
            cursor=None if self._evaluated is None else self._evaluated.cursor,
        )
        assert not self._evaluated.get_requested_partitions(UPSTREAM)
        return sorted(map(str, self._evaluated.get_requested_partitions(IMAGES)))

    def bought(self) -> int:
        """How many images the account has paid for; the journal says the same."""
        account = self.world.account(self.api_key)
        assert account is not None
        images, rest = divmod(account.charged, 4500)
        assert rest == 0
        journal = self._krea.krea()
        if not journal.has_journal():
            assert images == 0
            return 0
        with journal.open_journal() as opened:
            assert len(list(opened.all_records())) == images
        return images

    def foreign_events(self) -> int:
        """How many events on the upstream no step of its own has made."""
        storage = self.instance.event_log_storage
        records = [
            record
            for kind in ("ASSET_MATERIALIZATION", "ASSET_OBSERVATION")
            for record in storage.get_event_records(
                dg.EventRecordsFilter(dg.DagsterEventType[kind], asset_key=UPSTREAM)
            )
        ]
        return sum(record.event_log_entry.step_key is None for record in records)


def _written(table: pd.DataFrame, folder: Path) -> str:
    path = folder / "of_the_upstream.parquet"
    table.to_parquet(path)
    return str(path)


#: What an upstream returns; its IO manager keeps it as it is.
_VALUES: dict[str, Callable[[pd.DataFrame, Path], Any]] = {
    "pandas": lambda table, _: table,
    "Polars": lambda table, _: pl.from_pandas(table),
    "Arrow": lambda table, _: pa.Table.from_pandas(table),
    "a path": _written,
}


@pytest.fixture(params=["writes the file", *_VALUES])
def project(
    tmp_path: Path, emulator: Emulator, open_account: OpenAccount, request: pytest.FixtureRequest
) -> Iterator[Project]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield Project(tmp_path, instance, emulator, open_account(100.0), request.param)


def steps(result: dg.ExecuteInProcessResult) -> list[str]:
    """The steps that materialized something, in their order."""
    made = [event.step_key for event in result.all_events if event.is_step_materialization]
    return [str(step) for step in dict.fromkeys(made)]


def bucket(number: int) -> str:
    return key_for(BY, f"u-{number:02d}")


# -- one job ----------------------------------------------------------------------------------


def test_in_one_job_the_images_are_bought_after_the_table_is_made(project: Project) -> None:
    result = project.run(*BUCKETS)
    assert result.success
    assert steps(result) == ["raw__prompts", "images", "image_manifest"]
    assert project.bought() == COUNT
    assert project.foreign_events() == 0


def test_a_job_of_one_partition_makes_the_table_first_too(project: Project) -> None:
    result = project.run(bucket(0))
    assert steps(result) == ["raw__prompts", "images", "image_manifest"]
    assert project.bought() == sum(bucket(number) == bucket(0) for number in range(COUNT))


def test_an_upstream_that_repeats_itself_buys_nothing(project: Project) -> None:
    project.run(*BUCKETS)
    assert project.run(*BUCKETS).success
    assert project.bought() == COUNT


def test_three_changed_rows_are_three_images(project: Project) -> None:
    project.run(*BUCKETS)
    project.change_three_rows()
    assert project.run(*BUCKETS).success
    assert project.bought() == COUNT + 3


def test_nothing_is_bought_from_an_older_table_if_the_upstream_fails(project: Project) -> None:
    project.run(*BUCKETS)
    project.change_three_rows()
    project.run(*BUCKETS, job="krea_images")  # what was changed is not in the table yet
    project.rows[5]["prompt"] += ", at night"
    project.fails = True
    result = project.run(*BUCKETS)
    assert not result.success
    assert steps(result) == []
    assert project.bought() == COUNT


# -- automation -------------------------------------------------------------------------------


def test_what_the_upstream_changes_is_launched_and_not_its_materialization(
    project: Project,
) -> None:
    assert project.launched() == []
    alone = dg.define_asset_job("alone", selection=[UPSTREAM])
    project.defs = dg.Definitions.merge(project.defs, dg.Definitions(jobs=[alone]))
    job = project.defs.resolve_job_def("alone")

    def make_table() -> None:
        job.execute_in_process(instance=project.instance, run_config=QUIET, raise_on_error=False)

    make_table()
    assert project.launched() == BUCKETS
    project.run(*BUCKETS, job="krea_images")
    assert project.bought() == COUNT

    make_table()
    assert project.launched() == []

    project.change_three_rows()
    make_table()
    changed = sorted({bucket(number) for number in CHANGED})
    assert len(changed) < len(BUCKETS)
    assert project.launched() == changed
    for partition in changed:
        project.run(partition, job="krea_images")
    assert project.bought() == COUNT + 3

    project.rows[5]["prompt"] += ", at night"
    project.fails = True
    make_table()
    assert project.launched() == []
    assert project.foreign_events() == 0


# -- lineage ----------------------------------------------------------------------------------


def test_the_graph_goes_from_the_upstream_to_the_prompts_and_to_the_images(
    project: Project,
) -> None:
    graph = project.defs.resolve_asset_graph()
    assert graph.get(UPSTREAM).child_keys == {
        dg.AssetKey("prompts"),
        dg.AssetKey("prompt_columns"),
        IMAGES,
    }
    assert graph.get(MANIFEST).parent_keys == {IMAGES, dg.AssetKey("prompt_columns")}


def columns_from(
    instance: dg.DagsterInstance, key: dg.AssetKey
) -> dict[str, tuple[dg.AssetKey, str]]:
    """The column of another asset that each column comes from, as the UI finds it."""
    event = instance.get_latest_materialization_event(key)
    assert event is not None
    made = event.asset_materialization
    assert made is not None
    lineage = made.metadata["dagster/column_lineage"].value
    assert isinstance(lineage, dg.TableColumnLineage)
    return {
        name: (dep.asset_key, dep.column_name) for name, (dep,) in lineage.deps_by_column.items()
    }


@pytest.mark.parametrize("by", ["a run", "the sensor"])
def test_the_columns_of_the_manifest_lead_through_the_prompts_to_the_upstream(
    project: Project, by: str
) -> None:
    project.run(*BUCKETS)
    if by == "the sensor":
        project.rows.append({"prompt_id": "new", "prompt": "new", "campaign": "winter"})
        alone = dg.define_asset_job("alone", selection=[UPSTREAM])
        project.defs = dg.Definitions.merge(project.defs, dg.Definitions(jobs=[alone]))
        job = project.defs.resolve_job_def("alone")
        job.execute_in_process(instance=project.instance, run_config=QUIET)
        assert tick(project.defs, project.instance, "krea_prompts").asset_events
    manifest = columns_from(project.instance, MANIFEST)
    prompts = columns_from(project.instance, dg.AssetKey("prompts"))
    for column in ("prompt_id", "prompt", "campaign"):
        own, name = manifest[column]
        assert own == dg.AssetKey("prompts")
        assert prompts[name] == (UPSTREAM, column)
    assert set(prompts) == {"prompt_id", "prompt", "campaign"}
