"""Several tables and keys share one journal and stay separate."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from krea_dagster.application.batch import Batch
from krea_dagster.application.runner import open_runner
from krea_dagster.emulator import Emulator
from krea_dagster.engine.journal.root_log import MARKER
from krea_dagster.engine.states import State
from krea_dagster.engine.verdict import Verdict
from krea_dagster.errors import ConfigError
from krea_dagster.plugin.config import KreaImagesConfig
from krea_dagster.prompts import PromptTable
from tests.spend.project_harness import LEARNED, ProjectHarness

OTHER_KEY = "sk-of-the-scenarios-0002-Zq81"


def run_again(
    shop: ProjectHarness, run_id: str, *again: str, killed: bool = False, new_seed: bool = False
) -> int:
    """Run with ``again``, as the asset does, and return how many images were bought."""
    krea = shop.krea
    before = int(shop.emulator.stats(tasks=False)["creates"])
    config = KreaImagesConfig(regenerate=list(again), new_seed=new_seed)
    with Batch.read(shop.table, None, krea, to_buy=True) as read:
        batch = read.regenerate(config, krea, run_id)
        with open_runner(krea, run_id, lambda _: None, shop.table) as runner:
            policy = replace(runner.policy, wait_scale=0.01, wait=not killed)
            ready = replace(runner, policy=policy, latencies=LEARNED)
            asyncio.run(ready.run(batch.state(krea).wanted()))
        if not killed:
            batch.end_regenerations(krea)
        batch.close()
    return int(shop.emulator.stats(tasks=False)["creates"]) - before


def tmp_journal(shop: ProjectHarness) -> str:
    return str(shop.settings["journal_url"]).removeprefix("sqlite:///")


def second_project(shop: ProjectHarness) -> ProjectHarness:
    """Another project that shares the journal, with rows of the same prompt_ids."""
    folder = shop.folder.with_name("second")
    folder.mkdir()
    other = ProjectHarness(folder, shop.emulator, shop.api_key, settings=shop.settings)
    return other.with_rows("ash", "birch")


# -- another image of a row -------------------------------------------------------------------


def test_attempts_of_equal_prompt_ids_in_two_tables_are_separate(
    shop: ProjectHarness, server: Emulator
) -> None:
    shop.buy()
    other = second_project(shop)
    other.buy()
    assert server.stats()["creates"] == 6
    assert run_again(shop, "run-2", "ash") == 1
    assert other.carry("run-3").posts == 0
    assert other.krea.attempts(other.table) == {}
    assert shop.krea.attempts(shop.table) == {("ash", 0): 1}


def test_tables_with_the_same_name_in_two_roots_are_different(shop: ProjectHarness) -> None:
    other = second_project(shop)
    shop.carry()
    other.carry()
    with shop.krea.open_journal() as journal:
        names = Counter(journal.tables.names().values())
    assert names == {"../prompts.parquet": 2}


def test_a_named_table_is_identified_by_its_name_anywhere(
    shop: ProjectHarness,
) -> None:
    shop.carry()
    krea = shop.krea
    named = replace(shop.table, name="posters")
    with krea.open_journal() as journal:
        first = krea.table_id(journal, named, enter=True)
        moved = PromptTable("/elsewhere/p.parquet", named.partition_by, name="posters")
        assert krea.table_id(journal, moved) == first
        assert krea.table_id(journal, shop.table) not in ("", first)


def test_an_attempt_of_a_killed_run_is_continued_and_bought_once(
    shop: ProjectHarness, server: Emulator
) -> None:
    shop.buy()
    assert run_again(shop, "killed", "ash", killed=True) == 1
    assert run_again(shop, "repeated", "ash") == 0
    assert shop.krea.attempts(shop.table) == {("ash", 0): 1}
    with shop.krea.open_journal() as journal:
        assert journal.count_by_state() == {State.STORED: 5}
    assert run_again(shop, "a new wish", "ash") == 1
    assert shop.krea.attempts(shop.table) == {("ash", 0): 2}
    assert server.stats()["bodies_bought_more_than_once"] == 0


def test_again_for_a_row_without_an_image_buys_one(
    shop: ProjectHarness,
) -> None:
    assert run_again(shop, "run-1", "ash") == 4
    assert shop.krea.attempts(shop.table) == {}


def test_again_for_a_fixed_seed_needs_a_drawn_seed(
    shop: ProjectHarness,
) -> None:
    shop = shop.with_rows("fixed", seed=5)
    shop.buy()
    with pytest.raises(ConfigError, match=r"fixes the seed of row 'fixed'.*--new-seed"):
        run_again(shop, "run-2", "fixed")
    assert run_again(shop, "run-3", "fixed", new_seed=True) == 1
    with shop.krea.open_journal() as journal:
        seeds = {one.request.seed for one in journal.all_records() if "fixed" in one.request.prompt}
    assert len(seeds) == 2
    assert 5 in seeds
    assert shop.carry("run-4").posts == 0  # the drawn seed stays


def test_again_accepts_error_codes_and_rejected(shop: ProjectHarness, server: Emulator) -> None:
    shop.buy()
    record = shop.records()["birch"]
    assert record.image is not None
    with shop.krea.open_journal() as journal:
        journal.verdicts.add(
            [
                Verdict(
                    verdict_id="one",
                    image_sha256=record.image.sha256,
                    verdict="reject",
                    reviewer="somebody",
                    request_key=record.request_key,
                    prompt_id="birch",
                    sample=0,
                    attempt=0,
                    partition_key=record.partition_key,
                )
            ]
        )
    assert run_again(shop, "run-2", "rejected") == 1
    assert shop.krea.attempts(shop.table) == {("birch", 0): 1}
    shop = shop.with_rows("blocked")
    server.world.script("fail", match="blocked of", arg="content_policy_violation")
    shop.carry("run-3")
    assert run_again(shop, "run-4", "error:content_policy_violation") == 1
    assert shop.krea.attempts(shop.table) == {("birch", 0): 1, ("blocked", 0): 1}


def test_again_is_ambiguous_for_a_row_named_like_a_keyword(shop: ProjectHarness) -> None:
    shop = shop.with_rows("rejected")
    shop.buy()
    with pytest.raises(ConfigError, match="is ambiguous: a row has this prompt_id"):
        run_again(shop, "run-2", "rejected")


def test_again_for_an_unknown_row_buys_nothing(shop: ProjectHarness) -> None:
    with pytest.raises(ConfigError, match="no row has the prompt_id 'nobody'"):
        run_again(shop, "run-1", "nobody")


def test_again_may_name_rows_of_other_partitions(
    shop: ProjectHarness,
) -> None:
    """Partitions of one launch are separate runs, each with all rows of ``again``."""
    bought = 0
    for key in shop.table.partition_keys():
        with Batch.read(shop.table, [key], shop.krea) as batch:
            names = [image.prompt_id for image in batch.plan.named(["ash", "birch"])]
            wished = batch.selected(KreaImagesConfig(regenerate=["ash", "birch"]), shop.krea)
            assert [name for name, _ in wished] == names
            bought += len(wished)
            with pytest.raises(ConfigError, match="no row has the prompt_id 'nobody'"):
                batch.selected(KreaImagesConfig(regenerate=["ash", "nobody"]), shop.krea)
    assert bought == 2


def test_again_for_a_rejected_image_buys_one(shop: ProjectHarness, server: Emulator) -> None:
    server.world.script("black", match="ash of")
    shop.carry()
    assert run_again(shop, "run-2", "error:flat_image") == 1
    assert shop.records()["ash"].error_code == "flat_image"


def test_a_run_planned_before_an_attempt_does_not_close_it(shop: ProjectHarness) -> None:
    shop.buy()
    with Batch.read(shop.table, None, shop.krea) as earlier:
        assert run_again(shop, "killed", "ash", killed=True) == 1
        earlier.end_regenerations(shop.krea)
    assert run_again(shop, "repeated", "ash") == 0


def test_a_renamed_file_stays_the_same_table(shop: ProjectHarness, server: Emulator) -> None:
    shop.buy()
    assert run_again(shop, "run-2", "ash") == 1
    (shop.folder / "prompts.parquet").rename(shop.folder / "renamed.parquet")
    renamed = PromptTable(str(shop.folder / "renamed.parquet"), shop.table.partition_by)
    (shop.folder / "prompts.parquet").unlink()  # which the shop writes when it is asked for it
    assert shop.krea.attempts(renamed) == {("ash", 0): 1}
    with shop.krea.open_journal() as journal:
        shop.krea.table_id(journal, renamed, enter=True)
        assert list(journal.tables.names().values()) == ["../renamed.parquet"]
    assert shop.krea.attempts(renamed) == {("ash", 0): 1}


def test_the_table_of_a_copied_root_has_separate_attempts(
    shop: ProjectHarness,
) -> None:
    shop.buy()
    assert run_again(shop, "run-2", "ash") == 1
    shutil.copytree(shop.folder / "krea", shop.folder / "copy")
    copy = shop.with_settings(storage=str(shop.folder / "copy"))
    assert copy.krea.attempts(shop.table) == {}  # before its first run, as after it
    assert copy.carry("run-3").posts == 0
    assert copy.krea.attempts(shop.table) == {}
    assert shop.krea.attempts(shop.table) == {("ash", 0): 1}


def test_two_projects_in_one_bucket_with_equal_table_paths_are_separate(
    shop: ProjectHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = shop.with_settings(storage=f"memory://{tmp_path.name}/krea")
    with shop.krea.open_journal() as journal:
        ids = set()
        for name in ("one", "other"):
            (tmp_path / name).mkdir()
            monkeypatch.chdir(tmp_path / name)
            table = PromptTable("data/prompts.parquet", shop.table.partition_by)
            ids.add(shop.krea.table_id(journal, table, enter=True))
    assert len(ids) == 2


def test_an_attempt_can_be_raised_first_after_an_upgrade(
    shop: ProjectHarness, server: Emulator
) -> None:
    """Attempts from before the journal had tables belong to the first entered table."""
    server.world.script("fail", match="birch of", arg="service_error", n=3)
    shop.buy()
    assert run_again(shop, "run-2", "birch") == 1
    with closing(sqlite3.connect(tmp_journal(shop))) as database, database:
        for table in ("attempts", "raised_attempts", "requests", "submissions"):
            database.execute(f"UPDATE {table} SET table_id = ''")  # noqa: S608 - as named above
        database.execute("DELETE FROM prompt_tables")
        database.execute("DELETE FROM root_tokens")
        database.execute("UPDATE roots SET location = ''")
    (shop.folder / "krea" / MARKER).unlink()
    assert shop.krea.attempts(shop.table) == {("birch", 0): 1}
    assert run_again(shop, "run-3", "ash") == 1
    assert shop.krea.attempts(shop.table) == {("birch", 0): 1, ("ash", 0): 1}
    assert run_again(shop, "run-4", "ash") == 1
    assert server.stats()["bodies_bought_more_than_once"] == 0


# -- budgets and salvage ----------------------------------------------------------------------


def test_a_partition_budget_counts_only_its_table(shop: ProjectHarness) -> None:
    budget = shop.with_settings(budgets=["partition=0.9"])
    budget.carry()
    other = second_project(budget)
    report = other.carry("run-2")
    assert report.caps_reached == ()
    assert report.posts == 2


def test_a_salvage_collects_its_table_and_old_requests_of_others(
    shop: ProjectHarness, server: Emulator
) -> None:
    other = second_project(shop)
    server.world.script("stuck", n=6)
    for one, run_id in ((shop, "run-1"), (other, "run-2")):
        krea = one.krea
        with open_runner(krea, run_id, lambda _: None, one.table) as runner, one.batch() as batch:
            policy = replace(runner.policy, patience_s=0.05)
            wanted = batch.state(krea).wanted()
            asyncio.run(replace(runner, policy=policy, latencies=LEARNED).run(wanted))
    assert len(shop.krea.left_behind([shop.table])) == 4
    assert len(other.krea.left_behind([other.table])) == 2
    assert len(shop.krea.left_behind()) == 6


# -- accounts ---------------------------------------------------------------------------------


def test_a_key_of_another_account_replays_nothing_until_accepted(
    shop: ProjectHarness, server: Emulator
) -> None:
    server.world.add_account(OTHER_KEY, 10_000_000)
    server.world.script("drop_after_create", n=2)
    shop.with_settings(on_unknown="hold").carry()
    other = replace(shop, api_key=OTHER_KEY)
    report = other.carry("run-2")
    assert report.posts == 0
    assert all("sent with another API key" in why for why in report.left.values())
    assert len(report.left) == 2
    assert "the account of 4 earlier purchases" in other.krea.accept_key()
    assert other.carry("run-3").posts == 2


def test_accepting_a_key_needs_same_as_with_several_accounts(
    shop: ProjectHarness, server: Emulator
) -> None:
    keys = [OTHER_KEY, "sk-of-the-scenarios-0003-Zq81"]
    for key in keys:
        server.world.add_account(key, 10_000_000)
    shop.carry()
    second = replace(shop, api_key=keys[0]).with_rows("elm")
    second.carry("run-2")
    third = replace(second, api_key=keys[1])
    with pytest.raises(ConfigError, match="--same-as"):
        third.krea.accept_key()
    with third.krea.open_journal() as journal:
        fingerprint = journal.api_keys.fingerprint(shop.api_key)
    assert "4 earlier purchases" in third.krea.accept_key(fingerprint)


# -- a purchase that another journal has made -------------------------------------------------


def test_a_purchase_replayed_to_another_journal_is_charged_once(
    shop: ProjectHarness, server: Emulator, tmp_path: Path
) -> None:
    shop.buy()
    folder = tmp_path / "second"
    folder.mkdir()
    settings = {"journal_url": f"sqlite:///{folder / 'journal.db'}", "day_credits": 2.0}
    other = ProjectHarness(folder, server, shop.api_key, shop.rows, settings)
    rows = [{**row, "prompt": row["prompt"]} for row in shop.rows]
    other = replace(other, rows=rows)
    report = other.carry("run-2")
    assert (report.posts, report.progress.delivered, report.caps_reached) == (4, 4, ())
    assert server.stats()["creates"] == 4
    with other.krea.open_journal() as journal:
        assert sum(one.charged_units or 0 for one in journal.charges()) == 0
        assert {one.replayed for one in journal.charges()} == {True}
    other.write_manifests("run-2")
    proof = other.prove()
    assert proof.adds_up, proof.findings
    assert proof.account is not None
    assert proof.account.unexplained_units == 0


def test_a_purchase_after_a_key_conflict_uses_the_next_key(
    shop: ProjectHarness, server: Emulator, tmp_path: Path
) -> None:
    """The first journal bought with an address for callbacks, the second without."""
    krea = shop.krea
    with open_runner(krea, "run-1", lambda _: None, shop.table) as runner, shop.batch() as batch:
        called = replace(
            runner,
            policy=replace(runner.policy, wait_scale=0.01),
            latencies=LEARNED,
            callback_url_of=lambda key: f"https://hooks.example.com/{key}",
        )
        asyncio.run(called.run(batch.state(krea).wanted()))
    folder = tmp_path / "second"
    folder.mkdir()
    settings = {"journal_url": f"sqlite:///{folder / 'journal.db'}"}
    other = ProjectHarness(folder, server, shop.api_key, shop.rows, settings)
    report = other.carry("run-2")
    assert (report.progress.delivered, report.left) == (4, {})
    with other.krea.open_journal() as journal:
        assert Counter(one.number for one in journal.charges()) == {1: 4, 2: 4}
        assert sum(one.charged_units or 0 for one in journal.charges()) == 4 * 4500
