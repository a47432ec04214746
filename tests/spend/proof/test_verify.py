"""The proof: accounts that agree have no error, and each manipulation is found with its cost."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from krea_dagster.errors import ConfigError
from krea_dagster.spend.proof.findings import KEPT, Severity
from tests.spend.project_harness import ProjectHarness, kinds

IMAGE_UNITS = 4500


# -- accounts that agree ------------------------------------------------------------------------


def test_accounts_that_agree_have_no_error_and_the_figures_count_what_was_checked(
    shared_project: ProjectHarness,
) -> None:
    proof = shared_project.prove()
    assert proof.adds_up
    assert kinds(proof) == []
    figures = proof.figures
    assert figures.requests == figures.submissions == figures.charges == figures.tasks == 4
    assert figures.files == figures.files_hashed == 4
    size = sum(shared_project.file_of(name).stat().st_size for name in shared_project.records())
    assert figures.bytes_hashed == size
    assert figures.rows == figures.rows_agreeing == 4
    assert figures.manifests == 2
    assert figures.events == 4 * 5  # planned, submitting, accepted, completed, stored
    assert figures.charged_units == 4 * IMAGE_UNITS == shared_project.paid_units()
    assert proof.account is not None
    assert proof.account.used_units == proof.account.journal_units == 4 * IMAGE_UNITS
    assert proof.account.in_flight_units == proof.account.unexplained_units == 0


def test_twins_failures_and_several_runs_add_up_too(
    project: ProjectHarness, bought_project: ProjectHarness
) -> None:
    more = bought_project.with_rows(
        "twin-0", "twin-1", seed=5, prompt=f"twins of {project.folder.name}"
    )
    more = more.with_rows("refused", prompt="[emulator: refuse]")
    more = more.with_rows("failed", prompt="[emulator: fail content_policy_violation]")
    more.buy("run-2")
    proof = more.prove()
    assert kinds(proof) == []
    assert proof.figures.rows_agreeing == 8
    assert proof.figures.charges == 5
    assert proof.figures.submissions == 7
    assert proof.figures.charged_units == more.paid_units()


def test_a_capped_run_and_the_next_one_add_up(project: ProjectHarness) -> None:
    project = project.with_rows("ash", "birch", "cedar").with_settings(run_credits=0.9)
    project.buy()
    assert kinds(project.prove()) == []
    project.with_settings(run_credits=9.0).buy("run-2")
    proof = project.prove()
    assert kinds(proof) == []
    assert proof.figures.charged_units == 3 * IMAGE_UNITS == project.paid_units()


def test_without_files_only_their_size_is_compared(shared_project: ProjectHarness) -> None:
    flip_a_byte(shared_project.file_of("ash"))
    proof = shared_project.prove(hash_bytes=0)
    assert proof.adds_up
    assert (proof.figures.files, proof.figures.files_hashed) == (4, 0)
    with shared_project.file_of("ash").open("ab") as file:
        file.write(b"!")
    assert kinds(shared_project.prove(hash_bytes=0)) == ["file_changed"]


def test_without_a_journal_verify_is_a_config_error(project: ProjectHarness) -> None:
    with pytest.raises(ConfigError, match=r"has no journal yet"):
        project.prove()
    assert not (project.folder / "krea").exists()


def test_images_in_an_object_store_are_proved_too(project: ProjectHarness) -> None:
    root = f"memory://{project.folder.name}/krea"
    project = project.with_rows("ash", "birch").with_settings(
        storage=root, journal_url=f"sqlite:///{project.folder / 'journal.db'}"
    )
    project.buy()
    proof = project.prove()
    assert kinds(proof) == []
    assert (proof.figures.files_hashed, proof.figures.rows_agreeing) == (2, 2)
    store = fsspec.filesystem("memory")
    image = project.records()["ash"].image
    assert image is not None
    store.pipe(f"{root}/{image.path}", b"x" * image.bytes)
    store.pipe(f"{root}/images/stray.png", b"whose?")
    assert kinds(project.prove()) == ["file_changed", "file_unknown"]
    store.rm(f"{root}/{image.path}")
    assert kinds(project.prove(hash_bytes=0)) == ["file_missing", "file_unknown"]


# -- open, at stake, explained ----------------------------------------------------------------


def test_what_is_at_stake_is_a_note_with_its_credits_and_no_error(project: ProjectHarness) -> None:
    project = project.with_rows("lost answer", "stuck", "black", "fine")
    project = project.with_settings(on_unknown="hold", patience_s=0.5)
    world = project.emulator.world
    world.script("drop_after_create", match=f"lost answer of {project.folder.name}")
    world.script("stuck", match=f"stuck of {project.folder.name}")
    world.script("black", 9, match=f"black of {project.folder.name}")
    try:
        project.buy()
    finally:
        world.forget_scripts()
    proof = project.prove()
    assert proof.adds_up
    assert kinds(proof) == ["paid_not_stored", "in_flight", "outcome_unknown"]
    assert {finding.severity for finding in proof.findings} == {Severity.NOTE}
    assert all(finding.units == IMAGE_UNITS for finding in proof.findings)
    black, stuck, lost = (finding.text for finding in proof.findings)
    assert black.startswith("black (bucket-00")
    assert "is paid, and its image is not stored (flat_image): 0.45 credits" in black
    assert stuck.startswith("stuck (bucket-00")
    assert "outcome unknown since" in lost
    assert "at most 0.45 credits" in lost
    assert proof.figures.at_stake == 3
    assert proof.figures.at_stake_units == 3 * IMAGE_UNITS
    # The server has charged two images and the one whose answer was lost.
    assert project.paid_units() == 3 * IMAGE_UNITS
    assert proof.account is not None
    assert proof.account.used_units == 3 * IMAGE_UNITS
    assert proof.account.journal_units == 2 * IMAGE_UNITS
    assert proof.account.in_flight_units == 2 * IMAGE_UNITS
    assert proof.account.unexplained_units == 0


def test_a_cancelled_task_may_have_been_charged_which_is_said(project: ProjectHarness) -> None:
    project = project.with_rows("cancelled", prompt="[emulator: cancelled]").with_rows("fine")
    project.buy()
    proof = project.prove()
    assert proof.adds_up
    assert kinds(proof) == ["maybe_charged"]
    assert "ended without an image: at most 0.45 credits charged" in proof.findings[0].text
    assert proof.account is not None
    assert (proof.account.journal_units, proof.account.in_flight_units) == (4500, 4500)


def test_an_image_whose_price_was_never_said_is_a_note(shared_project: ProjectHarness) -> None:
    key = shared_project.records()["ash"].request_key
    shared_project.sql("update submissions set charged_units = null where request_key = ?", key)
    shared_project.sql(
        "update commitments set spent_units = spent_units - 4500 where scope not like 'table:%' "
        "or scope = (select 'table:' || table_id || ':partition:' || partition_key "
        "from requests where request_key = ?)",
        key,
    )
    shared_project.write_manifests()
    proof = shared_project.prove()
    assert proof.adds_up
    assert kinds(proof) == ["price_unknown"]
    assert proof.findings[0].units == IMAGE_UNITS


def test_a_task_that_is_gone_is_paid_and_lost_which_is_known_and_no_error(
    shared_project: ProjectHarness,
) -> None:
    key = shared_project.records()["ash"].request_key
    shared_project.sql("delete from events where request_key = ? and event = 'stored'", key)
    shared_project.sql(
        "insert into events (request_key, seq, at, run_id, from_state, event, to_state) "
        "values (?, 4, 0, 'run-1', 'completed', 'expired', 'expired')",
        key,
    )
    shared_project.sql(
        "update requests set state = 'expired', image_path = null, image_sha256 = null, "
        "error_code = 'link_dead' where request_key = ?",
        key,
    )
    for path in (shared_project.folder / "krea" / "images").rglob(f"{key}.*"):
        path.unlink()
    shared_project.write_manifests()
    proof = shared_project.prove()
    assert proof.adds_up
    assert kinds(proof) == ["lost"]
    assert proof.findings[0].text.endswith("is lost (link_dead): 0.45 credits")
    assert (proof.figures.lost, proof.figures.lost_units) == (1, IMAGE_UNITS)


def test_what_the_table_does_not_ask_for_any_more_stays_accounted_for(
    bought_project: ProjectHarness,
) -> None:
    name = next(row["prompt_id"] for row in bought_project.rows)
    changed = ProjectHarness(
        bought_project.folder,
        bought_project.emulator,
        bought_project.api_key,
        list(bought_project.rows[1:]),
    )
    changed.buy("run-2")
    proof = changed.prove()
    assert proof.adds_up
    assert kinds(proof) == ["not_asked_any_more"]
    assert "0.45 credits paid, and no row requests it any more" in proof.findings[0].text
    assert proof.findings[0].request_key == bought_project.records()[name].request_key


def test_a_file_whose_entry_a_crash_prevented_is_a_note(shared_project: ProjectHarness) -> None:
    stray = shared_project.file_of("ash")
    key = shared_project.records()["ash"].request_key
    shared_project.sql("delete from events where request_key = ? and event = 'stored'", key)
    shared_project.sql(
        "update requests set state = 'completed', seq = 3, image_path = null, image_sha256 = null "
        "where request_key = ?",
        key,
    )
    shared_project.write_manifests()
    proof = shared_project.prove()
    assert proof.adds_up
    assert kinds(proof) == ["paid_not_stored", "file_not_entered"]
    assert stray.name in proof.findings[1].text


# -- forgeries --------------------------------------------------------------------------------


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_changed_byte_in_a_file_is_found(shared_project: ProjectHarness) -> None:
    flip_a_byte(shared_project.file_of("ash"))
    proof = shared_project.prove()
    assert kinds(proof) == ["file_changed"]
    assert not proof.adds_up
    assert proof.findings[0].units == IMAGE_UNITS
    assert proof.findings[0].text.startswith("ash (bucket-00")
    assert "(0.45 credits paid)" in proof.findings[0].text


def test_a_deleted_file_is_found_and_a_run_heals_it_for_nothing(
    bought_project: ProjectHarness,
) -> None:
    bought_project.file_of("cedar").unlink()
    proof = bought_project.prove()
    assert kinds(proof) == ["file_missing"]
    assert not proof.adds_up
    assert kinds(bought_project.prove(hash_bytes=0)) == ["file_missing"]
    bought_project.buy("run-2")
    assert kinds(bought_project.prove()) == []
    assert bought_project.paid_units() == 4 * IMAGE_UNITS


def test_a_file_that_belongs_to_no_request_is_found_but_not_a_rejected_one(
    shared_project: ProjectHarness,
) -> None:
    images = shared_project.folder / "krea" / "images"
    (images / "rejected").mkdir()
    (images / "rejected" / "a").write_bytes(b"black")
    assert kinds(shared_project.prove()) == []
    (images / "ab").mkdir(exist_ok=True)
    (images / "ab" / f"{'ab' * 32}.png").write_bytes(b"whose?")
    (images / "notes.txt").write_text("hello")
    copy = shared_project.file_of("ash").with_suffix(".webp")
    copy.write_bytes(b"another of the same request")
    proof = shared_project.prove()
    assert kinds(proof) == ["file_unknown"] * 3
    assert not proof.adds_up


FORGED_ROWS: tuple[dict[str, object], ...] = (
    {"credits_charged": 0.44},
    {"image_sha256": "0" * 64},
    {"image_path": "/elsewhere/a.png"},
    {"task_id": "task-unified-1751280000-forged00"},
    {"status": "failed"},
    {"credits_charged": None},
)


def test_a_forged_manifest_row_is_found(shared_project: ProjectHarness) -> None:
    for forged in FORGED_ROWS:
        shared_project.forge_row("date", **forged)
        proof = shared_project.prove()
        assert kinds(proof) == ["row_differs"], forged
        assert not proof.adds_up
        assert f"says {next(iter(forged))} " in proof.findings[0].text
        assert proof.findings[0].text.startswith("date (bucket-00")
        assert proof.figures.rows_agreeing == 3
        shared_project.write_manifests()


def test_a_manifest_row_of_a_request_that_was_never_made_is_found(
    shared_project: ProjectHarness,
) -> None:
    shared_project.forge_row("date", request_key="ef" * 32)
    proof = shared_project.prove()
    # And its true request is not listed by the manifest any more, which was written later.
    assert kinds(proof) == ["row_unknown", "not_asked_any_more"]
    assert proof.findings[0].severity is Severity.ERROR
    assert "the journal does not have its request" in proof.findings[0].text
    assert proof.findings[0].units == IMAGE_UNITS


def test_a_planned_row_that_no_run_has_seen_is_right(shared_project: ProjectHarness) -> None:
    shared_project.with_rows("elm").write_manifests()
    assert kinds(shared_project.prove()) == []


def test_a_manifest_that_cannot_be_read_is_found(shared_project: ProjectHarness) -> None:
    (shared_project.folder / "krea" / "manifest" / "other.parquet").write_bytes(b"PAR1 or so")
    pq.write_table(
        pa.table({"a": [1]}), shared_project.folder / "krea" / "manifest" / "third.parquet"
    )
    proof = shared_project.prove()
    assert kinds(proof) == ["manifest_unreadable"] * 2
    assert not proof.adds_up


def test_a_manifest_that_was_not_written_after_the_run_is_behind(
    bought_project: ProjectHarness,
) -> None:
    more = bought_project.with_rows("elm", "fir", "gum", "hazel")
    more.write_manifests()  # they are planned
    more.carry("run-2")
    proof = more.prove()
    assert kinds(proof) == ["row_behind"] * 4
    assert not proof.adds_up
    assert "says status planned, the journal stored; the manifest is older" in (
        proof.findings[0].text
    )
    more.write_manifests()
    assert more.prove().adds_up


def test_paid_images_that_no_manifest_lists_are_found(shared_project: ProjectHarness) -> None:
    for path in (shared_project.folder / "krea" / "manifest").iterdir():
        path.unlink()
    proof = shared_project.prove()
    assert kinds(proof) == ["not_listed"] * 4
    assert not proof.adds_up
    assert proof.findings[0].text.startswith("request ")


def test_a_manifest_may_lag_where_other_runs_are_about_to_write_theirs(
    shared_project: ProjectHarness,
) -> None:
    from krea_dagster.spend.proof.verify import verify  # noqa: PLC0415

    for path in (shared_project.folder / "krea" / "manifest").iterdir():
        path.unlink()
    krea = shared_project.krea
    with krea.open_journal() as journal:
        proof = verify(journal, krea.open_storage(), manifests_may_lag=True)
    assert proof.adds_up
    assert kinds(proof) == ["not_listed"] * 4
    assert proof.notes == 4


SECOND_CHARGE = (
    "insert into submissions (idempotency_key, request_key, number, run_id, partition_key, sent_at,"
    " posts, task_id, submitted_at, expected_units, committed_units, reserved_units,"
    " charged_units, settled_at) select idempotency_key || '-again', request_key, number + 1,"
    " 'run-0', partition_key, 0, 1, task_id || 'again', 0, expected_units, committed_units,"
    " reserved_units, charged_units, 1 from submissions where request_key = ?"
)


def test_a_request_that_was_charged_twice_is_found(shared_project: ProjectHarness) -> None:
    """Long before the account was first read, and entered under the caps: nothing else tells."""
    shared_project.sql(SECOND_CHARGE, shared_project.records()["birch"].request_key)
    for scope in ("run:run-0", "day:1970-01-01", "month:1970-01"):
        shared_project.sql(
            "insert into commitments values (?, ?, ?)", scope, IMAGE_UNITS, IMAGE_UNITS
        )
    of_no_table = f"partition:{shared_project.records()['birch'].partition_key}"
    shared_project.sql(
        "insert into commitments values (?, ?, ?)", of_no_table, IMAGE_UNITS, IMAGE_UNITS
    )
    proof = shared_project.prove()
    assert kinds(proof) == ["bought_twice"]
    assert not proof.adds_up
    assert proof.findings[0].units == IMAGE_UNITS
    assert proof.findings[0].text.startswith("birch (bucket-00")
    assert "bought 2 times" in proof.findings[0].text
    assert "0.45 credits too many" in proof.findings[0].text


def test_sums_under_the_caps_that_are_not_those_of_the_purchases_are_found(
    shared_project: ProjectHarness,
) -> None:
    shared_project.sql(
        "update commitments set committed_units = committed_units + 1 where scope like 'r%'"
    )
    proof = shared_project.prove()
    assert kinds(proof) == ["sum_differs"]
    assert proof.findings[0].text == (
        "run run-1: the journal has 1.8001 credits committed, its purchases come to 1.8 credits"
    )
    shared_project.sql(
        "update commitments set committed_units = committed_units - 1 where scope like 'r%'"
    )
    shared_project.sql("update commitments set spent_units = 0 where scope like 'day%'")
    assert kinds(shared_project.prove()) == ["sum_differs"]
    shared_project.sql("delete from commitments")
    # The run, its day and month, and two partitions.
    assert kinds(shared_project.prove()) == ["sum_differs"] * 5


FORGED_EVENTS = (
    ("update events set event = 'failed' where request_key = ? and seq = 3", "cannot take"),
    ("update events set event = 'sold' where request_key = ? and seq = 4", "'sold'"),
    ("delete from events where request_key = ? and seq = 2", "numbers are not 0 to 4"),
    ("delete from events where request_key = ?", "numbers are not 0 to 4"),
    ("update requests set seq = 3 where request_key = ?", "numbers are not 0 to 3"),
)


def test_events_that_do_not_lead_to_the_state_are_found(shared_project: ProjectHarness) -> None:
    key = shared_project.records()["cedar"].request_key
    journal = shared_project.folder / "krea" / "journal.db"
    honest = journal.read_bytes()
    for forgery, said in FORGED_EVENTS:
        shared_project.sql(forgery, key)
        proof = shared_project.prove()
        assert kinds(proof) == ["events_differ"], forgery
        assert not proof.adds_up
        assert said in proof.findings[0].text
        assert proof.findings[0].text.startswith("cedar (bucket-00")
        journal.write_bytes(honest)


def test_a_charge_without_a_task_is_found(shared_project: ProjectHarness) -> None:
    key = shared_project.records()["cedar"].request_key
    shared_project.sql("update submissions set task_id = null where request_key = ?", key)
    shared_project.forge_row("cedar", task_id=None)
    proof = shared_project.prove()
    assert kinds(proof) == ["charged_without_task"]
    assert proof.figures.tasks == 3


def test_a_charge_for_what_failed_is_found(project: ProjectHarness) -> None:
    project = project.with_rows("failed", prompt="[emulator: fail content_policy_violation]")
    project.buy()
    project.sql("update submissions set charged_units = 4500, committed_units = 4500")
    project.sql("update commitments set committed_units = 4500, spent_units = 4500")
    project.forge_row("failed", credits_charged=0.45)
    proof = project.prove()
    assert kinds(proof) == ["charged_without_image", "account_differs"]
    assert "0.45 credits were charged, and it is failed" in proof.findings[0].text
    assert "0.45 credits charged there are missing" in proof.findings[1].text


def test_a_stored_image_without_any_purchase_is_found(shared_project: ProjectHarness) -> None:
    key = shared_project.records()["ash"].request_key
    shared_project.sql("delete from submissions where request_key = ?", key)
    shared_project.write_manifests()
    proof = shared_project.prove()
    assert kinds(proof) == ["stored_without_charge", *["sum_differs"] * 4, "account_differs"]


def test_what_another_client_spent_between_two_readings_is_named(
    bought_project: ProjectHarness,
) -> None:
    other = ProjectHarness(
        bought_project.folder / "other", bought_project.emulator, bought_project.api_key
    )
    other.with_rows("another client's", quality="2K").buy()
    bought_project.with_rows("elm").buy("run-2")
    proof = bought_project.prove()
    assert kinds(proof) == ["account_differs"]
    assert not proof.adds_up
    assert proof.account is not None
    assert proof.account.used_units == 5 * IMAGE_UNITS + 18_000
    assert proof.account.unexplained_units == proof.findings[0].units == 18_000
    (gap,) = proof.account.gaps
    assert (gap.before.run_id, gap.after.run_id) == ("run-1", "run-2")
    assert "the journal explains 2.25 credits: 1.8 credits used beyond that" in (
        proof.findings[0].text
    )
    assert "1.8 credits between" in proof.findings[0].text


def test_findings_beyond_a_hundred_of_a_kind_are_counted_and_not_kept(
    shared_project: ProjectHarness,
) -> None:
    folder = shared_project.folder / "krea" / "images" / "00"
    folder.mkdir(exist_ok=True)
    for number in range(KEPT + 20):
        (folder / f"{number}.png").touch()
    proof = shared_project.prove()
    assert len(proof.findings) == KEPT
    assert proof.errors == sum(proof.counts.values()) == KEPT + 20
