"""The storage root: empty, not mounted, another journal's, restored, moved, shared."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from krea_dagster.application.runner import open_runner
from krea_dagster.application.spend import update_tables
from krea_dagster.emulator import Emulator
from krea_dagster.engine.journal.root_log import MARKER
from krea_dagster.engine.run.report import Progress
from krea_dagster.engine.run.requested_image import RequestedImage
from krea_dagster.engine.states import State
from krea_dagster.errors import ConfigError, PurchasesNotWritten
from tests.engine.harness import ServerClock
from tests.spend.project_harness import LEARNED, ProjectHarness, kinds


def root(shop: ProjectHarness) -> Path:
    return shop.folder / "krea"


def files(shop: ProjectHarness) -> dict[str, int]:
    """Return the stored files and their modification times."""
    return {
        str(path.relative_to(root(shop))): path.stat().st_mtime_ns
        for path in root(shop).glob("images/*/*.png")
    }


def journal_file(shop: ProjectHarness) -> Path:
    return Path(str(shop.settings["journal_url"]).removeprefix("sqlite:///"))


def keep(file: Path, name: str) -> Path:
    """Back up a journal with its log."""
    backup = file.with_name(name)
    with sqlite3.connect(file) as source, sqlite3.connect(backup) as target:
        source.backup(target)
    source.close()
    target.close()
    return backup


def restore(backup: Path, file: Path) -> None:
    for ending in ("-wal", "-shm"):
        file.with_name(file.name + ending).unlink(missing_ok=True)
    shutil.copy(backup, file)


def states(shop: ProjectHarness) -> set[State]:
    return {record.state for record in shop.records().values()}


def nothing_happens(shop: ProjectHarness, emulator: Emulator, match: str) -> None:
    """Assert that no command starts: run, quote, salvage, proof or spend tables."""
    before = (emulator.stats()["creates"], shop.records())
    salvage = lambda: shop.krea.salvage(run_id="salvage")  # noqa: E731 - a command as the others
    tables = lambda: update_tables(shop.krea)  # noqa: E731 - as above
    for command in (shop.carry, shop.quote, salvage, shop.prove, tables):
        with pytest.raises(ConfigError, match=match):
            command()
    assert (emulator.stats()["creates"], shop.records()) == before


# -- empty, or not mounted --------------------------------------------------------------------


@pytest.mark.parametrize("in_its_place", ["nothing", "an empty folder"])
def test_an_unmounted_root_stops_the_run_and_nothing_is_lost(
    shop: ProjectHarness, server: Emulator, in_its_place: str
) -> None:
    shop.buy()
    before = (files(shop), shop.records())
    root(shop).rename(shop.folder / "away")
    if in_its_place != "nothing":
        root(shop).mkdir()
    nothing_happens(shop, server, r"empty or not mounted.* has 4 images in it.*accept root")
    shutil.rmtree(root(shop), ignore_errors=True)
    (shop.folder / "away").rename(root(shop))
    report = shop.carry("run-2")
    assert (report.posts, report.progress.reused) == (0, 4)
    assert (files(shop), shop.records()) == before


def test_an_unmounted_image_folder_stops_the_run(shop: ProjectHarness, server: Emulator) -> None:
    shop.buy()
    (root(shop) / "images").rename(shop.folder / "away")
    nothing_happens(shop, server, r"4 of 4 images that were checked .* are missing")
    (shop.folder / "away").rename(root(shop) / "images")
    assert shop.carry("run-2").progress.reused == 4


def test_a_few_missing_files_are_fetched_again(shop: ProjectHarness, server: Emulator) -> None:
    shop.buy()
    for name in sorted(files(shop))[:2]:
        (root(shop) / name).unlink()
    report = shop.carry("run-2")
    assert (report.posts, report.progress.delivered, len(files(shop))) == (0, 2, 4)
    assert server.stats()["creates"] == 4


def test_lost_images_are_fetched_again_after_acceptance(
    shop: ProjectHarness, server: Emulator
) -> None:
    shop.buy()
    shutil.rmtree(root(shop))
    with pytest.raises(ConfigError, match="krea-dagster accept root"):
        shop.carry("run-2")
    assert "4 of its images are missing" in shop.krea.accept_root()
    report = shop.carry("run-3")
    assert (report.posts, report.progress.delivered, len(files(shop))) == (0, 4, 4)
    assert server.stats()["creates"] == 4


def test_expired_images_are_found_when_their_files_are_back(
    shop: ProjectHarness, server: Emulator, clock: ServerClock
) -> None:
    """A day later the links are dead and the tasks unknown: only the files are left."""
    shop.buy()
    before = shop.records()
    shutil.copytree(root(shop), shop.folder / "away")
    shutil.rmtree(root(shop) / "images")
    shop.krea.accept_root()
    clock.move(timedelta(days=2).total_seconds())
    shop.carry("run-2")
    after = shop.records()
    assert all(one.image == before[name].image for name, one in after.items())
    assert all(one.task_id == before[name].task_id for name, one in after.items())
    assert State.STORED not in states(shop)
    shutil.copytree(shop.folder / "away" / "images", root(shop) / "images")
    report = shop.carry("run-3")
    assert (report.posts, states(shop)) == (0, {State.STORED})
    assert server.stats()["creates"] == 4


# -- another journal's ------------------------------------------------------------------------


def test_a_root_of_another_journal_is_refused(shop: ProjectHarness, server: Emulator) -> None:
    shop.buy()
    other = shop.with_settings(journal_url=f"sqlite:///{shop.folder / 'other.db'}")
    with pytest.raises(ConfigError, match=r"holds images, but the journal that bought them"):
        other.carry()
    with other.krea.open_journal():
        pass
    with pytest.raises(ConfigError, match=r"belongs to another journal"):
        other.carry()
    assert server.stats()["creates"] == 4


def test_a_lost_journal_is_rebuilt_from_its_root_after_acceptance(
    shop: ProjectHarness, server: Emulator
) -> None:
    shop.buy()
    before = files(shop)
    shutil.rmtree(journal_file(shop).parent)
    with pytest.raises(ConfigError, match="accept root"):
        shop.carry("run-2")
    shop.krea.accept_root()
    report = shop.carry("run-3")
    assert (report.posts, report.progress.delivered, files(shop)) == (0, 4, before)
    assert states(shop) == {State.STORED}
    shop.write_manifests()
    proof = shop.prove()
    assert proof.adds_up
    assert {finding.kind.value for finding in proof.findings} == {"purchase_unknown"}


# -- of another time --------------------------------------------------------------------------


def test_a_journal_older_than_its_root_stops_the_run(
    shop: ProjectHarness, server: Emulator
) -> None:
    """Restored from a backup, it knows nothing of what was bought since."""
    shop.carry()
    backup = keep(journal_file(shop), "backup.db")
    later = shop.with_rows("elm", "fig")
    later.carry("run-2")
    before = files(shop)
    restore(backup, journal_file(shop))
    nothing_happens(later, server, r"is older than the storage root .* It was restored")
    later.krea.accept_root()
    report = later.carry("run-3")
    assert (report.posts, report.progress.delivered) == (0, 2)
    assert (files(shop), server.stats()["creates"]) == (before, 6)


def test_a_journal_backed_up_during_the_last_run_is_older_too(
    shop: ProjectHarness, server: Emulator
) -> None:
    krea = shop.krea
    backups: list[Path] = []

    def back_up(_: Progress) -> None:
        if not backups:
            backups.append(keep(journal_file(shop), "backup.db"))

    wanted = [RequestedImage(image.request, image.partition_key) for image in shop.images()]
    with open_runner(krea, "run-1", back_up, shop.table) as runner:
        policy = replace(runner.policy, wait_scale=0.01)
        asyncio.run(replace(runner, policy=policy, latencies=LEARNED).run(wanted))
    restore(backups[0], journal_file(shop))
    nothing_happens(shop, server, r"is older than the storage root .* It was restored")


def test_unwritten_purchases_are_recovered_by_a_restored_journal(
    shop: ProjectHarness, server: Emulator
) -> None:
    shop.with_settings(day_credits=0.1).carry()  # planned, and deferred
    backup = keep(journal_file(shop), "backup.db")
    with closing(sqlite3.connect(journal_file(shop))) as database:
        database.execute(
            "CREATE TRIGGER full BEFORE INSERT ON events WHEN new.event = 'accepted' "
            "BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END"
        )
    with pytest.raises(PurchasesNotWritten):
        shop.carry("run-2")
    restore(backup, journal_file(shop))
    with pytest.raises(ConfigError, match="is older than the storage root"):
        shop.carry("run-3")
    shop.krea.accept_root()
    kept = list((root(shop) / "unwritten").iterdir())
    report = shop.carry("run-4")
    assert (len(report.recovered), report.progress.delivered) == (len(kept), 4)
    assert not list((root(shop) / "unwritten").iterdir())
    assert server.stats()["creates"] == 4


def test_after_a_restore_a_key_with_another_body_is_unknown(
    shop: ProjectHarness, server: Emulator
) -> None:
    """It was bought after the backup, before callbacks were set up; the files are lost too."""
    shop.with_settings(day_credits=0.1).carry()
    backup = keep(journal_file(shop), "backup.db")
    shop.carry("run-2")
    restore(backup, journal_file(shop))
    shutil.rmtree(root(shop) / "images")
    shop.krea.accept_root()
    called = shop.with_settings(
        callback_base_url="https://hooks.example.com", callback_secret="s" * 40
    )
    called.carry("run-3")
    assert {record.error_code for record in shop.records().values()} == {"idempotency_conflict"}
    assert states(shop) == {State.UNKNOWN}
    assert server.stats()["creates"] == 4


def test_a_root_older_than_its_journal_stops_the_run(
    shop: ProjectHarness, server: Emulator
) -> None:
    shop.carry()
    shutil.copytree(root(shop), shop.folder / "backup")
    later = shop.with_rows(*(f"later-{number}" for number in range(4)))
    later.carry("run-2")
    shutil.rmtree(root(shop))
    (shop.folder / "backup").rename(root(shop))
    nothing_happens(later, server, r"is older than the journal .* 4 of 4 images")
    later.krea.accept_root()
    report = later.carry("run-3")
    assert (report.posts, report.progress.delivered, len(files(shop))) == (0, 4, 8)
    assert server.stats()["creates"] == 8


def test_a_moved_root_is_proved_and_its_images_are_found_where_they_are_now(
    shop: ProjectHarness,
) -> None:
    shop.buy()
    root(shop).rename(shop.folder / "moved")
    moved = shop.with_settings(storage=str(shop.folder / "moved"))
    assert kinds(moved.prove()) == []
    frame = moved.krea.manifest()
    assert len(frame) == 4
    for path in frame["image_path"]:
        assert Path(path).parent.parent.parent == shop.folder / "moved"
        assert Path(path).exists()
    (shop.folder / "moved" / Path(frame["image_path"][0])).unlink()
    assert kinds(moved.prove()) == ["file_missing"]


def test_a_moved_root_is_recognised_by_its_marker(shop: ProjectHarness, server: Emulator) -> None:
    shop.buy()
    root(shop).rename(shop.folder / "moved")
    moved = shop.with_settings(storage=str(shop.folder / "moved"))
    assert moved.carry("run-2").progress.reused == 4
    assert (shop.folder / "moved" / MARKER).exists()
    assert server.stats()["creates"] == 4


def test_a_copy_of_an_existing_root_is_a_new_root(
    shop: ProjectHarness, server: Emulator, clock: ServerClock
) -> None:
    shop.buy()
    shutil.copytree(root(shop), shop.folder / "copy")
    more = shop.with_rows("elm")
    copy = more.with_settings(storage=str(shop.folder / "copy"))
    assert more.carry("run-2").progress.delivered == 1
    clock.move(2 * 86400)  # no link is good for anything any more
    report = copy.carry("run-3")
    assert (report.posts, report.left) == (0, {})
    assert len(list((shop.folder / "copy" / "images").glob("*/*.png"))) == 5
    assert more.carry("run-4").progress.reused == 5
    assert copy.carry("run-5").progress.reused == 5
    assert server.stats()["creates"] == 5


def test_a_copy_of_a_root_takes_nothing_from_its_original(
    shop: ProjectHarness, server: Emulator
) -> None:
    shop.buy()
    shutil.copytree(root(shop), shop.folder / "copy")
    copy = shop.with_settings(storage=str(shop.folder / "copy"))
    copy.krea.accept_root()
    assert copy.carry("run-2").progress.reused == 4
    shutil.rmtree(shop.folder / "copy")
    assert shop.carry("run-3").progress.reused == 4
    assert server.stats()["creates"] == 4


def test_a_root_with_two_paths_is_not_a_copy(shop: ProjectHarness, server: Emulator) -> None:
    shop.buy()
    (shop.folder / "linked").symlink_to(root(shop))
    linked = shop.with_settings(storage=str(shop.folder / "linked"))
    assert linked.carry("run-2").progress.reused == 4
    assert shop.carry("run-3").progress.reused == 4
    assert server.stats()["creates"] == 4


def test_a_damaged_marker_is_an_error(shop: ProjectHarness) -> None:
    shop.buy()
    (root(shop) / MARKER).write_text("{")
    with pytest.raises(ConfigError, match=r"cannot be read\. It names the journal"):
        shop.carry("run-2")
    shop.krea.accept_root()
    assert shop.carry("run-3").progress.reused == 4


def test_an_image_of_an_unavailable_root_without_a_link_is_left_alone(
    shop: ProjectHarness, server: Emulator
) -> None:
    shop.buy()
    shutil.rmtree(journal_file(shop).parent)
    shop.krea.accept_root()
    shop.carry("run-2")  # found by their files, and never read from the API
    root(shop).rename(shop.folder / "away")
    other = shop.with_settings(storage=str(shop.folder / "other"))
    report = other.carry("run-3")
    assert all("cannot be read from here; copy images/" in why for why in report.left.values())
    assert (len(report.left), states(shop), server.stats()["creates"]) == (4, {State.STORED}, 4)


# -- shared -----------------------------------------------------------------------------------


def test_two_roots_of_one_journal_do_not_miss_each_others_images(
    shop: ProjectHarness, server: Emulator, clock: ServerClock
) -> None:
    """Even with dead links: the second copies from the first."""
    shop.carry()
    before = files(shop)
    clock.move(timedelta(days=2).total_seconds())
    other = shop.with_settings(storage=str(shop.folder / "other"))
    report = other.carry("run-2")
    assert (report.posts, report.left, states(shop)) == (0, {}, {State.STORED})
    copied = {
        str(p.relative_to(shop.folder / "other"))
        for p in (shop.folder / "other").glob("images/*/*.png")
    }
    assert copied == set(before)
    assert shop.carry("run-3").progress.reused == 4
    assert files(shop) == before


def test_an_image_of_an_unreadable_root_stays_there(
    shop: ProjectHarness, server: Emulator, clock: ServerClock
) -> None:
    shop.carry()
    root(shop).rename(shop.folder / "away")
    clock.move(timedelta(days=2).total_seconds())
    other = shop.with_settings(storage=str(shop.folder / "other"))
    report = other.carry("run-2")
    assert report.posts == 0
    assert all("which cannot be read from here" in why for why in report.left.values())
    assert len(report.left) == 4
    assert states(shop) == {State.STORED}
    (shop.folder / "away").rename(root(shop))
    assert shop.carry("run-3").progress.reused == 4


def test_an_unknown_file_is_adopted_and_not_overwritten(
    shop: ProjectHarness, server: Emulator
) -> None:
    """Its name is the request's key; what does not verify is bought."""
    shop.carry()
    before = files(shop)
    donor = root(shop)
    other = shop.with_settings(
        storage=str(shop.folder / "other"), journal_url=f"sqlite:///{shop.folder / 'second.db'}"
    ).with_rows("elm")
    (shop.folder / "other").mkdir()
    other.krea.accept_root()
    shutil.copytree(donor / "images", shop.folder / "other" / "images")
    broken = min((shop.folder / "other").glob("images/*/*.png"))
    broken.write_bytes(broken.read_bytes()[:1000])
    report = other.carry("run-2")
    assert report.left == {}
    assert report.posts == 2
    assert server.stats()["replays"] == 1
    assert server.stats()["creates"] == 5
    assert len(before) == 4


def test_a_run_killed_before_writing_the_marker_does_not_block_others(
    shop: ProjectHarness, server: Emulator
) -> None:
    """Nor does a run that is about to write it: several may start at once."""
    with shop.krea.open_journal() as journal:
        begun = journal.roots.begin(shop.krea.open_storage(), None)
    (root(shop) / MARKER).unlink()
    assert shop.carry().progress.delivered == 4
    with shop.krea.open_journal() as journal:
        assert journal.roots.check(shop.krea.open_storage()) == begun
    assert server.stats()["creates"] == 4
