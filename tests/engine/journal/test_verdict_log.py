"""Verdicts on images are kept for good, in one order, and stored once each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import datetime, timedelta, timezone
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.verdict_log import TagChange, Verdict, VerdictLog
from krea_dagster.errors import InputError, JournalError
from tests.engine.journal import first_release
from tests.engine.journal.first_release import engine_of

NOON = datetime(2026, 3, 1, 12, 0, tzinfo=timezone.utc)


def sha256(number: int) -> str:
    return f"{number:064x}"


def on(number: int, verdict: str = "keep", **further: object) -> Verdict:
    """A verdict on the image with this number."""
    values: dict[str, object] = {
        "verdict_id": uuid4().hex,
        "image_sha256": sha256(number),
        "verdict": verdict,
        "reviewer": "ada",
        "request_key": f"key-{number}",
        "prompt_id": f"prompt-{number}",
        "sample": 0,
        "attempt": 0,
        "partition_key": "bucket-000",
    }
    return Verdict(**{**values, **further})  # type: ignore[arg-type]  # a test's own values


@pytest.fixture
def clock() -> Callable[[], datetime]:
    """A clock that advances by a second each time it is read."""
    times = iter(NOON + timedelta(seconds=at) for at in range(100_000))
    lock = threading.Lock()

    def now() -> datetime:
        with lock:
            return next(times)

    return now


@pytest.fixture
def log(journal_url: str, clock: Callable[[], datetime]) -> Iterator[VerdictLog]:
    with closing(VerdictLog.open(journal_url, now=clock)) as opened:
        yield opened


def test_a_verdict_is_stored_with_number_and_time(log: VerdictLog) -> None:
    given = on(1, "reject", reason="six fingers", sample=2, attempt=1)
    (kept,) = log.add([given])
    assert (kept.number, kept.at) == (1, NOON)
    assert kept == Verdict(**{**vars(given), "number": 1, "at": NOON, "tags": ()})
    assert log.current() == {sha256(1): kept}
    assert log.last_number() == 1


def test_a_given_time_is_kept(log: VerdictLog) -> None:
    then = NOON - timedelta(days=30)
    assert log.add([on(1, at=then)])[0].at == then


def test_the_last_verdict_counts_and_the_earlier_ones_are_its_history(log: VerdictLog) -> None:
    log.add([on(1, "keep"), on(2, "reject", reviewer="grace")])
    log.add([on(1, "reject", reviewer="grace", reason="blurred")])
    assert {one.image_sha256: one.verdict for one in log.current().values()} == {
        sha256(1): "reject",
        sha256(2): "reject",
    }
    assert [(one.verdict, one.reviewer) for one in log.history(image_sha256=sha256(1))] == [
        ("keep", "ada"),
        ("reject", "grace"),
    ]
    assert [one.number for one in log.history(prompt_id="prompt-1")] == [1, 3]
    assert log.history(image_sha256=sha256(1), prompt_id="prompt-2") == []
    assert [one.number for one in log.history()] == [1, 2, 3]


def test_none_takes_a_verdict_back_and_leaves_it_in_the_history(log: VerdictLog) -> None:
    log.add([on(1, "keep"), on(1, "none")])
    assert log.current() == {}
    assert log.current([sha256(1)]) == {}
    assert [one.verdict for one in log.history()] == ["keep", "none"]


def test_a_repeated_verdict_is_stored_once(log: VerdictLog) -> None:
    """No answer came, so the page sends it again, perhaps with new ones."""
    first = on(1, "keep")
    (kept,) = log.add([first])
    again = log.add([on(2), first, first])
    assert [one.number for one in again] == [2, 1, 1]
    assert again[1] == kept
    assert [one.number for one in log.history()] == [1, 2]


def test_the_verdicts_of_some_images_are_read_without_the_others(log: VerdictLog) -> None:
    log.add([on(number) for number in range(1200)])
    wanted = [sha256(number) for number in range(0, 2400, 2)]
    assert set(log.current(wanted)) == {sha256(number) for number in range(0, 1200, 2)}
    assert log.current([]) == {}
    many = [sha256(number) for number in range(1100, 9000)]
    assert set(log.current(many)) == {sha256(number) for number in range(1100, 1200)}


def test_a_reader_continues_from_the_last_number(log: VerdictLog) -> None:
    log.add([on(1), on(2)])
    assert [one.number for one in log.since(0)] == [1, 2]
    log.add([on(3)])
    assert [one.image_sha256 for one in log.since(2)] == [sha256(3)]
    assert log.since(3) == []


def test_a_journal_has_a_verdict_log(journal: Journal) -> None:
    journal.verdicts.add([on(1)])
    assert set(journal.verdicts.current()) == {sha256(1)}


# -- tags and notes ---------------------------------------------------------------------------


def tagged(number: int, *tags: str, remove: tuple[str, ...] = (), **further: object) -> Verdict:
    """An annotation that adds and removes tags of an image."""
    change = TagChange(tags, remove)
    return on(number, "none", annotates=True, tag_change=change, **further)


def test_tags_and_a_note_stay_with_the_image_when_its_verdict_changes(log: VerdictLog) -> None:
    log.add([on(1, "flag", note="left hand", tags=("portrait", "hands"))])
    log.add([on(1, "keep", reviewer="grace")])
    found = log.current()[sha256(1)]
    assert (found.verdict, found.reviewer) == ("keep", "grace")
    assert (found.tags, found.note) == (("hands", "portrait"), "left hand")


def test_who_adds_a_tag_does_not_become_the_one_who_judged(log: VerdictLog) -> None:
    (judged,) = log.add([on(1, "reject", reason="blurred", reviewer="ada")])
    log.add([tagged(1, "portrait", reviewer="grace")])
    log.add([on(1, "none", annotates=True, note="see the eyes", reviewer="linus")])
    found = log.current()[sha256(1)]
    assert (found.verdict, found.reason, found.reviewer) == ("reject", "blurred", "ada")
    assert (found.at, found.number) == (judged.at, judged.number)
    assert (found.tags, found.note) == (("portrait",), "see the eyes")
    assert [(one.verdict, one.reviewer) for one in log.history()] == [
        ("reject", "ada"),
        ("reject", "grace"),
        ("reject", "linus"),
    ]


def test_two_people_who_tag_an_image_at_once_lose_no_tag(log: VerdictLog) -> None:
    """Each says what to change, not what the tags shall be."""
    log.add([tagged(1, "portrait", "old")])
    log.add([tagged(1, "hands", remove=("old",)), tagged(1, "night")])
    assert log.annotated()[sha256(1)].tags == ("hands", "night", "portrait")


def test_an_image_with_tags_only_has_no_verdict(log: VerdictLog) -> None:
    log.add([tagged(1, "portrait")])
    assert log.current() == {}
    found = log.annotated([sha256(1)])[sha256(1)]
    assert (found.verdict, found.tags, found.reviewer) == ("none", ("portrait",), "ada")


def test_an_empty_note_and_no_tags_remove_what_was_there(log: VerdictLog) -> None:
    log.add([on(1, note="left hand", tags=("hands",))])
    log.add([on(1, "none", annotates=True, note="", tags=())])
    found = log.current()[sha256(1)]
    assert (found.verdict, found.tags, found.note) == ("keep", (), None)


def test_on_one_image_times_have_the_order_of_the_verdicts(log: VerdictLog) -> None:
    """The first reviewer's clock was an hour fast."""
    log.add([on(1, "keep", at=NOON + timedelta(hours=1))])
    log.add([on(1, "reject"), on(2)])
    assert [one.at for one in log.history()] == [
        NOON + timedelta(hours=1),
        NOON + timedelta(hours=1),
        NOON + timedelta(seconds=1),
    ]


@pytest.mark.parametrize(
    "tag", ["", " ", " a", "a,b", "a;b", "a  b", "a\nb", "a\x00b", "\ud800", "x" * 65]
)
def test_what_cannot_be_a_tag_is_refused(log: VerdictLog, tag: str) -> None:
    with pytest.raises(InputError, match="is not a tag"):
        TagChange((tag,))
    with pytest.raises(InputError, match="is not a tag"):
        log.add([on(1, tags=(tag,))])


def test_an_image_has_a_bounded_number_of_tags(log: VerdictLog) -> None:
    log.add([tagged(1, *(f"tag {at}" for at in range(50)))])
    with pytest.raises(InputError, match="at most 50 tags, not 51"):
        log.add([on(2), tagged(1, "one more")])
    assert len(log.history()) == 1, "nothing is half written"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"verdict": "maybe"}, "unknown verdict 'maybe'; use one of keep, reject, flag, none"),
        ({"image_sha256": "AB" * 32}, "is not a SHA-256"),
        ({"image_sha256": "ab"}, "is not a SHA-256"),
        ({"verdict_id": ""}, "a verdict's verdict_id must be a text of at most 64 characters"),
        ({"verdict_id": "x" * 65}, "a verdict's verdict_id must be a text"),
        ({"reviewer": "  "}, "a verdict's reviewer must be a text of at most 255"),
        ({"reviewer": "\ud800"}, "a verdict's reviewer must be a text"),
        ({"reason": "a\x00b"}, "a verdict's reason must be a text of at most 2000"),
    ],
)
def test_invalid_verdicts_are_refused_before_writing(
    log: VerdictLog, wrong: dict[str, object], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        log.add([on(2), on(1, **wrong)])  # type: ignore[arg-type]  # wrong on purpose
    assert log.history() == []


# -- append only ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    ["update verdicts set verdict = 'keep'", "delete from verdicts"],
)
@pytest.mark.parametrize("age", ["new", "upgraded"])
def test_the_database_refuses_to_change_or_remove_verdicts(
    journal_url: str, change: str, age: str
) -> None:
    if age == "upgraded":
        first_release.make(journal_url)
    with closing(VerdictLog.open(journal_url)) as log:
        log.add([on(1, "reject")])
        with (
            engine_of(journal_url) as engine,
            pytest.raises(DBAPIError, match="never changed or removed"),
            engine.begin() as connection,
        ):
            connection.execute(text(change))
        assert [one.verdict for one in log.history()] == ["reject"]


def test_the_database_refuses_invalid_verdicts_too(journal_url: str) -> None:
    unknown = (
        "insert into verdicts (verdict_id, image_sha256, verdict, reviewer, at, request_key, "
        "prompt_id, sample, attempt, partition_key) "
        "values ('1', 'a', 'maybe', 'x', 0, 'k', 'p', 0, 0, 'b')"
    )
    with closing(VerdictLog.open(journal_url)) as log:
        with (
            engine_of(journal_url) as engine,
            pytest.raises(DBAPIError),
            engine.begin() as connection,
        ):
            connection.execute(text(unknown))
        assert log.history() == []


# -- several at once --------------------------------------------------------------------------


def test_a_reader_sees_concurrent_verdicts_exactly_once(
    journal_url: str, clock: Callable[[], datetime]
) -> None:
    """The reader continues from the last number it saw, as the page's poll does."""
    VerdictLog.open(journal_url).close()
    done = threading.Event()
    seen: list[int] = []

    def write(writer: int) -> None:
        with closing(VerdictLog.open(journal_url, now=clock)) as log:
            for turn in range(25):
                log.add([on(writer * 1000 + turn, reviewer=f"writer-{writer}")] * 2)

    def read() -> None:
        with closing(VerdictLog.open(journal_url)) as log:
            while True:
                last = done.is_set()
                seen.extend(one.number for one in log.since(seen[-1] if seen else 0))
                if last:
                    return

    with ThreadPoolExecutor(5) as pool:
        reader = pool.submit(read)
        for writer in [pool.submit(write, number) for number in range(4)]:
            writer.result()
        done.set()
        reader.result()
    with closing(VerdictLog.open(journal_url)) as log:
        history = log.history()
    assert [one.number for one in history] == seen
    assert len(history) == 100
    times = [one.at for one in history if one.at is not None]
    assert times == sorted(times)


def test_numbers_become_visible_in_order(journal_url: str) -> None:
    """A later number must not be visible before an earlier one: the later writer waits."""
    entered, go = threading.Event(), threading.Event()

    def slowly() -> datetime:
        entered.set()  # within the transaction, behind the lock
        assert go.wait(20)
        return NOON

    slow = VerdictLog.open(journal_url, now=slowly)
    quick = VerdictLog.open(journal_url)
    with closing(slow), closing(quick), ThreadPoolExecutor(2) as pool:
        first = pool.submit(slow.add, [on(1)])
        assert entered.wait(20)
        second = pool.submit(quick.add, [on(2)])
        assert quick.since(0) == [], "a reader does not wait"
        assert not second.done()
        go.set()
        assert first.result()[0].number < second.result()[0].number
        assert [one.image_sha256 for one in quick.since(0)] == [sha256(1), sha256(2)]


def test_a_removed_journal_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "journal.db"
    with closing(VerdictLog.open(f"sqlite:///{file}")) as log:
        log.add([on(1)])
        file.unlink()
        with pytest.raises(JournalError, match="file is missing"):
            log.add([on(2)])
