"""The factory, the resource's settings, and the code location that the environment describes."""

from __future__ import annotations

import runpy
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from krea_dagster import KreaManifestIOManager, KreaResource, build_krea_definitions
from krea_dagster.application.settings import Settings
from krea_dagster.emulator import Emulator
from krea_dagster.errors import ConfigError
from krea_dagster.plugin.environment import definitions_from_environment
from krea_dagster.plugin.sensors.prompts import on_prompts_changed
from krea_dagster.testing import FakeKrea, write_prompts
from tests.dagster_bench import QUIET, failure_text, posts, run_job, write_table

REPOSITORY = Path(__file__).parents[2]


def resource_of(defs: dg.Definitions) -> KreaResource:
    resource = (defs.resources or {})["krea"]
    assert isinstance(resource, KreaResource)
    return resource


# -- the resource -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [KreaResource, KreaManifestIOManager])
def test_every_setting_says_in_the_ui_what_it_is(kind: type[KreaResource]) -> None:
    fields = kind.model_fields
    assert fields
    for name, field in fields.items():
        assert (field.description or "").endswith("."), name


def test_a_misspelt_setting_is_refused_and_not_ignored() -> None:
    with pytest.raises(ValueError, match="max_inflight"):
        KreaResource(max_inflight=3)  # type: ignore[call-arg]  # the point


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_in_flight": 0},
        {"max_in_flight": 5000},
        {"on_unknown": "retry"},
        {"patience_s": 0.0},
        {"timeout_s": -1.0},
    ],
)
def test_a_setting_out_of_its_range_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        KreaResource(**wrong)


def test_run_config_replaces_all_settings_so_that_one_without_a_key_buys_nothing(
    tmp_path: Path,
    instance: dg.DagsterInstance,
    emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Dagster does not merge: what run config leaves out has its default again, also the key."""
    defs = build_krea_definitions(
        prompts=write_table(tmp_path / "p.parquet", {"prompt": ["for a partial run config"]}),
        partition_by="hash:1",
        krea=KreaResource(
            api_key="emulator",
            base_url=emulator.url,
            expected_latency_s=0.02,
            storage=str(tmp_path),
        ),
        key_prefix="partial",
    )
    monkeypatch.chdir(tmp_path)  # the default storage root is below the working folder
    before = posts(emulator)
    result = defs.resolve_job_def("partial_krea_images").execute_in_process(
        instance=instance,
        partition_key="bucket-000",
        run_config=QUIET | {"resources": {"partial_krea": {"config": {"max_in_flight": 3}}}},
        raise_on_error=False,
    )
    assert not result.success
    assert "the API key is empty" in failure_text(result, "partial__images")
    assert posts(emulator) == before


# -- several tables in one code location ------------------------------------------------------


def test_two_tables_with_prefixes_share_a_code_location_an_account_and_a_storage_root(
    tmp_path: Path, instance: dg.DagsterInstance, emulator: Emulator
) -> None:
    krea = KreaResource(
        api_key="emulator",
        base_url=emulator.url,
        expected_latency_s=0.02,
        storage=str(tmp_path / "krea"),
    )
    tables = [
        build_krea_definitions(
            prompts=write_table(
                tmp_path / f"{name}.parquet", {"prompt": [f"{name} [emulator: refuse]"]}
            ),
            partition_by="hash:1",
            krea=krea,
            key_prefix=prefix,
        )
        for name, prefix in (("ads", "ads"), ("books", ["shelf", "books"]))
    ]
    merged = dg.Definitions.merge(*tables)
    dg.Definitions.validate_loadable(merged)
    assert {key.to_user_string() for key in merged.resolve_all_asset_keys()} >= {
        f"{prefix}/{name}"
        for prefix in ("ads", "shelf/books")
        for name in ("prompts", "images", "image_manifest")
    }
    for job in ("ads_krea_images", "shelf_books_krea_images"):
        assert run_job(merged, instance, "bucket-000", job=job).success
    files = {path.relative_to(tmp_path / "krea") for path in tmp_path.rglob("bucket-000.parquet")}
    assert files == {
        Path("manifest/ads/bucket-000.parquet"),
        Path("manifest/shelf/books/bucket-000.parquet"),
    }


def test_it_merges_with_definitions_of_ones_own(tmp_path: Path) -> None:
    defs = build_krea_definitions(prompts=str(tmp_path / "p.parquet"), krea=KreaResource())
    db = dg.ResourceDefinition.hardcoded_resource("a database")
    other = dg.Definitions(assets=[dg.AssetSpec("other")], resources={"db": db})
    merged = dg.Definitions.merge(defs, other)
    assert "other" in {key.to_user_string() for key in merged.resolve_all_asset_keys()}


def test_it_merges_with_definitions_that_have_an_executor_of_their_own(tmp_path: Path) -> None:
    defs = build_krea_definitions(
        prompts=str(tmp_path / "p.parquet"), krea=KreaResource(), executor=None
    )
    merged = dg.Definitions.merge(defs, dg.Definitions(executor=dg.multiprocess_executor))
    assert merged.executor is dg.multiprocess_executor


def test_the_names_without_a_prefix_are_the_documented_ones(tmp_path: Path) -> None:
    defs = build_krea_definitions(prompts=str(tmp_path / "p.parquet"), krea=KreaResource())
    keys = {key.to_user_string() for key in defs.resolve_all_asset_keys()}
    assert keys >= {"prompts", "prompt_columns", "images", "image_manifest"}
    assert set(defs.resources or {}) == {"krea", "krea_manifest"}
    graph = defs.resolve_asset_graph()
    assert graph.get(dg.AssetKey("images")).parent_keys == {dg.AssetKey("prompts")}
    assert graph.get(dg.AssetKey("image_manifest")).parent_keys == {
        dg.AssetKey("images"),
        dg.AssetKey("prompt_columns"),
    }
    assert graph.get(dg.AssetKey("prompts")).is_external
    assert graph.get(dg.AssetKey("prompt_columns")).is_external
    assert "all_rows_delivered" in {check.name for check in graph.asset_check_keys}
    partitions = graph.get(dg.AssetKey("images")).partitions_def
    assert partitions is not None
    assert list(partitions.get_partition_keys()) == [f"bucket-{n:03d}" for n in range(8)]


def test_a_misspelt_argument_of_the_factory_is_refused() -> None:
    with pytest.raises(TypeError, match="partiton_by"):
        build_krea_definitions(  # type: ignore[call-arg]  # the point
            prompts="p.parquet", krea=KreaResource(), partiton_by="hash:2"
        )


@pytest.mark.parametrize("by", ["hash:0", "hash:x", "columns:a", "column:", "weekly", ""])
def test_a_partitioning_that_does_not_exist_is_refused_with_those_that_do(by: str) -> None:
    with pytest.raises(ConfigError, match=r"hash:N .*, column:NAME, day:NAME, week:NAME"):
        build_krea_definitions(prompts="p.parquet", krea=KreaResource(), partition_by=by)


# -- definitions.py and the environment -------------------------------------------------------


def load(monkeypatch: pytest.MonkeyPatch, **environment: str) -> dg.Definitions:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    defs = runpy.run_path(str(REPOSITORY / "definitions.py"))["defs"]
    assert isinstance(defs, dg.Definitions)
    dg.Definitions.validate_loadable(defs)
    return defs


def test_definitions_py_loads_without_a_key_and_uses_the_emulator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    krea = resource_of(load(monkeypatch))
    assert krea.emulator
    assert krea.api_key == ""


def test_definitions_py_loads_with_a_key_and_buys_from_evolink(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    krea = resource_of(load(monkeypatch, EVOLINK_API_KEY="sk-never-read-at-load"))
    assert not krea.emulator
    assert krea.base_url == "https://api.evolink.ai"
    assert isinstance(krea.api_key, dg.EnvVar)
    assert krea.api_key.env_var_name == "EVOLINK_API_KEY"


def test_every_variable_reaches_the_setting_that_it_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    defs = load(
        monkeypatch,
        EVOLINK_API_KEY="sk-1",
        EVOLINK_BASE_URL="https://gateway.example",
        KREA_PROMPTS=str(tmp_path / "p.parquet"),
        KREA_STORAGE=str(tmp_path / "made"),
        KREA_JOURNAL_URL=f"sqlite:///{tmp_path / 'j.db'}",
        KREA_PARTITION_BY="column:campaign",
        KREA_MAX_IN_FLIGHT="5",
        KREA_ON_UNKNOWN="hold",
    )
    krea = resource_of(defs)
    assert krea.base_url == "https://gateway.example"
    assert krea.storage == str(tmp_path / "made")
    assert isinstance(krea.journal_url, dg.EnvVar)
    assert krea.journal_url.get_value() == f"sqlite:///{tmp_path / 'j.db'}"
    assert (krea.max_in_flight, krea.on_unknown) == (5, "hold")
    prompts = defs.resolve_asset_graph().get(dg.AssetKey("prompts"))
    assert prompts.metadata["dagster/uri"] == str(tmp_path / "p.parquet")
    partitions = prompts.partitions_def
    assert isinstance(partitions, dg.DynamicPartitionsDefinition)
    assert partitions.name == "krea_campaign"


@pytest.mark.parametrize(
    ("value", "policy"),
    [("", dg.BackfillPolicy.single_run()), ("3", dg.BackfillPolicy.multi_run(3))],
)
def test_a_backfill_has_runs_of_as_many_partitions_as_the_environment_says(
    value: str, policy: dg.BackfillPolicy
) -> None:
    graph = definitions_from_environment({"KREA_PARTITIONS_PER_RUN": value}).resolve_asset_graph()
    assert [graph.get(key).backfill_policy for key in ASSETS] == [policy, policy]


def test_paths_do_not_depend_on_the_working_folder_of_the_process_that_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings.from_environment({})
    assert settings.prompts == str(tmp_path / "data" / "prompts.parquet")
    assert settings.storage == str(tmp_path / "data" / "krea")
    urls = {"KREA_PROMPTS": "s3://bucket/p.parquet", "KREA_STORAGE": "s3://bucket/made"}
    settings = Settings.from_environment(urls)
    assert (settings.prompts, settings.storage) == ("s3://bucket/p.parquet", "s3://bucket/made")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("KREA_ON_UNKNOWN", "retry"),
        ("KREA_MAX_IN_FLIGHT", "0"),
        ("KREA_MAX_IN_FLIGHT", "many"),
        ("KREA_MAX_IN_FLIGHT", "1e3"),
        ("KREA_MAX_IN_FLIGHT", "99999"),
        ("KREA_PARTITIONS_PER_RUN", "some"),
        ("KREA_PARTITION_BY", "weekly"),
        ("EVOLINK_BASE_URL", "https://"),
        ("EVOLINK_BASE_URL", "api.evolink.ai"),
    ],
)
def test_a_wrong_variable_is_named_with_its_value(name: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        definitions_from_environment({name: value})
    assert name in str(caught.value)
    assert value in str(caught.value)


def test_an_empty_variable_is_as_good_as_none() -> None:
    names = ("EVOLINK_API_KEY", "EVOLINK_BASE_URL", "KREA_PARTITION_BY", "KREA_MAX_IN_FLIGHT")
    assert Settings.from_environment(dict.fromkeys(names, "")) == Settings.from_environment({})


SENSOR = "krea_automation"


ASSETS = (dg.AssetKey("images"), dg.AssetKey("image_manifest"))


def test_without_a_condition_nothing_launches_runs_that_buy(tmp_path: Path) -> None:
    defs = build_krea_definitions(
        prompts=str(tmp_path / "p.parquet"), krea=KreaResource(storage=str(tmp_path))
    )
    graph = defs.resolve_asset_graph()
    assert {graph.get(key).automation_condition for key in ASSETS} == {None}
    assert SENSOR not in {one.name for one in defs.sensors or ()}


def test_a_condition_reaches_both_assets_and_brings_its_sensor_switched_on(tmp_path: Path) -> None:
    condition = on_prompts_changed()
    defs = build_krea_definitions(
        prompts=str(tmp_path / "p.parquet"),
        krea=KreaResource(storage=str(tmp_path)),
        automation_condition=condition,
    )
    graph = defs.resolve_asset_graph()
    assert [graph.get(key).automation_condition for key in ASSETS] == [condition, condition]
    assert defs.resolve_sensor_def(SENSOR).default_status is dg.DefaultSensorStatus.RUNNING


def test_a_freshness_policy_reaches_both_assets(tmp_path: Path) -> None:
    policy = dg.FreshnessPolicy.time_window(fail_window=timedelta(days=2))
    defs = build_krea_definitions(
        prompts=str(tmp_path / "p.parquet"),
        krea=KreaResource(storage=str(tmp_path)),
        freshness_policy=policy,
    )
    graph = defs.resolve_asset_graph()
    assert [graph.get(key).freshness_policy for key in ASSETS] == [policy, policy]


# -- what the UI shows --------------------------------------------------------------------------

#: Kinds that have an icon in Dagster's UI, of those that fit.
_WITH_ICON = {"arrow", "csv", "duckdb", "file", "huggingface", "json", "numpy", "parquet", "sql"}


def test_every_asset_has_the_tag_of_the_package_and_kinds_with_icons(tmp_path: Path) -> None:
    defs = build_krea_definitions(
        prompts=str(tmp_path / "p.parquet"), krea=KreaResource(emulator=True)
    )
    for spec in defs.resolve_all_asset_specs():
        assert spec.tags["krea"] == ""
        assert spec.kinds
        assert spec.kinds <= _WITH_ICON, spec.key


def test_the_storage_root_is_in_the_launchpad_once(tmp_path: Path) -> None:
    defs = build_krea_definitions(
        prompts=str(tmp_path / "p.parquet"), krea=KreaResource(emulator=True)
    )
    job = defs.resolve_job_def("krea_images")
    elsewhere = {"config": {"storage": "elsewhere"}}
    assert dg.validate_run_config(job, {"resources": {"krea": elsewhere}})
    with pytest.raises(dg.DagsterInvalidConfigError, match='unexpected config entry "storage"'):
        dg.validate_run_config(job, {"resources": {"krea_manifest": elsewhere}})


def test_the_manifests_follow_the_root_of_the_run(
    tmp_path: Path, instance: dg.DagsterInstance
) -> None:
    defs = build_krea_definitions(
        prompts=write_prompts(tmp_path),
        partition_by="hash:1",
        krea=FakeKrea(storage=str(tmp_path / "krea")),
        key_prefix="moved",
    )
    elsewhere = str(tmp_path / "elsewhere")
    config = {"resources": {"moved_krea": {"config": {"storage": elsewhere}}}, **QUIET}
    job = defs.resolve_job_def("moved_krea_images")
    result = job.execute_in_process(
        instance=instance, partition_key="bucket-000", run_config=config
    )
    FakeKrea(storage=elsewhere).close()
    assert result.success
    assert (tmp_path / "elsewhere" / "manifest" / "moved" / "bucket-000.parquet").is_file()
    assert not (tmp_path / "krea").exists()
