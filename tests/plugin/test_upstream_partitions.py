"""Prompts of a partitioned asset: the table is all of its partitions, loaded one at a time."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd
import pytest

from krea_dagster import KreaResource, build_krea_definitions, on_prompts_changed
from krea_dagster.emulator import Emulator
from tests.dagster_bench import QUIET, RANGE_END, RANGE_START, OpenAccount, failure_text, tick

pytestmark = pytest.mark.filterwarnings("ignore::dagster.BetaWarning")

DAYS = ("2026-11-02", "2026-11-03", "2026-11-04")
DAILY = dg.DailyPartitionsDefinition(DAYS[0], end_date="2026-11-05")
UPSTREAM, IMAGES = dg.AssetKey("written_prompts"), dg.AssetKey("images")


class Files(dg.ConfigurableIOManager):
    """A Parquet file for each partition, and how often it was loaded.

    Several at once are a mapping, as Dagster's own managers give them, or ``in_one`` table, as
    those of databases do.
    """

    folder: str
    in_one: bool = False

    def _path(self, key: str) -> Path:
        return Path(self.folder, f"{key}.parquet")

    def _keys(self, context: dg.OutputContext | dg.InputContext) -> list[str]:
        return list(context.asset_partition_keys) if context.has_asset_partitions else ["all"]

    def handle_output(self, context: dg.OutputContext, obj: Any) -> None:
        for key in self._keys(context):
            (obj[key] if isinstance(obj, dict) else obj).to_parquet(self._path(key))

    def load_input(self, context: dg.InputContext) -> Any:
        keys = self._keys(context)
        LOADS.update(keys)
        tables = {key: pd.read_parquet(self._path(key)) for key in keys}
        return tables if len(keys) > 1 and not self.in_one else pd.concat(tables.values())


LOADS: Counter[str] = Counter()


class Project:
    """Two prompts a day, an account, and an instance of its own."""

    def __init__(self, folder: Path, emulator: Emulator, api_key: str) -> None:
        self.folder, self.emulator, self.api_key = folder, emulator, api_key
        self.rows: dict[str, list[str]] = {day: [f"{day} a", f"{day} b"] for day in DAYS}
        self.fails = ""
        self.instance = dg.DagsterInstance.ephemeral()
        self._evaluated: dg.EvaluateAutomationConditionsResult | None = None
        LOADS.clear()

    def table(self, days: Sequence[str]) -> pd.DataFrame:
        assert self.fails not in days
        prompts = [(day, prompt) for day in days for prompt in self.rows[day]]
        table: pd.DataFrame = pd.DataFrame(prompts, columns=["day", "prompt"])
        table["prompt_id"] = table["prompt"]
        return table

    def build(
        self,
        *,
        partition_by: str = "day:day",
        partitions_def: dg.PartitionsDefinition[str] | None = DAILY,
        given: Callable[[dg.AssetsDefinition], Any] = lambda asset: asset,
        in_one: bool = False,
        **options: Any,
    ) -> None:
        def written_prompts(context: dg.AssetExecutionContext) -> Any:
            return {day: self.table([day]) for day in context.partition_keys}

        def all_prompts() -> Any:
            return self.table(DAYS)

        kept = self.folder / "values"
        kept.mkdir()
        policy = dg.BackfillPolicy.single_run() if partitions_def else None
        asset = dg.asset(key=UPSTREAM, partitions_def=partitions_def, backfill_policy=policy)(
            written_prompts if partitions_def else all_prompts
        )
        images = build_krea_definitions(
            prompts=given(asset),
            partition_by=partition_by,
            krea=KreaResource(
                api_key=self.api_key,
                base_url=self.emulator.url,
                expected_latency_s=0.02,
                storage=str(self.folder / "krea"),
            ),
            automation_condition=on_prompts_changed(),
            checks=(),
            **options,
        )
        jobs = [dg.define_asset_job("alone", selection=[UPSTREAM])]
        if partition_by == "day:day":
            both = dg.AssetSelection.assets(UPSTREAM, IMAGES, "image_manifest")
            jobs.append(dg.define_asset_job("together", selection=both))
        own = dg.Definitions(
            assets=[asset],
            jobs=jobs,
            resources={"io_manager": Files(folder=str(kept), in_one=in_one)},
        )
        self.defs = dg.Definitions.merge(images, own)

    def run(self, job: str, *partitions: str) -> dg.ExecuteInProcessResult:
        one = partitions[0] if len(partitions) == 1 else None
        many = {RANGE_START: partitions[0], RANGE_END: partitions[-1]} if partitions[1:] else {}
        return self.defs.resolve_job_def(job).execute_in_process(
            instance=self.instance,
            partition_key=one,
            tags=many,
            run_config=QUIET,
            raise_on_error=False,
        )

    def launched(self) -> list[str]:
        tick(self.defs, self.instance, "krea_prompts")
        cursor = None if self._evaluated is None else self._evaluated.cursor
        self._evaluated = dg.evaluate_automation_conditions(self.defs, self.instance, cursor=cursor)
        return sorted(map(str, self._evaluated.get_requested_partitions(IMAGES)))

    def bought(self) -> int:
        account = self.emulator.world.account(self.api_key)
        assert account is not None
        return account.charged // 4500


@pytest.fixture
def project(tmp_path: Path, emulator: Emulator, open_account: OpenAccount) -> Iterator[Project]:
    made = Project(tmp_path, emulator, open_account(100.0))
    yield made
    made.instance.dispose()


def test_days_that_run_one_by_one_keep_each_others_prompts(project: Project) -> None:
    project.build()
    for number, day in enumerate(DAYS, 1):
        assert project.run("together", day).success
        assert project.bought() == 2 * number
    tables = project.folder / "krea" / "prompt_tables"
    assert len(pd.read_parquet(tables)) == 6
    assert project.launched() == []


def test_a_range_of_days_is_one_step(project: Project) -> None:
    project.build()
    assert project.run("together", *DAYS).success
    assert project.bought() == 6
    assert dict(LOADS) == dict.fromkeys(DAYS, 1)


def test_a_day_whose_upstream_fails_buys_nothing(project: Project) -> None:
    project.build()
    project.run("together", DAYS[0])
    project.rows[DAYS[0]].append("one more")
    project.fails = DAYS[0]
    assert not project.run("together", DAYS[0]).success
    assert project.bought() == 2


def test_the_sensor_loads_only_the_days_that_were_made_again(project: Project) -> None:
    project.build()
    for day in DAYS:
        project.run("alone", day)
    assert project.launched() == list(DAYS)
    project.run("krea_images", *DAYS)
    project.run("alone", DAYS[1])
    project.launched()
    LOADS.clear()
    project.rows[DAYS[2]][0] += ", in the rain"
    project.run("alone", DAYS[2])
    assert project.launched() == [DAYS[2]]
    assert dict(LOADS) == {DAYS[2]: 1}
    project.run("krea_images", DAYS[2])
    assert project.bought() == 7


def test_images_by_hash_are_bought_from_all_days(project: Project) -> None:
    project.build(partition_by="hash:2")
    for day in DAYS:
        project.run("alone", day)
    assert project.run("krea_images", "bucket-000").success
    assert project.run("krea_images", "bucket-001").success
    assert project.bought() == 6


def test_weeks_of_images_are_bought_from_their_days(project: Project) -> None:
    project.build(partition_by="week:day", start=DAYS[0])
    for day in DAYS[:2]:
        project.run("alone", day)
    assert project.launched() == [DAYS[0]]
    # Of its days only those that exist are loaded; the IO manager decides on those that are not.
    assert not project.run("krea_images", DAYS[0]).success
    project.run("alone", DAYS[2])
    assert project.run("krea_images", DAYS[0]).success
    assert project.bought() == 6


def test_an_upstream_of_days_that_writes_the_table_itself_runs_before_images_by_hash(
    project: Project,
) -> None:
    path = project.folder / "prompts.parquet"

    @dg.asset(partitions_def=DAILY)
    def written_prompts() -> None: ...

    project.table(DAYS).to_parquet(path)
    images = build_krea_definitions(
        prompts=path,
        deps=[written_prompts],
        partition_by="hash:1",
        krea=KreaResource(
            api_key=project.api_key, base_url=project.emulator.url, storage=str(project.folder)
        ),
    )
    project.defs = dg.Definitions.merge(images, dg.Definitions(assets=[written_prompts]))
    assert project.run("krea_images", "bucket-000").success
    assert project.bought() == 6


def test_one_table_for_several_days_is_refused_and_one_day_at_a_time_is_not(
    project: Project,
) -> None:
    project.build(in_one=True)
    for day in DAYS:
        project.run("alone", day)
    result = project.run("krea_images", *DAYS)
    assert not result.success
    assert "gives one table for 3 partitions" in failure_text(result, "images")
    assert project.bought() == 0
    assert project.launched() == list(DAYS)
    for day in DAYS:
        assert project.run("krea_images", day).success
    assert project.bought() == 6


def test_new_values_of_a_column_become_partitions_that_are_launched(project: Project) -> None:
    project.build(partition_by="column:day", partitions_def=None)
    project.run("alone")
    assert project.launched() == list(DAYS)
    assert project.run("krea_images", *DAYS).success
    assert project.bought() == 6


@pytest.mark.parametrize("kind", ["key", "spec", "in"])
def test_an_asset_may_be_given_by_its_key_spec_or_as_an_input(project: Project, kind: str) -> None:
    forms: Mapping[str, Callable[[dg.AssetsDefinition], Any]] = {
        "key": lambda asset: asset.key,
        "spec": lambda asset: asset.get_asset_spec(),
        "in": lambda asset: dg.AssetIn(asset.key, dagster_type=pd.DataFrame),
    }
    project.build(partition_by="hash:1", partitions_def=None, given=forms[kind])
    project.run("alone")
    assert project.launched() == ["bucket-000"]
    assert project.run("krea_images", "bucket-000").success
    assert project.bought() == 6


def test_an_input_manager_of_ones_own_loads_the_value_for_runs_and_sensor(
    project: Project,
) -> None:
    @dg.input_manager
    def loud(context: dg.InputContext) -> Any:
        assert context.definition_metadata == {"loud": True}
        return project.table(DAYS).assign(prompt=lambda table: table["prompt"] + "!")

    project.build(
        partition_by="hash:1",
        partitions_def=None,
        given=lambda asset: dg.AssetIn(
            asset.key, input_manager_key="loud", metadata={"loud": True}
        ),
    )
    project.defs = dg.Definitions.merge(project.defs, dg.Definitions(resources={"loud": loud}))
    project.run("alone")
    assert project.launched() == ["bucket-000"]
    assert project.run("krea_images", "bucket-000").success
    manifest = pd.read_parquet(project.folder / "krea" / "manifest")
    assert manifest["prompt"].str.endswith("!").all()


def test_a_value_that_cannot_be_loaded_is_said_by_the_sensor(project: Project) -> None:
    project.build(partition_by="hash:1", partitions_def=None)
    assert "has not been materialized yet" in str(
        tick(project.defs, project.instance, "krea_prompts").skip_message
    )
    project.run("alone")
    for file in (project.folder / "values").rglob("*"):
        file.unlink()
    said = str(tick(project.defs, project.instance, "krea_prompts").skip_message)
    assert "the value of written_prompts cannot be loaded: FileNotFoundError" in said
