"""What was spent stays where it was spent: the table of the day of the purchase is kept with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import dagster as dg
import pytest

from krea_dagster.application.buy_options import BuyOptions
from krea_dagster.application.run import run
from krea_dagster.application.spend import answer_of, spend_of
from krea_dagster.plugin.definitions import build_krea_definitions
from krea_dagster.prompts import PromptTable, parse_partition_by
from krea_dagster.spend.tables.query import SpendLine
from tests.dagster_bench import QUIET
from tests.spend.project_harness import ProjectHarness


def materialize(project: ProjectHarness, run_id: str, **options: Any) -> None:
    run(project.krea, project.table, None, BuyOptions(**options), run_id=run_id)


def changed(project: ProjectHarness, name: str, **values: Any) -> ProjectHarness:
    rows = [{**row, **(values if row["prompt_id"] == name else {})} for row in project.rows]
    return replace(project, rows=rows)


def without(project: ProjectHarness, name: str) -> ProjectHarness:
    return replace(project, rows=[row for row in project.rows if row["prompt_id"] != name])


def by_campaign(project: ProjectHarness) -> Mapping[str | None, SpendLine]:
    return {line.of[0]: line for line in spend_of(project.krea, ["campaign"]).lines}


@pytest.fixture
def campaigns(project: ProjectHarness) -> ProjectHarness:
    """Two rows of makers and two of postcards, one of which was replaced, with spend_by."""
    project = project.with_settings(spend_by=["campaign"])
    project = project.with_rows("ash", "birch", campaign="makers")
    project = project.with_rows("cedar", "date", campaign="postcards")
    materialize(project, "run-1")
    materialize(project, "run-2", regenerate=["cedar"])
    return project


def test_a_renamed_campaign_keeps_what_was_bought_for_it(campaigns: ProjectHarness) -> None:
    before = by_campaign(campaigns)
    renamed = changed(changed(campaigns, "ash", campaign="new"), "birch", campaign="new")
    materialize(renamed, "run-3")
    assert by_campaign(renamed) == before
    assert before["makers"].purchases == 2
    query = "SELECT campaign, today_campaign FROM attribution WHERE prompt_id = 'ash'"
    assert answer_of(renamed.krea, query).to_pylist() == [
        {"campaign": "makers", "today_campaign": "new"}
    ]


def test_a_row_that_left_the_table_keeps_its_campaign_and_its_replaced_image(
    campaigns: ProjectHarness,
) -> None:
    before = by_campaign(campaigns)
    assert (before["postcards"].purchases, before["postcards"].replaced) == (3, 1)
    assert before["postcards"].accepted == 2
    removed = without(campaigns, "cedar")
    materialize(removed, "run-3")
    after = by_campaign(removed)
    assert after == before
    prompts = {line.of[0] for line in spend_of(removed.krea, ["prompt_id"]).lines}
    assert prompts == {"ash", "birch", "cedar", "date"}


def test_purchases_of_an_older_version_follow_todays_table_and_it_says_so(
    campaigns: ProjectHarness,
) -> None:
    campaigns.sql("UPDATE submissions SET prompt_id = NULL, sample = NULL, attribution_id = NULL")
    renamed = changed(campaigns, "ash", campaign="new")
    materialize(renamed, "run-3")
    spend = spend_of(renamed.krea, ["campaign"])
    assert {line.of[0]: line.purchases for line in spend.lines} == {
        "makers": 1, "new": 1, "postcards": 3,
    }  # fmt: skip
    assert spend.from_today == {"campaign": 5}
    kinds = answer_of(renamed.krea, "SELECT DISTINCT attribution FROM ledger").to_pylist()
    assert kinds == [{"attribution": "today"}]


def test_a_purchase_says_the_asset_job_backfill_user_and_tags_of_its_run(
    project: ProjectHarness, instance: dg.DagsterInstance
) -> None:
    project = project.with_rows("ash", campaign="makers").with_settings(spend_tags=["team"])
    defs = build_krea_definitions(
        prompts=project.table.source,
        krea=project.resource,
        partition_by="hash:1",
        key_prefix="shop",
        spend_by=["campaign"],
        curation=False,
    )
    result = defs.resolve_job_def("shop_krea_images").execute_in_process(
        instance=instance,
        partition_key="bucket-000",
        run_config=QUIET,
        tags={"team": "art", "secret": "no", "user": "ann", "dagster/backfill": "bf-1"},
    )
    assert result.success
    query = 'SELECT asset, job, backfill, "user", tags, attributes FROM ledger'
    assert answer_of(project.krea, query).to_pylist() == [
        {
            "asset": "shop/images",
            "job": "shop_krea_images",
            "backfill": "bf-1",
            "user": "ann",
            "tags": '{"team":"art"}',
            "attributes": '{"campaign":"makers"}',
        }
    ]


def test_a_name_that_the_table_does_not_have_is_said_before_anything_is_bought(
    project: ProjectHarness,
) -> None:
    project = project.with_rows("ash", campaign="makers").with_settings(spend_by=["campain"])
    (note,) = project.krea.quote(project.table).notes
    assert "names 'campain', which the prompt table does not have" in note
    assert note.endswith("campaign")
    known = project.with_settings(spend_by=["campaign"])
    assert known.krea.quote(known.table).notes == []


def test_an_image_that_two_rows_share_is_charged_to_the_first(project: ProjectHarness) -> None:
    project = project.with_settings(spend_by=["campaign"])
    same = {"prompt": f"one image of {project.folder.name}", "seed": 7}
    project = project.with_rows("ash", campaign="makers", **same)
    project = project.with_rows("birch", campaign="postcards", **same)
    materialize(project, "run-1")
    first = project.images()[0].prompt_id
    (line,) = spend_of(project.krea, ["prompt_id", "campaign"]).lines
    assert line.of == (first, {"ash": "makers", "birch": "postcards"}[first])
    assert (line.reused, line.saved_units) == (1, 4_500)


def test_rows_of_a_table_that_is_cut_in_another_way_count_once(project: ProjectHarness) -> None:
    """Its old manifests stay, and list each row again."""
    project = project.with_rows("ash", "birch", campaign="makers")
    materialize(project, "run-1")
    krea = project.krea
    other = PromptTable(project.table.source, parse_partition_by("column:campaign"))
    run(krea, other, None, BuyOptions(), run_id="run-2")
    (total,) = spend_of(krea, ["model"]).lines
    assert (total.purchases, total.reused, total.saved_units) == (2, 0, 0)
