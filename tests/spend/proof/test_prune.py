"""After old events were removed, spend and verify say the same as before."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from krea_dagster.engine.journal.prune import Pruned, prune
from krea_dagster.errors import ConfigError
from krea_dagster.spend.tables.update import update_spend
from tests.spend.project_harness import ProjectHarness, kinds


def prune_all(project: ProjectHarness) -> Pruned:
    """Prune as if everything had happened long ago."""
    with project.krea.open_journal() as journal:
        return prune(journal.database, datetime.now(timezone.utc) + timedelta(seconds=1))


def accounts(project: ProjectHarness) -> dict[str, Any]:
    """Return what verify and spend say; spend is made again from the journal."""
    krea = project.krea
    proof = project.prove()
    with krea.open_journal() as journal:
        update_spend(journal, krea.open_storage(), rebuild=True)
    return {
        "kinds": kinds(proof),
        "figures": {**asdict(proof.figures), "events": 0},
        "account": proof.account,
        "ledger": krea.spend_sql("SELECT * FROM ledger ORDER BY ALL").to_pylist(),
        "failures": krea.spend_sql("SELECT * FROM failures ORDER BY ALL").to_pylist(),
    }


@pytest.fixture
def several(bought_project: ProjectHarness) -> ProjectHarness:
    """Four rows that were bought, one that was refused, and one that was bought after a failure."""
    project = bought_project.with_rows("refused", prompt="[emulator: refuse]")
    project = project.with_rows("unlucky")
    world = project.emulator.world
    code = "content_policy_violation"
    world.script("fail", 1, arg=code, match=f"unlucky of {project.folder.name}")
    project.buy("run-2")
    project.buy("run-3", ask_again=[code])
    return project


def test_spend_and_verify_say_the_same_after_pruning(several: ProjectHarness) -> None:
    before = accounts(several)
    assert before["kinds"] == []
    assert len(before["failures"]) == 2
    assert prune_all(several).events >= 5 * 4
    assert accounts(several) == before
    assert several.quote().total.to_buy == 0


def test_a_lost_event_of_a_pruned_request_is_found(bought_project: ProjectHarness) -> None:
    prune_all(bought_project)
    assert kinds(bought_project.prove()) == []
    key = bought_project.records()["ash"].request_key
    bought_project.sql("DELETE FROM events WHERE request_key = ?", key)
    assert kinds(bought_project.prove()) == ["events_differ"]


def test_a_manifest_that_is_behind_a_pruned_request_is_still_only_behind(
    bought_project: ProjectHarness,
) -> None:
    empty = dict.fromkeys(("image_path", "image_sha256", "credits_charged"))
    bought_project.forge_row("ash", status="submitted", **empty)
    assert kinds(bought_project.prove()) == ["row_behind"]
    prune_all(bought_project)
    assert kinds(bought_project.prove()) == ["row_behind"]


def test_events_of_the_last_day_cannot_be_removed(bought_project: ProjectHarness) -> None:
    with pytest.raises(ConfigError, match="at least a day old"):
        bought_project.krea.prune_events(timedelta(hours=23))
    assert bought_project.krea.prune_events(timedelta(days=1)) == Pruned()


def test_without_a_journal_there_is_nothing_to_remove(project: ProjectHarness) -> None:
    with pytest.raises(ConfigError, match="no journal yet"):
        project.krea.prune_events(timedelta(days=30))
    assert not (project.folder / "krea").exists()
