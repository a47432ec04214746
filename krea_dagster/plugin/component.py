"""The component for ``dg``: the arguments of ``build_krea_definitions`` as YAML."""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import dagster as dg
from pydantic import Field

from krea_dagster.application.curation import Curation
from krea_dagster.application.settings import Settings
from krea_dagster.curation.measures.custom import Measure
from krea_dagster.errors import ConfigError
from krea_dagster.plugin.checks import CheckFactory
from krea_dagster.plugin.component_sections import (
    BY_NAME,
    AssetPrompts,
    Checks,
    CurationSettings,
    KreaSettings,
    RowDefaults,
    ScheduleSettings,
)
from krea_dagster.plugin.definitions import build_krea_definitions, with_changed_specs
from krea_dagster.plugin.names import prefix_of
from krea_dagster.plugin.partitions import backfill_policy_of
from krea_dagster.plugin.resource import KreaResource
from krea_dagster.plugin.scaffolder import KreaImagesScaffolder
from krea_dagster.plugin.schedules import build_krea_schedule
from krea_dagster.plugin.sensors.prompts import on_prompts_changed
from krea_dagster.plugin.yaml_section import TEMPLATE, YamlSection
from krea_dagster.prompts import Defaults, estimate_tokens


def _prompts_of(context: dg.ResolutionContext, value: Any) -> AssetPrompts | str:
    """Read ``prompts``, which is a path, a URL, or a section that names an asset."""
    if isinstance(value, str):
        return value
    settings: AssetPrompts = AssetPrompts.resolve_from_model(context, value)
    return settings


def _schedule_of(context: dg.ResolutionContext, value: Any) -> ScheduleSettings | str | bool:
    """Read the section ``schedule``, which may also be a cron expression, true or false."""
    if isinstance(value, bool | str):
        return value
    settings: ScheduleSettings = ScheduleSettings.resolve_from_model(context, value)
    return settings


def _curation_of(context: dg.ResolutionContext, value: Any) -> CurationSettings | bool:
    """Read the section ``curation``, which may also be true or false."""
    if isinstance(value, bool):
        return value
    settings: CurationSettings = CurationSettings.resolve_from_model(context, value)
    return settings


@dg.scaffold_with(KreaImagesScaffolder)
class KreaImages(dg.Component, YamlSection):
    """Images of Krea 2 Turbo from a Parquet prompt table: each bought once, and verified.

    It builds the assets, jobs, sensors and checks of ``build_krea_definitions``. Several instances
    in one project need different ``key_prefix`` values.

    Override its methods for what YAML cannot express: ``build_resource``, ``build_checks``,
    ``build_measures`` (custom measures), ``get_asset_spec`` (changes any asset) and
    ``count_tokens``.

    Example::

        type: krea_dagster.KreaImages
        attributes:
          prompts: data/prompts.parquet
          partition_by: column:campaign
          krea:
            storage: data/krea
    """

    prompts: Annotated[
        AssetPrompts | str,
        dg.Resolver(
            _prompts_of, model_field_type=AssetPrompts.model() | str, inject_before_resolve=True
        ),
    ] = Field(
        description=(
            "The prompt table: a Parquet file or a folder below the project's root, or a URL; or "
            "{asset: KEY} for the value of an asset of the project."
        )
    )
    prompts_options: dict[str, Any] = Field(
        default={},
        description=(
            "How fsspec opens the table's URL; by default as krea.storage_options, if both URLs "
            "are of the same kind. A value {env: NAME} names a variable."
        ),
    )
    prompt_columns: list[str] = Field(
        default=[], description=Settings.model_fields["prompt_columns"].description
    )
    deps: list[str] = Field(
        default=[],
        description=(
            "Keys of the assets that write the table, such as raw/prompts. In a job with them the "
            "images are bought after they have run."
        ),
    )
    partition_by: str = Field(
        default="hash:8",
        description=(
            "hash:N, column:NAME, day:NAME, week:NAME, month:NAME, in a time zone "
            "day:NAME@Europe/Berlin, with a column day:NAME,column:NAME."
        ),
        json_schema_extra={"pattern": rf"^(hash|column|day|week|month):.|{TEMPLATE}"},
    )
    start: str | None = Field(
        default=None, description="First day of partitions by time; by default the table's first."
    )
    krea: KreaSettings = Field(
        default_factory=KreaSettings, description="How to reach EvoLink, and where to keep images."
    )
    defaults: RowDefaults = Field(
        default_factory=RowDefaults, description="Values for what a row leaves open."
    )
    key_prefix: list[str] | str = Field(
        default=[],
        description="Prefix of the assets' keys, and of all names: hero, shop/hero or a list.",
    )
    group_name: str | None = Field(
        default=None, description="Group of the assets; by default the prefix, krea without one."
    )
    owners: list[str] = Field(
        default=[], description="Owners of the assets: an address, or team:NAME."
    )
    tags: dict[str, str] = Field(default={}, description="Tags of the assets.")
    resource_key: str | None = Field(
        default=None,
        description=(
            "Key of the resource, by default krea with the prefix; choose another if the project "
            "has its own resource of that name."
        ),
    )
    io_manager_key: str | None = Field(
        default=None,
        description="Key of the manifest's IO manager, by default krea_manifest with the prefix.",
    )
    partitions_per_run: int | None = Field(
        default=None,
        ge=1,
        description=Settings.model_fields["partitions_per_run"].description,
    )
    launch_on_changed_prompts: bool = Field(
        default=False,
        description="Launch runs, which buy images, when prompts have changed.",
    )
    schedule: Annotated[
        ScheduleSettings | str | bool,
        dg.Resolver(
            _schedule_of,
            model_field_type=ScheduleSettings.model() | str | bool,
            inject_before_resolve=True,
        ),
    ] = Field(
        default=False,
        description=(
            "A schedule of the job: true for its usual time, a cron expression, or both with a "
            "time zone. It is off until it is turned on."
        ),
    )
    collect_later: bool = Field(
        default=False,
        description=(
            "Runs submit and end, so that no worker waits. A sensor launches the runs that "
            "collect, when callbacks arrive or images should be finished."
        ),
    )
    prune_partitions: bool = Field(
        default=False,
        description=(
            "Remove partitions by a column whose value has left the table, once no run of them is "
            "under way. Their events, manifests, images and purchases stay."
        ),
    )
    curation: Annotated[
        CurationSettings | bool,
        dg.Resolver(_curation_of, model_field_type=CurationSettings.model() | bool),
    ] = Field(
        default_factory=CurationSettings,
        description=(
            "Which images are accepted, and how many are wanted; false leaves out its assets."
        ),
    )
    spend: bool = Field(
        default=True,
        description=(
            "Build the spend tables and the proof. They contain all purchases of the journal: of "
            "several tables that share one, only one should have them."
        ),
    )
    salvage: bool = Field(
        default=True,
        description="Build the salvage, which collects paid images that runs left behind.",
    )
    fresh_within_hours: float | None = Field(
        default=None,
        gt=0,
        description="Hours without a materialization after which images count as stale.",
    )
    pool: str | None = Field(
        default="krea", description="Pool that limits the steps that buy, across runs."
    )
    checks: Checks | None = Field(
        default=None,
        description="Asset checks of image_manifest; by default the cheap ones.",
    )
    spend_by: list[str] = Field(
        default=[],
        description="Further columns of the table that the daily spend is grouped by.",
    )
    soft_budgets: list[str] = Field(
        default=[],
        description="Budgets that warn and stop nothing, written as krea.budgets.",
    )
    spend_schedule: str | None = Field(
        default=None,
        description=(
            "When the job krea_spend updates the spend tables and looks for warnings, such as "
            "0 7 * * *, in krea.timezone. It buys nothing, so it is on once it is given."
        ),
    )
    in_process: bool = Field(
        default=True,
        description=(
            "Run the steps in the run's own process, because they wait for the network. Set it to "
            "false if the project defines another executor."
        ),
    )

    def build_resource(self, context: dg.ComponentLoadContext) -> KreaResource:
        """Return the resource of the assets."""
        settings = self.krea.model_dump(exclude=BY_NAME)
        settings["storage"] = _in_project(self.krea.storage, context)
        emulator = self.krea.emulator
        if emulator is None:
            emulator = not os.environ.get(self.krea.api_key_env)
        # By name: Dagster shows the name of a variable, and the text of a string.
        url_env, secret_env = self.krea.journal_url_env, self.krea.callback_secret_env
        return KreaResource(
            **settings,
            emulator=emulator,
            api_key="" if emulator else dg.EnvVar(self.krea.api_key_env),
            journal_url=dg.EnvVar(url_env) if url_env else "",
            callback_secret=dg.EnvVar(secret_env) if secret_env else "",
        )

    def build_checks(self) -> Sequence[CheckFactory] | None:
        """Return factories of the checks of ``image_manifest``; None for those that cost little."""
        return None if self.checks is None else self.checks.factories()

    def build_measures(self) -> Sequence[Measure]:
        """Return the custom measures of ``image_measures``; none by default."""
        return ()

    def count_tokens(self, prompt: str) -> int:
        """Return the number of tokens of a prompt; by default an estimate without a tokenizer."""
        return estimate_tokens(prompt)

    def get_asset_spec(self, spec: dg.AssetSpec) -> dg.AssetSpec:
        """Return the changed spec of an asset; unchanged by default."""
        return spec

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        """Build the definitions. Raises ConfigError for a setting that cannot be used."""
        self._refuse_shared_prefix(context)
        fresh_hours = self.fresh_within_hours
        defs = build_krea_definitions(
            prompts=self._prompts(context),
            prompts_options=self.prompts_options,
            prompt_columns=self.prompt_columns,
            deps=[dg.AssetKey.from_user_string(key) for key in self.deps],
            krea=self.build_resource(context),
            partition_by=self.partition_by,
            start=self.start,
            defaults=Defaults(**self.defaults.model_dump()),
            count_tokens=self._counter(),
            key_prefix=self.key_prefix,
            group_name=self.group_name,
            resource_key=self.resource_key,
            io_manager_key=self.io_manager_key,
            owners=self.owners,
            tags=self.tags,
            backfill_policy=backfill_policy_of(self.partitions_per_run),
            automation_condition=on_prompts_changed() if self.launch_on_changed_prompts else None,
            freshness_policy=(
                None
                if fresh_hours is None
                else dg.FreshnessPolicy.time_window(fail_window=timedelta(hours=fresh_hours))
            ),
            pool=self.pool,
            checks=self.build_checks(),
            spend_by=self.spend_by,
            soft_budgets=self.soft_budgets,
            spend_schedule=self.spend_schedule,
            collect_later=self.collect_later,
            prune_partitions=self.prune_partitions,
            curation=self._curation(),
            spend=self.spend,
            salvage=self.salvage,
            executor=dg.in_process_executor if self.in_process else None,
        )
        schedules = dg.Definitions(schedules=self._schedules(defs))
        return dg.Definitions.merge(with_changed_specs(defs, self.get_asset_spec), schedules)

    def _refuse_shared_prefix(self, context: dg.ComponentLoadContext) -> None:
        """Refuse another instance with the same names, before Dagster finds the same keys."""
        prefix = prefix_of(self.key_prefix)
        every = context.component_tree.get_all_components(KreaImages)
        if sum(prefix_of(one.key_prefix) == prefix for one in every) > 1:
            shown = "/".join(prefix)
            raise ConfigError(
                f"several KreaImages have the key_prefix {shown!r}, and so the same names: give "
                "each its own, such as key_prefix: posters"
            )

    def _schedules(self, defs: dg.Definitions) -> list[dg.ScheduleDefinition]:
        given = self.schedule
        if given is False:
            return []
        if isinstance(given, bool | str):
            given = ScheduleSettings(cron=given if isinstance(given, str) else None)
        status = dg.DefaultScheduleStatus
        try:
            schedule = build_krea_schedule(
                defs,
                cron_schedule=given.cron,
                execution_timezone=given.timezone,
                key_prefix=self.key_prefix,
                default_status=status.RUNNING if given.running else status.STOPPED,
            )
        except dg.DagsterInvalidDefinitionError as error:
            raise ConfigError(f"schedule cannot be used: {error}") from error
        return [schedule]

    def _curation(self) -> Curation | bool:
        if self.curation is False:
            return False
        settings = CurationSettings() if self.curation is True else self.curation
        return settings.curation(self.build_measures())

    def _prompts(self, context: dg.ComponentLoadContext) -> str | dg.AssetKey:
        if isinstance(self.prompts, AssetPrompts):
            key: dg.AssetKey = dg.AssetKey.from_user_string(self.prompts.asset)
            return key
        return _in_project(self.prompts, context)

    def _counter(self) -> Callable[[str], int]:
        # The estimate itself: a table applies it to whole columns.
        own = type(self).count_tokens is not KreaImages.count_tokens
        return self.count_tokens if own else estimate_tokens


def _in_project(place: str, context: dg.ComponentLoadContext) -> str:
    """Make a path below the project's root absolute; leave URLs and absolute paths."""
    return place if "://" in place else str(Path(context.project_root, place))
