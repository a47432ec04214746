"""Runs with a quota: they regenerate refused images, and never buy more than are missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa

from krea_dagster.application.batch import Batch
from krea_dagster.application.buy_options import BuyOptions
from krea_dagster.application.quota import apply_quota
from krea_dagster.curation.accepted.quota import WantedImages
from krea_dagster.curation.accepted.rules import Rules
from krea_dagster.emulator import Emulator
from krea_dagster.plugin.assets.accepted import check_wanted
from krea_dagster.prompts.trial import Trial
from tests.curation.accepted.quota_harness import PRICE, QuotaProject, prompts_of
from tests.dagster_bench import OpenAccount, check_of, latest, values, write_table

KEPT = Rules(require_keep=True)
CHECK = "all_wanted_accepted"


def shown(
    instance: dg.DagsterInstance,
    studio: QuotaProject,
    asset: str = "images",
    keys: Sequence[str] = (),
) -> Counter[str]:
    """The numbers that the materializations of these partitions, or all, show, added up."""
    found: Counter[str] = Counter()
    for key in keys or studio.partitions:
        for name, value in values(latest(instance, (studio.prefix, asset), key)).items():
            if isinstance(value, int | float):
                found[name] += value  # type: ignore[assignment] # credits are floats
    return found


# -- a reviewer who rejects 30 % ---------------------------------------------------------------


def test_three_of_each_prompt_are_reached_and_never_more_is_bought_than_is_missing(
    tmp_path: Path, emulator: Emulator, open_account: OpenAccount, instance: dg.DagsterInstance
) -> None:
    key = open_account()
    wanted = WantedImages(3, most_images=30)
    studio = QuotaProject(tmp_path, emulator, key, prompts_of(10, "reach"), wanted, KEPT, "reach")
    rounds = studio.rounds()
    assert rounds[0].bought == 30
    assert all(one.bought == one.missing for one in rounds)
    replaced = sum(one.bought for one in rounds[1:])
    # The emulator's accounts: what was bought, and what the account paid.
    assert len(studio.tasks()) == 30 + replaced
    assert replaced == sum(one.rejected for one in rounds) > 0
    account = emulator.world.account(key)
    assert account is not None
    assert account.charged == len(studio.tasks()) * PRICE * 10_000
    result = studio.accept(instance)
    assert check_of(result, CHECK).passed
    counts = Counter(row["prompt_id"] for row in studio.accepted())
    assert set(counts.values()) == {3}
    assert len(counts) == 10
    # All that was bought, the refused among it, over what is accepted.
    metadata = shown(instance, studio, "accepted_images")
    assert metadata["credits"] == round(len(studio.tasks()) * PRICE, 4)
    assert (metadata["accepted"], metadata["images_bought"]) == (30, 30 + replaced)


def test_a_budget_that_is_too_small_is_not_passed_and_the_short_prompts_are_named(
    tmp_path: Path, emulator: Emulator, open_account: OpenAccount, instance: dg.DagsterInstance
) -> None:
    wanted = WantedImages(2, most_images=3)
    prompts = prompts_of(4, "tight", num_images=2)
    studio = QuotaProject(
        tmp_path, emulator, open_account(), prompts, wanted, KEPT, "tight", rejects=0.6, seed=1
    )
    studio.rounds()
    assert studio.buy(instance).success
    bought = Counter(task["prompt"] for task in studio.tasks())
    assert max(bought.values()) == 3
    short = sorted(name for name, kept in studio.kept().items() if kept < 2)
    assert short
    check = check_of(studio.accept(instance), CHECK)
    assert not check.passed
    assert f"{len(short)} stay short: {short[0]}" in (check.description or "")
    assert "the candidate budget is spent at 3 images" in (check.description or "")
    table = check.metadata["stay_short"]
    assert isinstance(table, dg.TableMetadataValue)
    assert sorted(str(record.data["of"]) for record in table.records) == short
    assert shown(instance, studio)["wanted_groups_short"] == len(short)


# -- what is left alone ------------------------------------------------------------------------


def test_what_would_be_the_same_image_or_has_failed_is_never_bought_again(
    tmp_path: Path, emulator: Emulator, open_account: OpenAccount
) -> None:
    prompts = {
        "prompt_id": ["fixed", "drawn", "failed", "shared-1", "shared-2"],
        "prompt": [
            "fixed [alone]", "drawn [alone]",
            "failed [alone] [emulator: fail content_policy_violation]",
            "shared [alone]", "shared [alone]",
        ],
        "seed": pa.array([7, None, None, 9, 9], pa.int32()),
    }  # fmt: skip
    studio = QuotaProject(
        tmp_path, emulator, open_account(), prompts, WantedImages(1), Rules(), "alone", "hash:1"
    )
    studio.carry()
    assert len(studio.tasks()) == 4
    studio.judge({("fixed", 0): "reject", ("drawn", 0): "reject", ("shared-1", 0): "reject"})
    for _ in range(2):
        studio.carry()
    assert Counter(task["prompt"] for task in studio.tasks()) == {
        "fixed [alone]": 1,
        "drawn [alone]": 2,
        "failed [alone] [emulator: fail content_policy_violation]": 1,
        "shared [alone]": 1,
    }
    why = {one.name: one.why for one in studio.outcomes().values() if one.short}
    # One image, and so one verdict, for both rows that share it.
    assert set(why) == {"fixed", "failed", "shared-1", "shared-2"}
    assert "a seed in the table" in why["fixed"]
    assert "retry_errors" in why["failed"]


def test_in_a_trial_only_its_rows_are_replaced(
    tmp_path: Path, emulator: Emulator, open_account: OpenAccount
) -> None:
    prompts = prompts_of(2, "few", num_images=1)
    studio = QuotaProject(
        tmp_path, emulator, open_account(), prompts, WantedImages(1), Rules(), "few", "hash:1"
    )
    studio.carry()
    studio.judge({("few-000", 0): "reject", ("few-001", 0): "reject"})
    studio.carry(trial=Trial(1))
    assert len(studio.tasks()) == 3
    assert studio.krea.attempts(studio.table) == {("few-000", 0): 1}
    studio.carry()
    assert len(studio.tasks()) == 4


def test_a_flagged_image_waits_and_one_that_is_taken_back_counts_again(
    tmp_path: Path, emulator: Emulator, open_account: OpenAccount
) -> None:
    prompts = prompts_of(2, "wait", num_images=1)
    studio = QuotaProject(
        tmp_path, emulator, open_account(), prompts, WantedImages(1), Rules(), "wait", "hash:1"
    )
    studio.carry()
    studio.judge({("wait-000", 0): "flag", ("wait-001", 0): "reject"})
    studio.judge({("wait-001", 0): "none"})
    studio.carry()
    assert len(studio.tasks()) == 2
    waiting = studio.outcomes()["wait-000"]
    assert (waiting.undecided, waiting.short) == (1, 0)
    assert studio.wanted is not None
    check = check_wanted([waiting], studio.wanted)
    assert not check.passed
    assert check.severity is dg.AssetCheckSeverity.WARN
    assert [row["prompt_id"] for row in studio.accepted()] == ["wait-001"]


# -- values of a column ------------------------------------------------------------------------


def test_values_of_a_column_are_counted_over_all_partitions_and_the_rest_is_held_back(
    tmp_path: Path, emulator: Emulator, open_account: OpenAccount, instance: dg.DagsterInstance
) -> None:
    prompts = prompts_of(12, "col", num_images=1, campaign=["autumn"] * 8 + ["spring"] * 4)
    wanted = WantedImages.parse(["column:campaign:autumn=3"])
    studio = QuotaProject(
        tmp_path, emulator, open_account(), prompts, wanted, Rules(), "col", "hash:3"
    )
    # One run each, as a backfill by several workers does it.
    first, *others = studio.partitions
    assert check_of(studio.buy(instance, [first])).passed
    held = sum(studio.carry([key]).held[key] for key in others)
    assert held + shown(instance, studio, keys=[first])["slots_held_back"] == 5
    assert len(studio.tasks()) == 3 + 4
    bought = [row for row in studio.manifest() if row["status"] == "stored"]
    refused = next(row["prompt_id"] for row in bought if row["campaign"] == "autumn")
    studio.judge({(refused, 0): "reject"})
    for key in studio.partitions:
        asked = studio.carry([key])
    # A prompt without an image comes before another image of one that has some.
    assert len(studio.tasks()) == 3 + 4 + 1
    assert [(one.name, one.asked) for one in asked.outcomes] == [("autumn", 0)]
    studio.outcomes()
    counts = Counter(row["campaign"] for row in studio.accepted())
    assert counts == {"autumn": 3, "spring": 4}


def test_exactly_as_many_are_taken_where_more_are_accepted(
    tmp_path: Path, emulator: Emulator, open_account: OpenAccount
) -> None:
    prompts = prompts_of(4, "many", num_images=3)
    studio = QuotaProject(tmp_path, emulator, open_account(), prompts, None, Rules(), "many")
    studio.carry()
    studio.judge({("many-000", 2): "keep"})
    studio.wanted = WantedImages(2)
    assert all(one.reached for one in studio.outcomes().values())
    taken = {(row["prompt_id"], row["sample"]) for row in studio.accepted()}
    assert len(taken) == 8
    # Kept by a person before those without a review, then the lower sample.
    assert {("many-000", 0), ("many-000", 2), ("many-001", 0), ("many-001", 1)} <= taken


# -- two runs at once --------------------------------------------------------------------------


def test_two_runs_that_decide_at_once_raise_a_slot_once(
    tmp_path: Path, emulator: Emulator, open_account: OpenAccount
) -> None:
    prompts = prompts_of(3, "twice", num_images=1)
    wanted, rules = WantedImages(1), Rules()
    studio = QuotaProject(
        tmp_path, emulator, open_account(), prompts, wanted, rules, "twice", "hash:1"
    )
    studio.carry()
    studio.judge({("twice-000", 0): "reject", ("twice-001", 0): "reject"})
    krea, config = studio.krea, BuyOptions()

    def ask(batch: Batch, run_id: str) -> tuple[int, list[Any]]:
        folders = [studio.prefix]
        batch, asked = apply_quota(
            batch, config, krea, wanted, rules, folders=folders, raised_by=run_id
        )
        with batch:
            open_ = [one.request.request_key for one in batch.state(krea).wanted()]
            return sum(asked.again.values()), sorted(open_)

    # Both have read the table and the attempts before either raises one.
    first = Batch.read(studio.table, None, krea, to_buy=True)
    second = Batch.read(studio.table, None, krea, to_buy=True)
    raised, keys = ask(first, "run-1")
    assert (raised, len(keys)) == (2, 2)
    # The other raises nothing, and wants the same requests, which are bought once.
    assert ask(second, "run-2") == (0, keys)
    # A re-execution does not raise what is asked for already.
    third = Batch.read(studio.table, None, krea, to_buy=True)
    assert ask(third, "run-1") == (0, keys)
    assert set(krea.attempts(studio.table).values()) == {1}


def test_rows_that_come_while_a_run_decides_are_decided_about_too(
    tmp_path: Path, emulator: Emulator, open_account: OpenAccount
) -> None:
    """The table is read again once attempts are raised; what is new in it is not simply bought."""
    prompts, wanted = prompts_of(2, "late", num_images=1), WantedImages(1)
    studio = QuotaProject(
        tmp_path, emulator, open_account(), prompts, wanted, Rules(), "late", "hash:1"
    )
    studio.carry()
    studio.judge({("late-000", 0): "reject"})
    batch = Batch.read(studio.table, None, studio.krea, to_buy=True)
    more = prompts_of(3, "late", num_images=1)
    write_table(tmp_path / "prompts.parquet", {**more, "num_images": [1, 1, 5]})
    batch, asked = apply_quota(
        batch, BuyOptions(), studio.krea, wanted, Rules(), folders=["late"], raised_by="run"
    )
    with batch:
        open_ = list(batch.state(studio.krea).wanted())
        assert [(one.name, one.asked) for one in asked.outcomes] == [
            ("late-000", 1), ("late-001", 0), ("late-002", 1)
        ]  # fmt: skip
        assert asked.again == {"bucket-000": 1}
    assert (len(open_), batch.held_count) == (2, 4)
