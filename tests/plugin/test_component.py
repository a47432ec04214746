"""The component: what its YAML says reaches the factory, and no YAML and no page shows a key."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster import ComponentTree
from dagster.components.testing import DefsFolderSandbox, create_defs_folder_sandbox

from krea_dagster import Curation, KreaImages, KreaResource, build_krea_definitions
from krea_dagster.curation.export.spec import ExportSpec
from krea_dagster.errors import ConfigError
from krea_dagster.plugin.component_sections import (
    Checks,
    CurationSettings,
    ExportSettings,
    KreaSettings,
    RowDefaults,
    ScheduleSettings,
)
from krea_dagster.plugin.scaffolder import KreaImagesParams, KreaImagesScaffolder
from krea_dagster.prompts import Defaults, PromptTable, estimate_tokens, parse_partition_by
from tests.dagster_bench import QUIET, tick, write_table
from tests.plugin.test_secrets import told_to_the_ui

DG = Path(sys.executable).with_name("dg")

#: Dagster reads its YAML by a function that Pydantic has deprecated, and notes in beta classes of
#: its own from which file a component came. What the component itself does is looked at below.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`parse_obj_as` is deprecated"),
    pytest.mark.filterwarnings("ignore::dagster.BetaWarning"),
    pytest.mark.filterwarnings("ignore:Property `ScheduleDefinition.environment_vars`"),
]

KEY = "sk-of-the-component-7Hq2"

#: Everything that the YAML takes, nothing as it is by default.
EVERYTHING: dict[str, Any] = {
    "prompts": "data/prompts.parquet",
    "prompts_options": {"anon": True},
    "prompt_columns": ["text=prompt", "n"],
    "deps": ["raw/prompts", "raw_styles"],
    "partition_by": "day:day@Europe/Berlin",
    "start": "2026-10-26",
    "krea": {
        "api_key_env": "HERO_KEY",
        "journal_url_env": "HERO_JOURNAL",
        "callback_base_url": "https://hooks.example.com",
        "callback_secret_env": "HERO_SECRET",
        "emulator": False,
        "storage": "made",
        "storage_options": {"client_kwargs": {"key": {"env": "HERO_STORE_KEY"}}},
        "base_url": "https://gateway.example",
        "max_in_flight": 5,
        "max_per_s": 2.5,
        "expected_latency_s": 12.0,
        "verify_images": False,
        "measure_images": False,
        "on_unknown": "hold",
        "run_credits": 7.5,
        "day_credits": 20,
        "budgets": ["month=900", "column:day=5"],
        "soft_budgets": ["month=800"],
        "balance_days": 7,
        "timezone": "Europe/Berlin",
        "spend_threshold": 5.0,
        "spend_by": ["campaign"],
        "credit_prices": ["70/USD", "2026-10-01=60/EUR"],
        "spend_tags": ["team"],
        "patience_s": 600,
        "outage_patience_s": 60,
        "timeout_s": 30,
        "download_timeout_s": 90,
    },
    "defaults": {"size": "16:9", "quality": "2K", "num_images": 2, "nsfw_check": True},
    "key_prefix": ["shop", "hero"],
    "group_name": "hero_images",
    "owners": ["team:art"],
    "tags": {"campaign": "hero"},
    "schedule": {"cron": "0 6 * * *", "timezone": "Europe/Berlin", "running": True},
    "resource_key": "painter",
    "io_manager_key": "painter_manifest",
    "partitions_per_run": 7,
    "launch_on_changed_prompts": True,
    "fresh_within_hours": 36,
    "pool": "painters",
    "checks": {
        "manifest_schema": {},
        "failure_share": {"warn_above": 0.02, "error_above": 0.1},
        "files": {"sample": 10, "seed": 3},
        "pictures": {"sample": None, "seed": 4},
        "spend": {"most_credits": 9, "tolerance": 0.1, "prices": {"1K": 0.5, "2K": 1.0}},
    },
    "spend_by": ["campaign"],
    "soft_budgets": ["month=500"],
    "spend_schedule": "0 7 * * *",
    "collect_later": True,
    "curation": {
        "accept": ["sharpness>=40"],
        "require_keep": True,
        "one_of_duplicates": True,
        "wanted": ["prompt=2"],
        "most_images": 5,
        "most_credits": 3.5,
        "exports": {
            "training_set": {
                "form": "webdataset",
                "splits": ["train=0.9", "validation=0.1"],
                "where": ["day=2026-11-02"],
                "everything": False,
                "columns": ["prompt", "seed"],
                "shard_images": 100,
                "shard_bytes": 1_000_000,
                "leaks": True,
                "embed_parameters": True,
                "sidecars": False,
                "captions": False,
                "kept": True,
                "earlier": False,
                "verdicts": True,
                "image_format": "jpeg",
                "quality": 90,
                "longest_side": 768,
                "mark": True,
                "certificate": "chain.pem",
                "private_key": "key.pem",
                "push": "ada/boats",
                "public": False,
                "license": "cc-by-4.0",
                "title": "Boats",
                "source": "our own",
            }
        },
    },
    "prune_partitions": True,
    "spend": True,
    "salvage": True,
    "in_process": False,
}


#: Settings that are given by the names of their variables.
_NAMED = {"api_key_env", "journal_url_env", "callback_secret_env"}


def names_of_checks(defs: dg.Definitions) -> set[str]:
    """The checks of the images and their manifest; what is made of these has its own."""
    keys = defs.resolve_asset_graph().asset_check_keys
    return {key.name for key in keys if key.asset_key.path[-1] in ("images", "image_manifest")}


@pytest.fixture
def sandbox() -> Iterator[DefsFolderSandbox]:
    with create_defs_folder_sandbox() as made:
        write_table(
            made.project_root / "data" / "prompts.parquet",
            {"prompt": ["a boat", "a kite"], "day": ["2026-11-02", "2026-11-03"]},
        )
        yield made


def add(sandbox: DefsFolderSandbox, attributes: Mapping[str, Any], *, name: str = "hero") -> Path:
    """Write the YAML of an instance into the sandbox's project."""
    return sandbox.scaffold_component(
        KreaImages,
        name,
        defs_yaml_contents={"type": "krea_dagster.KreaImages", "attributes": dict(attributes)},
    )


def built(
    sandbox: DefsFolderSandbox, attributes: Mapping[str, Any]
) -> tuple[KreaImages, dg.Definitions]:
    with sandbox.load_component_and_build_defs(add(sandbox, attributes)) as (component, defs):
        assert isinstance(component, KreaImages)
        return component, defs


def resource_of(defs: dg.Definitions, key: str = "krea") -> KreaResource:
    krea = (defs.resources or {})[key]
    assert isinstance(krea, KreaResource)
    return krea


# -- what the YAML says -----------------------------------------------------------------------


def test_this_file_says_everything_that_the_yaml_takes() -> None:
    assert set(EVERYTHING) == set(KreaImages.model_fields)
    for section, model in (
        ("krea", KreaSettings),
        ("defaults", RowDefaults),
        ("schedule", ScheduleSettings),
        ("checks", Checks),
        ("curation", CurationSettings),
    ):
        assert set(EVERYTHING[section]) == set(model.model_fields)


def test_every_setting_of_the_resource_is_in_the_yaml_with_the_same_default() -> None:
    ours = {name: field.default for name, field in KreaSettings.model_fields.items()}
    theirs = {name: field.default for name, field in KreaResource.model_fields.items()}
    by_name = {name: f"{name}_env" for name in ("api_key", "journal_url", "callback_secret")}
    assert {by_name.get(name, name) for name in theirs} == set(ours)
    same = set(ours) - {*by_name.values(), "emulator"}
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}


def test_every_option_of_a_check_is_in_the_yaml() -> None:
    checks = Checks.model_validate(EVERYTHING["checks"])
    for factory in checks.factories():
        options = set(inspect.signature(factory).parameters) - {"manifest_key", "resource_key"}
        assert options == set(factory.keywords), factory  # type: ignore[attr-defined]  # partial


def test_every_argument_of_the_factory_is_in_the_yaml_or_has_a_hook() -> None:
    arguments = set(inspect.signature(build_krea_definitions).parameters)
    said_otherwise = {
        "partitions_per_run": "backfill_policy",
        "launch_on_changed_prompts": "automation_condition",
        "fresh_within_hours": "freshness_policy",
        "in_process": "executor",
    }
    exports = EVERYTHING["curation"]["exports"]["training_set"]
    assert set(exports) == set(ExportSettings.model_fields)
    renamed = {"splits": "splits", "where": "filters"}
    said = {renamed.get(name, name) for name in ExportSettings.model_fields}
    # Names are in the columns, and prompt_ids change from export to export.
    assert said | {"partitions", "names", "prompt_ids"} == {one.name for one in fields(ExportSpec)}
    assert {"measures", *CurationSettings.model_fields} == {one.name for one in fields(Curation)}
    in_yaml = {said_otherwise.get(name, name) for name in KreaImages.model_fields}
    # A schedule is made by build_krea_schedule.
    assert (in_yaml | {"count_tokens"}) - {"schedule"} == arguments
    assert callable(KreaImages.count_tokens)


def test_all_of_it_reaches_the_definitions(
    sandbox: DefsFolderSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HERO_KEY", KEY)
    component, defs = built(sandbox, EVERYTHING)

    prefix = ["shop", "hero"]
    images = defs.resolve_assets_def(dg.AssetKey([*prefix, "images"]))
    manifest = dg.AssetKey([*prefix, "image_manifest"])
    spec = images.get_asset_spec()
    assert spec.group_name == "hero_images"
    assert spec.owners == ["team:art"]
    assert spec.tags["campaign"] == "hero"
    schedule = defs.resolve_schedule_def("shop_hero_krea_schedule")
    assert (schedule.cron_schedule, schedule.execution_timezone) == ("0 6 * * *", "Europe/Berlin")
    assert schedule.default_status is dg.DefaultScheduleStatus.RUNNING
    assert images.op.pool == "painters"
    assert images.backfill_policy == dg.BackfillPolicy.multi_run(7)
    assert spec.freshness_policy == dg.FreshnessPolicy.time_window(fail_window=timedelta(hours=36))
    partitions = images.partitions_def
    assert isinstance(partitions, dg.DailyPartitionsDefinition)
    assert partitions.get_first_partition_key() == "2026-10-26"
    assert partitions.timezone == "Europe/Berlin"
    assert defs.executor is None
    assert defs.resolve_sensor_def("shop_hero_krea_automation")
    assert defs.resolve_sensor_def("shop_hero_krea_collect")
    assert spec.automation_condition is not None

    checks = names_of_checks(defs)
    assert checks == {
        "all_rows_delivered", "manifest_schema", "failure_share", "files_whole", "pictures",
        "spend_expected",
    }  # fmt: skip
    options = [dict(one.keywords) for one in component.build_checks() or ()]  # type: ignore[attr-defined]  # partials
    assert options == list(EVERYTHING["checks"].values())
    assert isinstance(component.curation, CurationSettings)
    assert component.curation.wanted == ["prompt=2"]
    assert defs.resolve_asset_graph().has(dg.AssetKey([*prefix, "training_set"]))
    wanted = dg.AssetCheckKey(dg.AssetKey([*prefix, "accepted_images"]), "all_wanted_accepted")
    assert defs.resolve_asset_graph().get_check_spec(wanted)
    share = defs.resolve_asset_graph().get_check_spec(dg.AssetCheckKey(manifest, "failure_share"))
    assert "2.00%" in (share.description or "")

    krea = resource_of(defs, "painter")
    settings = EVERYTHING["krea"]
    for name in set(settings) - _NAMED - {"storage"}:
        assert getattr(krea, name) == settings[name], name
    assert krea.storage == str(sandbox.project_root / "made")
    columns = (
        defs.resolve_assets_def(dg.AssetKey([*prefix, "spend_daily"]))
        .specs_by_key[dg.AssetKey([*prefix, "spend_daily"])]
        .metadata["dagster/column_schema"]
    )
    assert "campaign" in [column.name for column in columns.columns]
    prompts = defs.resolve_asset_graph().get(dg.AssetKey([*prefix, "prompts"]))
    upstream = {dg.AssetKey(["raw", "prompts"]), dg.AssetKey("raw_styles")}
    assert prompts.parent_keys == upstream
    assert {dep.asset_key for dep in spec.deps} == {prompts.key, *upstream}
    uri = prompts.metadata["dagster/uri"]
    assert uri == str(sandbox.project_root / "data" / "prompts.parquet")


def test_a_prefix_may_be_text_and_names_the_group(sandbox: DefsFolderSandbox) -> None:
    _, defs = built(sandbox, {"prompts": "data/prompts.parquet", "key_prefix": "shop/hero"})
    images = defs.resolve_asset_graph().get(dg.AssetKey(["shop", "hero", "images"]))
    assert images.group_name == "shop_hero"
    assert resource_of(defs, "shop_hero_krea")


@pytest.mark.parametrize("key", ["raw/prompts", "{{ env('PROMPTS_ASSET', 'raw/prompts') }}"])
def test_prompts_may_be_an_asset_of_the_project(sandbox: DefsFolderSandbox, key: str) -> None:
    _, defs = built(sandbox, {"prompts": {"asset": key}, "krea": {"storage": "made"}})
    raw = dg.AssetKey(["raw", "prompts"])
    graph = dg.Definitions.merge(
        defs, dg.Definitions(assets=[dg.AssetSpec(raw)])
    ).resolve_asset_graph()
    assert graph.get(dg.AssetKey("prompts")).parent_keys == {raw}
    assert graph.get(dg.AssetKey("images")).parent_keys == {dg.AssetKey("prompts"), raw}
    assert graph.get(dg.AssetKey("prompts")).metadata["dagster/uri"] == str(
        sandbox.project_root / "made" / "prompt_tables" / "prompts"
    )


def test_what_is_switched_off_is_not_there(sandbox: DefsFolderSandbox) -> None:
    off = {"spend": False, "salvage": False, "curation": False}
    _, defs = built(sandbox, {"prompts": "data/prompts.parquet", **off})
    assert {key.to_user_string() for key in defs.resolve_all_asset_keys()} == {
        "prompts", "prompt_columns", "images", "image_manifest",
    }  # fmt: skip


def test_the_defaults_of_a_row_decide_what_is_bought(
    sandbox: DefsFolderSandbox, tmp_path: Path
) -> None:
    wide = {"size": "16:9", "num_images": 2}
    _, defs = built(sandbox, {"prompts": "data/prompts.parquet", "defaults": wide})
    source = str(sandbox.project_root / "data" / "prompts.parquet")
    by = parse_partition_by("hash:8")
    expected = PromptTable(source, by, defaults=Defaults(size="16:9", num_images=2)).versions()
    assert expected != PromptTable(source, by).versions()
    with dg.DagsterInstance.ephemeral() as instance:
        told = {
            event.partition: (event.tags or {})["dagster/data_version"]
            for event in tick(defs, instance, "krea_prompts").asset_events
            if isinstance(event, dg.AssetMaterialization)
            and event.asset_key == dg.AssetKey("prompts")
        }
    assert told == expected


def test_what_is_left_out_is_as_the_factory_has_it(tmp_path: Path) -> None:
    prompts, storage = str(tmp_path / "prompts.parquet"), str(tmp_path / "krea")
    component = KreaImages(prompts=prompts, krea=KreaSettings(storage=storage))
    defs = component.build_defs(ComponentTree.for_test().load_context)
    plain = build_krea_definitions(
        prompts=prompts, krea=KreaResource(emulator=True, storage=storage)
    )
    assert resource_of(defs) == resource_of(plain)
    assert defs.executor is plain.executor
    # But for the line of this file that built them.
    component_told, plain_told = (
        re.sub(r'"line_number": \d+', "", told_to_the_ui(one)) for one in (defs, plain)
    )
    assert component_told == plain_told


def test_a_schedule_is_off_until_it_is_turned_on(sandbox: DefsFolderSandbox) -> None:
    given = {"prompts": "data/prompts.parquet", "schedule": "30 5 * * *"}
    schedule = built(sandbox, given)[1].resolve_schedule_def("krea_schedule")
    assert schedule.cron_schedule == "30 5 * * *"
    assert schedule.default_status is dg.DefaultScheduleStatus.STOPPED


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"schedule": "at noon"}, "schedule cannot be used: .*at noon"),
        ({"partition_by": "columns:day"}, "partition_by is 'columns:day'"),
        ({"krea": {"budgets": ["mont=9"]}}, "budget 'mont=9' is invalid"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_by_its_key_when_the_project_is_loaded(
    tmp_path: Path, wrong: dict[str, Any], words: str
) -> None:
    component = KreaImages.resolve_from_dict({"prompts": str(tmp_path / "p.parquet"), **wrong})
    with pytest.raises(ConfigError, match=words):
        component.build_defs(ComponentTree.for_test().load_context)


def test_a_url_is_not_taken_for_a_path_of_the_project(sandbox: DefsFolderSandbox) -> None:
    urls = {"prompts": "memory://shop/prompts.parquet", "krea": {"storage": "memory://shop/krea"}}
    _, defs = built(sandbox, urls)
    assert resource_of(defs).storage == "memory://shop/krea"
    prompts = defs.resolve_asset_graph().get(dg.AssetKey("prompts"))
    assert prompts.metadata["dagster/uri"] == "memory://shop/prompts.parquet"


@pytest.mark.parametrize(
    ("partition_by", "kind"),
    [
        ("hash:3", dg.StaticPartitionsDefinition),
        ("column:day", dg.DynamicPartitionsDefinition),
        ("day:day", dg.DailyPartitionsDefinition),
        ("week:day", dg.WeeklyPartitionsDefinition),
        ("month:day", dg.MonthlyPartitionsDefinition),
        ("day:day,column:prompt", dg.MultiPartitionsDefinition),
    ],
)
def test_each_partitioning_is_a_word_in_the_yaml(
    sandbox: DefsFolderSandbox, partition_by: str, kind: type
) -> None:
    _, defs = built(sandbox, {"prompts": "data/prompts.parquet", "partition_by": partition_by})
    images = defs.resolve_assets_def(dg.AssetKey("images"))
    assert type(images.partitions_def) is kind


def test_a_partitioning_that_does_not_exist_is_told_when_the_project_is_loaded(
    sandbox: DefsFolderSandbox,
) -> None:
    path = add(sandbox, {"prompts": "p.parquet", "partition_by": "weekly"})
    with (
        pytest.raises(Exception, match="hero") as caught,
        sandbox.load_component_and_build_defs(path),
    ):
        pass
    causes = [caught.value, caught.value.__cause__]
    assert any(isinstance(one, ConfigError) and "weekly" in str(one) for one in causes)


class Owned(KreaImages):
    """Somebody owns its assets."""

    def get_asset_spec(self, spec: dg.AssetSpec) -> dg.AssetSpec:
        return spec.replace_attributes(owners=["team:art"])


def test_building_the_definitions_warns_of_nothing(tmp_path: Path) -> None:
    component = Owned(
        prompts=str(tmp_path / "prompts.parquet"),
        partitions_per_run=3,
        fresh_within_hours=36,
        launch_on_changed_prompts=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        defs = component.build_defs(ComponentTree.for_test().load_context)
    assert defs.resolve_job_def("krea_images")


def test_two_instances_of_the_same_names_are_told_to_have_prefixes(
    sandbox: DefsFolderSandbox,
) -> None:
    for name in ("ads", "shop"):
        add(sandbox, {"prompts": "data/prompts.parquet"}, name=name)
    with pytest.raises(Exception, match=r"ads|shop") as caught, sandbox.build_all_defs():
        pass
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, ConfigError):
        error = error.__cause__
    assert "several KreaImages have the key_prefix ''" in str(error)


def test_two_instances_with_prefixes_of_their_own_share_a_project(
    sandbox: DefsFolderSandbox,
) -> None:
    for name in ("ads", "shop"):
        add(
            sandbox,
            {"prompts": "data/prompts.parquet", "partition_by": "column:day", "key_prefix": [name]},
            name=name,
        )
    with sandbox.build_all_defs() as defs:
        dg.Definitions.validate_loadable(defs)
        keys = {key.to_user_string() for key in defs.resolve_all_asset_keys()}
        for name in ("ads", "shop"):
            assert {f"{name}/images", f"{name}/image_manifest", f"{name}/prompts"} <= keys
            assert defs.resolve_job_def(f"{name}_krea_images")
            assert resource_of(defs, f"{name}_krea").emulator
            partitions = defs.resolve_assets_def(dg.AssetKey([name, "images"])).partitions_def
            assert isinstance(partitions, dg.DynamicPartitionsDefinition)
            assert partitions.name == f"{name}_krea_day"


# -- the key ----------------------------------------------------------------------------------


def test_the_key_and_the_journals_url_are_given_by_name_and_shown_by_name(
    sandbox: DefsFolderSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "postgresql://me:hunter2@db.example/krea"
    monkeypatch.setenv("HERO_KEY", KEY)
    monkeypatch.setenv("HERO_JOURNAL", url)
    component, defs = built(sandbox, EVERYTHING)
    krea = resource_of(defs, "painter")
    assert isinstance(krea.api_key, dg.EnvVar)
    assert isinstance(krea.journal_url, dg.EnvVar)
    assert (krea.api_key.env_var_name, krea.journal_url.env_var_name) == (
        "HERO_KEY",
        "HERO_JOURNAL",
    )
    assert (krea.api_key.get_value(), krea.journal_url.get_value()) == (KEY, url)

    shown = [
        told_to_the_ui(defs),
        repr(krea),
        repr(component),
        repr(krea.get_resource_definition()),
    ]
    assert "HERO_KEY" in shown[0]
    for text in shown:
        assert KEY not in text
        assert "hunter2" not in text


def test_without_the_variable_the_emulator_draws(
    sandbox: DefsFolderSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HERO_KEY", raising=False)
    attributes = {"prompts": "data/prompts.parquet", "krea": {"api_key_env": "HERO_KEY"}}
    assert resource_of(built(sandbox, attributes)[1]).emulator
    monkeypatch.setenv("HERO_KEY", "")
    assert resource_of(built(sandbox, attributes)[1]).emulator
    monkeypatch.setenv("HERO_KEY", KEY)
    assert not resource_of(built(sandbox, attributes)[1]).emulator


@pytest.mark.parametrize("emulator", [True, False])
def test_the_emulator_can_be_chosen_and_forbidden(
    sandbox: DefsFolderSandbox, monkeypatch: pytest.MonkeyPatch, emulator: bool
) -> None:
    monkeypatch.setenv("HERO_KEY", KEY) if emulator else monkeypatch.delenv("HERO_KEY", False)
    krea = {"api_key_env": "HERO_KEY", "emulator": emulator}
    made = resource_of(built(sandbox, {"prompts": "data/prompts.parquet", "krea": krea})[1])
    assert made.emulator is emulator
    if emulator:
        assert made.api_key == ""
    else:
        with pytest.raises(ConfigError, match="the variable HERO_KEY is not set"):
            made.krea()


def test_a_run_without_the_journals_variable_buys_nothing_by_another_journal(
    sandbox: DefsFolderSandbox, monkeypatch: pytest.MonkeyPatch, instance: dg.DagsterInstance
) -> None:
    monkeypatch.delenv("HERO_JOURNAL", raising=False)
    krea = {"journal_url_env": "HERO_JOURNAL", "emulator": True}
    _, defs = built(sandbox, {"prompts": "data/prompts.parquet", "krea": krea})
    with pytest.raises(dg.DagsterInvalidConfigError, match="HERO_JOURNAL"):
        defs.resolve_job_def("krea_images").execute_in_process(
            instance=instance, partition_key="bucket-000", run_config=QUIET
        )
    assert not (sandbox.project_root / "data" / "krea").exists()


# -- subclasses -------------------------------------------------------------------------------

OWN = '''
import dagster as dg
from functools import partial
from krea_dagster import KreaImages, build_images_check

class Own(KreaImages):
    """A custom component with another field."""

    owner: str

    def build_resource(self, context):
        return super().build_resource(context).model_copy(update={"max_in_flight": 3})

    def build_checks(self):
        return [partial(build_images_check, sample=1)]

    def get_asset_spec(self, spec):
        return spec.replace_attributes(owners=[self.owner])

    def count_tokens(self, prompt):
        return 1000 if "kite" in prompt else 1
'''


def test_a_subclass_changes_what_yaml_cannot_say(
    sandbox: DefsFolderSandbox, tmp_path: Path
) -> None:
    path = add(sandbox, {"prompts": "data/prompts.parquet", "owner": "team:art"})
    (path / "own.py").write_text(OWN)
    file = path / "defs.yaml"
    file.write_text(file.read_text().replace("krea_dagster.KreaImages", ".own.Own"))
    with sandbox.load_component_and_build_defs(path) as (_, defs):
        assert resource_of(defs).max_in_flight == 3
        checks = names_of_checks(defs)
        assert checks == {"all_rows_delivered", "pictures"}
        for key in ("images", "image_manifest", "prompts"):
            assert defs.resolve_asset_graph().get(dg.AssetKey(key)).owners == ["team:art"]
        with dg.DagsterInstance.ephemeral() as instance:
            assert "1000 tokens" in str(tick(defs, instance, "krea_prompts").skip_message)


def test_tokens_are_estimated_by_whole_columns_unless_a_subclass_counts(
    sandbox: DefsFolderSandbox,
) -> None:
    component, _ = built(sandbox, {"prompts": "data/prompts.parquet"})
    assert component._counter() is estimate_tokens
    assert component.count_tokens("a boat at dawn") == estimate_tokens("a boat at dawn")


# -- dg ---------------------------------------------------------------------------------------

PROJECT = """\
[project]
name = "hero"
version = "0.1.0"
requires-python = ">=3.10"

[tool.dg]
directory_type = "project"

[tool.dg.project]
root_module = "hero"
"""

YAML = """\
type: krea_dagster.KreaImages

attributes:
  prompts: data/prompts.parquet
  krea:
    api_key_env: HERO_KEY
    storag: data/krea
  partiton_by: hash:2
  checks:
    files:
      sampel: 3
"""


def home_in(project: Path) -> Path:
    """Make an empty project, and return the folder of its component."""
    home = project / "src" / "hero" / "defs" / "hero"
    home.parent.mkdir(parents=True)
    (project / "pyproject.toml").write_text(PROJECT)
    for folder in (home.parent.parent, home.parent):
        (folder / "__init__.py").touch()
    return home


def run_dg(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DAGSTER_DISABLE_TELEMETRY": "1", "COLUMNS": "120"}
    environment["PATH"] = f"{DG.parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        [str(DG), *words],
        cwd=project, env=environment, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip


def test_a_new_component_shows_its_limits_and_its_variable(tmp_path: Path) -> None:
    home = home_in(tmp_path)
    home.mkdir()
    request = dg.ScaffoldRequest(
        type_name="krea_dagster.KreaImages",
        target_path=home,
        scaffold_format="yaml",
        project_root=tmp_path,
        params=KreaImagesParams(api_key_env="HERO_KEY"),
    )
    KreaImagesScaffolder().scaffold(request)
    text = (home / "defs.yaml").read_text()
    assert "# run_credits: " in text
    assert "# day_credits: " in text
    assert "# collect_later: " in text
    # What is commented out can be used.
    content = yaml.safe_load(text.replace("# run_", "run_").replace("# collect", "collect"))
    component = KreaImages.resolve_from_dict(content["attributes"])
    assert component.krea.run_credits == 10
    assert component.collect_later
    listed = run_dg(tmp_path, "list", "envs")
    assert "HERO_KEY" in listed.stdout, listed.stderr


def test_dg_check_yaml_finds_each_typo_at_its_line(tmp_path: Path) -> None:
    home = home_in(tmp_path)
    home.mkdir()
    (home / "defs.yaml").write_text(YAML)
    done = run_dg(tmp_path, "check", "yaml")
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    for line, word in enumerate(YAML.splitlines(), 1):
        if any(typo in word for typo in ("storag:", "partiton_by", "sampel")):
            (typo,) = word.split(":")[:1]
            assert f"defs.yaml:{line} " in said, said
            assert f"'{typo.strip()}' was unexpected" in said
    assert said.count("was unexpected") == 6, "each is said in a line and at its place"
