"""Several prompt tables in one code location, with one journal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from krea_dagster import KreaResource, build_krea_definitions, build_krea_tables
from krea_dagster.errors import ConfigError

OFF = {"curation": False}


def tables_in(folder: Path, options: Mapping[str, Mapping[str, Any]]) -> dg.Definitions:
    """The code location of tables whose files need not exist."""
    given = {name: {"prompts": str(folder / "p.parquet"), **one} for name, one in options.items()}
    return build_krea_tables(given, krea=KreaResource(storage=str(folder / "krea")))


def keys_of(defs: dg.Definitions) -> set[str]:
    return {key.to_user_string() for key in defs.resolve_all_asset_keys()}


def test_each_table_has_its_prefix_and_the_journal_is_accounted_for_once(tmp_path: Path) -> None:
    defs = tables_in(tmp_path, {"posters": OFF, "shop/hero": OFF})
    dg.Definitions.validate_loadable(defs)
    names = ("prompts", "prompt_columns", "images", "image_manifest")
    own = {f"{prefix}/{name}" for prefix in ("posters", "shop/hero") for name in names}
    assert keys_of(defs) == own | {"spend_ledger", "spend_daily", "salvaged_images"}
    graph = defs.resolve_asset_graph()
    for prefix, group in ((["posters"], "posters"), (["shop", "hero"], "shop_hero")):
        assert graph.get(dg.AssetKey([*prefix, "images"])).group_name == group
    assert graph.get(dg.AssetKey("spend_ledger")).parent_keys == {
        dg.AssetKey(["posters", "image_manifest"]),
        dg.AssetKey(["shop", "hero", "image_manifest"]),
    }
    assert set(defs.resources or {}) == {"krea", "krea_manifest"}
    assert {job.name for job in defs.jobs or ()} == {
        "posters_krea_images", "shop_hero_krea_images", "krea_spend", "krea_proof", "krea_salvage",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "there is no prompt table"),
        ({"": {}}, "needs a key prefix"),
        ({"ads": {"spend": True}}, "'spend', which all tables have in common"),
        ({"ads": {"krea": KreaResource()}}, "'krea', which all tables have in common"),
    ],
)
def test_what_tables_have_in_common_is_given_once(
    tmp_path: Path, options: Mapping[str, Mapping[str, Any]], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        tables_in(tmp_path, options)


# -- names and switches of one table ----------------------------------------------------------


def test_three_assets_are_three_assets(tmp_path: Path) -> None:
    defs = build_krea_definitions(
        prompts=str(tmp_path / "p.parquet"),
        krea=KreaResource(),
        spend=False,
        salvage=False,
        curation=False,
    )
    dg.Definitions.validate_loadable(defs)
    # prompt_columns are the table's further columns, which only the manifest depends on.
    assert keys_of(defs) == {"prompts", "prompt_columns", "images", "image_manifest"}
    assert [job.name for job in defs.jobs or ()] == ["krea_images"]
    assert {one.name for one in defs.sensors or ()} == {"krea_prompts", "krea_retries"}


def test_a_resource_of_the_projects_own_may_be_called_krea(tmp_path: Path) -> None:
    defs = build_krea_definitions(
        prompts=str(tmp_path / "p.parquet"),
        krea=KreaResource(storage=str(tmp_path)),
        resource_key="painter",
        io_manager_key="painted",
    )
    database = dg.ResourceDefinition.hardcoded_resource("a database")
    own = dg.Definitions(resources={"krea": database, "krea_manifest": database})
    merged = dg.Definitions.merge(defs, own)
    dg.Definitions.validate_loadable(merged)
    assert set(merged.resources or {}) == {"krea", "krea_manifest", "painter", "painted"}


def test_one_key_cannot_be_resource_and_io_manager(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="are both 'krea'"):
        build_krea_definitions(
            prompts=str(tmp_path / "p.parquet"), krea=KreaResource(), io_manager_key="krea"
        )
