"""What the factory makes of a condition and a freshness policy."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import dagster as dg

from krea_dagster import KreaResource, build_krea_definitions
from krea_dagster.plugin.sensors.prompts import on_prompts_changed

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
