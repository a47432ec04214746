"""What stops a run: an account, a key, a table, a setting. Nothing that was paid is lost."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow.parquet as pq
import pytest

from krea_dagster import KreaResource, build_krea_definitions
from krea_dagster.emulator import Emulator
from krea_dagster.engine.run.report import Progress, RunReport
from krea_dagster.errors import ConfigError, TryLater
from krea_dagster.plugin.failures import stop_failure
from tests.dagster_bench import (
    OpenAccount,
    check_of,
    failure_text,
    latest,
    posts,
    run_job,
    values,
    write_table,
)


def shop(
    folder: Path, prefix: str, emulator: Emulator, api_key: str, **columns: object
) -> dg.Definitions:
    """Definitions of four rows in two partitions, with a job that would retry what may be."""
    table: dict[str, object] = {
        "prompt_id": ["a", "b", "c", "d"],
        "prompt": [f"{name}, for the shop {prefix}" for name in "abcd"],
    }
    defs = build_krea_definitions(
        prompts=write_table(folder / "prompts.parquet", table | columns),
        partition_by="hash:2",
        krea=KreaResource(
            api_key=api_key,
            base_url=emulator.url,
            expected_latency_s=0.02,
            storage=str(folder / "krea"),
        ),
        key_prefix=prefix,
    )
    retrying = dg.define_asset_job(
        "retrying",
        selection=[dg.AssetKey([prefix, name]) for name in ("images", "image_manifest")],
        op_retry_policy=dg.RetryPolicy(max_retries=3),
    )
    return dg.Definitions.merge(defs, dg.Definitions(jobs=[retrying]))


def retries(result: dg.ExecuteInProcessResult) -> int:
    return sum(event.event_type_value == "STEP_UP_FOR_RETRY" for event in result.all_events)


@dataclass(frozen=True)
class Stopped:
    """A run whose account had credits for two images of four."""

    defs: dg.Definitions
    result: dg.ExecuteInProcessResult
    api_key: str
    manifest: Path
    rows: list[dict[str, Any]]


@pytest.fixture(scope="module")
def stopped(
    tmp_path_factory: pytest.TempPathFactory,
    emulator: Emulator,
    instance: dg.DagsterInstance,
    open_account: OpenAccount,
) -> Stopped:
    folder, key = tmp_path_factory.mktemp("poor"), open_account()
    defs = shop(folder, "poor", emulator, key)
    emulator.world.set_quota(0.9)
    try:
        result = run_job(defs, instance, "bucket-000", "bucket-001", job="retrying")
    finally:
        emulator.world.set_quota(None)
    manifest = folder / "krea" / "manifest" / "poor"
    return Stopped(defs, result, key, manifest, pq.read_table(manifest).to_pylist())


def test_an_account_without_credits_fails_the_run_with_one_sentence_and_no_retry(
    stopped: Stopped,
) -> None:
    assert not stopped.result.success
    said = failure_text(stopped.result, "poor__images")
    assert said.startswith("Buying stopped, the account or its key has no credits left (402 ")
    assert said.endswith("the other rows are deferred; top up and run again.")
    assert "\n" not in said
    assert retries(stopped.result) == 0


def test_what_was_delivered_before_the_stop_is_in_the_manifest_with_the_rest_deferred(
    stopped: Stopped, instance: dg.DagsterInstance
) -> None:
    assert Counter(row["status"] for row in stopped.rows) == {"stored": 2, "deferred": 2}
    for row in stopped.rows:
        paid = row["status"] == "stored"
        assert row["credits_charged"] == (0.45 if paid else 0.0)
        assert (row["image_path"] is not None) == paid
        assert (row["error_code"] is None) == paid
    # The step that writes the manifest never ran, and Dagster knows the files all the same.
    for bucket in ("bucket-000", "bucket-001"):
        shown = values(latest(instance, ("poor", "image_manifest"), bucket))
        assert Path(shown["path"]) == stopped.manifest / f"{bucket}.parquet"
    check = check_of(stopped.result)
    assert not check.passed
    assert check.description == "2 of 4 rows have no image: 2 × deferred: insufficient_quota"


def test_after_a_top_up_the_next_run_buys_only_what_was_deferred(
    stopped: Stopped, emulator: Emulator, instance: dg.DagsterInstance
) -> None:
    result = run_job(stopped.defs, instance, "bucket-000", "bucket-001", job="retrying")
    assert result.success
    account = emulator.world.account(stopped.api_key)
    assert account is not None
    assert account.charged == 4 * 4500
    shown = [values(one) for one in result.asset_materializations_for_node("poor__images")]
    assert sum(one["images_bought"] for one in shown) == 2
    assert sum(one["images_reused"] for one in shown) == 2


def test_a_wrong_key_fails_the_run_before_anything_is_bought_and_is_not_repeated_in_the_text(
    tmp_path: Path, emulator: Emulator, instance: dg.DagsterInstance
) -> None:
    wrong = "sk-that-nobody-knows-55501"
    defs = shop(tmp_path, "stranger", emulator, wrong)
    creates = emulator.stats(tasks=False)["creates"]
    result = run_job(defs, instance, "bucket-000", "bucket-001", job="retrying")

    assert not result.success
    said = failure_text(result, "stranger__images")
    assert said.startswith("Buying stopped, EvoLink rejects the key (401 unauthorized: ")
    assert "set a valid EVOLINK_API_KEY" in said
    assert wrong not in said
    assert retries(result) == 0
    assert emulator.stats(tasks=False)["creates"] == creates
    rows = pq.read_table(tmp_path / "krea" / "manifest" / "stranger").to_pylist()
    assert {row["status"] for row in rows} == {"deferred"}


def test_a_bad_table_fails_the_step_before_any_request_and_names_row_and_column(
    tmp_path: Path, emulator: Emulator, instance: dg.DagsterInstance
) -> None:
    defs = shop(tmp_path, "bad", emulator, "emulator", size=["1:1", "7:5", "1:1", "9:9"])
    before = posts(emulator)
    result = run_job(defs, instance, "bucket-000", "bucket-001", job="retrying")
    assert not result.success
    said = failure_text(result, "bad__images")
    assert "row 2 (prompt_id b): size is '7:5'" in said
    assert "row 4 (prompt_id d): size is '9:9'" in said
    assert "2 problems. Nothing was bought." in said
    assert posts(emulator) == before
    assert retries(result) == 0
    assert not (tmp_path / "krea").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"api_key": ""}, "the API key is empty"),
        ({"storage": ""}, "the storage root is empty"),
        ({"journal_url": "nonsense"}, "the journal's URL cannot be read"),
        ({"storage": "memory://krea"}, "set journal_url (KREA_JOURNAL_URL)"),
    ],
)
def test_a_setting_that_cannot_be_used_fails_the_step_with_its_own_text(
    tmp_path: Path,
    emulator: Emulator,
    instance: dg.DagsterInstance,
    settings: dict[str, str],
    said: str,
) -> None:
    table = write_table(tmp_path / "prompts.parquet", {"prompt": ["for a wrong setting"]})
    given = {"api_key": "emulator", "base_url": emulator.url, "storage": str(tmp_path / "krea")}
    defs = build_krea_definitions(
        prompts=table,
        partition_by="hash:1",
        krea=KreaResource(**(given | settings)),  # type: ignore[arg-type]  # all are texts
        key_prefix="wrong",
    )
    before = posts(emulator)
    result = run_job(defs, instance, "bucket-000", job="wrong_krea_images")
    assert not result.success
    assert said in failure_text(result, "wrong__images")
    assert posts(emulator) == before


def test_images_whose_journal_is_gone_are_not_bought_again(tmp_path: Path) -> None:
    (tmp_path / "images" / "ab").mkdir(parents=True)
    (tmp_path / "images" / "ab" / "abcd.png").write_bytes(b"paid for")
    krea = KreaResource(api_key="emulator", base_url="http://127.0.0.1:9", storage=str(tmp_path))
    with pytest.raises(ConfigError, match="but the journal that bought them is missing"):
        krea.krea().check()
    assert not (tmp_path / "journal.db").exists(), "nor is a new one begun"

    empty = krea.model_copy(update={"journal_url": f"sqlite:///{tmp_path / 'another.db'}"})
    with empty.krea().open_journal():
        pass
    with pytest.raises(ConfigError, match="move the images away"):
        empty.krea().check()


def test_a_server_that_fell_silent_is_not_called_a_stop_of_the_account() -> None:
    silent = TryLater("no_usable_answer", "no purchase got a usable answer for 1800 s")
    failure = stop_failure(RunReport(0, Progress(total=1), 0.0, stopped=silent))
    said, may_retry = str(failure.description), failure.allow_retries
    assert may_retry
    assert "EvoLink's responses are unusable" in said
    assert "account" not in said
