"""Verdicts leave a project as a file, and come into another one: each once, the last one counts."""

from __future__ import annotations

import csv
import hashlib
import io
import shutil
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from uuid import uuid4

import pyarrow.parquet as pq
import pytest

from krea_dagster.application.krea import Krea
from krea_dagster.application.verdicts import ImportedVerdicts
from krea_dagster.engine.journal.verdict_log import TagChange, Verdict
from krea_dagster.errors import ConfigError, InputError
from tests.curation.review.review_harness import make_project, sha256

NOON = datetime(2026, 3, 1, 12, 0, tzinfo=timezone.utc)
PEOPLE = ("ada", "grace", "linus", "margaret", "-edsger")
ODD = '=HYPERLINK("https://example.org")'


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Krea]:
    """Makes a project of 40 rows in a folder: each time with the same images."""
    first = tmp_path_factory.mktemp("verdicts") / "krea"
    make_project(first, rows=40, subjects=1, measured=False)

    def copied_to(folder: Path) -> Krea:
        shutil.copytree(first, folder)
        return Krea.from_environment({"KREA_STORAGE": str(folder)})

    return copied_to


@pytest.fixture
def krea(project: Callable[[Path], Krea], tmp_path: Path) -> Krea:
    return project(tmp_path / "one")


def say(krea: Krea, *verdicts: Verdict) -> None:
    with krea.open_journal() as journal:
        journal.verdicts.add(verdicts)


def request_key(number: int) -> str:
    return hashlib.sha256(f"{number}".encode()).hexdigest()


def on(number: int, verdict: str = "keep", minute: int = 0, **further: object) -> Verdict:
    """A verdict on the image of a row."""
    values: dict[str, object] = {
        "verdict_id": uuid4().hex,
        "image_sha256": sha256(number),
        "verdict": verdict,
        "reviewer": "ada",
        "request_key": request_key(number),
        "prompt_id": f"prompt-{number // 4:06d}",
        "sample": number % 4,
        "attempt": 0,
        "partition_key": "bucket-000",
        "at": NOON + timedelta(minutes=minute),
    }
    return Verdict(**{**values, **further})  # type: ignore[arg-type]  # a test's own values


def five_people(krea: Krea) -> None:
    """Five people review 30 images: verdicts, reasons, tags, notes; some are taken back."""
    for turn, person in enumerate(PEOPLE):
        for number in range(turn, 30, 2):
            verdict = ("keep", "reject", "flag", "none", "keep")[(number + turn) % 5]
            say(
                krea,
                on(
                    number,
                    verdict,
                    minute=100 * turn + number,
                    reviewer=person,
                    reason=(ODD, 'a, "b"\nc; d', "'=x", "  é ")[number % 4]
                    if verdict == "reject"
                    else None,
                    note="a\tnote" if number % 7 == 0 else None,
                    tag_change=TagChange((f"seen by {person.strip('-')}", "@home")),
                ),
            )
            if number % 5 == 0:
                change = TagChange(("night",), ("@home",))
                minute = 100 * turn + number + 1
                say(krea, on(number, minute=minute, annotates=True, tag_change=change))


def lines(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))


def write(path: Path, *rows: Sequence[str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


# -- out and in -------------------------------------------------------------------------------


@pytest.mark.parametrize("history", [False, True])
@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_verdicts_of_five_people_are_the_same_bytes_after_an_import_elsewhere(
    project: Callable[[Path], Krea], krea: Krea, tmp_path: Path, form: str, history: bool
) -> None:
    five_people(krea)
    other = project(tmp_path / "other")
    first, second = tmp_path / f"first.{form}", tmp_path / f"second.{form}"
    rows = krea.export_verdicts(first, history=history)
    done = other.import_verdicts([first])
    assert (done.rows, done.added, done.unknown) == (rows, rows, [])
    assert other.export_verdicts(second, history=history) == rows
    assert second.read_bytes() == first.read_bytes()
    counted = [
        frame[["image_sha256", "verdict", "reason", "reviewer", "at", "tags", "note"]]
        .sort_values("image_sha256")
        .to_dict("records")
        for frame in (krea.verdicts(), other.verdicts())
    ]
    assert counted[0] == counted[1]
    assert {one["reviewer"] for one in counted[0]} == set(PEOPLE)


@pytest.mark.parametrize("history", [False, True])
def test_a_repeated_import_changes_nothing(
    project: Callable[[Path], Krea], krea: Krea, tmp_path: Path, history: bool
) -> None:
    five_people(krea)
    other, file = project(tmp_path / "other"), tmp_path / "verdicts.csv"
    rows = krea.export_verdicts(file, history=history)
    other.import_verdicts([file])
    with other.open_journal() as journal:
        before = journal.verdicts.last_number()
    assert other.import_verdicts([file]) == ImportedVerdicts(rows, 0, rows, 0, [])
    assert krea.import_verdicts([file]) == ImportedVerdicts(rows, 0, rows, 0, [])
    with other.open_journal() as journal:
        assert journal.verdicts.last_number() == before


def test_five_people_s_own_projects_become_one(
    project: Callable[[Path], Krea], tmp_path: Path
) -> None:
    """Each reviewed a copy; in all files together, the last verdict on an image counts."""
    files = []
    for turn, person in enumerate(PEOPLE):
        own = project(tmp_path / f"of {person}")
        say(own, on(0, ("keep", "reject")[turn % 2], minute=10 - turn, reviewer=person))
        say(own, on(1 + turn, "flag", minute=turn, reviewer=person))
        files.append(tmp_path / f"{person}.csv")
        own.export_verdicts(files[-1])
    shared = project(tmp_path / "shared")
    done = shared.import_verdicts(files)
    assert (done.rows, done.added, done.older) == (10, 10, 0)
    found = shared.verdicts().set_index("image_sha256")
    assert found.loc[sha256(0), ["verdict", "reviewer"]].tolist() == ["keep", "ada"]
    assert len(found) == 6


# -- conflicts --------------------------------------------------------------------------------


def test_the_last_verdict_by_time_counts(
    project: Callable[[Path], Krea], krea: Krea, tmp_path: Path
) -> None:
    other, file = project(tmp_path / "other"), tmp_path / "verdicts.csv"
    say(other, on(0, "reject", minute=5), on(1, "reject", minute=5))
    other.export_verdicts(file)
    say(krea, on(0, "keep", minute=4), on(1, "keep", minute=6))
    done = krea.import_verdicts([file])
    assert (done.added, done.older) == (1, 1)
    found = krea.verdicts().set_index("image_sha256")["verdict"].to_dict()
    assert found == {sha256(0): "reject", sha256(1): "keep"}


def test_tags_that_are_newer_than_the_row_stay(
    project: Callable[[Path], Krea], krea: Krea, tmp_path: Path
) -> None:
    """The verdict was given between the one here and its tag: it counts, and the tag stays."""
    other, file = project(tmp_path / "other"), tmp_path / "verdicts.csv"
    say(other, on(0, "reject", minute=5, reviewer="grace"))
    other.export_verdicts(file)
    say(krea, on(0, "keep", minute=4))
    say(krea, on(0, minute=6, annotates=True, tag_change=TagChange(("night",))))
    assert krea.import_verdicts([file]).added == 1
    (found,) = krea.verdicts().to_dict("records")
    assert (found["verdict"], found["reviewer"], found["tags"]) == ("reject", "grace", ("night",))
    assert krea.import_verdicts([file]) == ImportedVerdicts(1, 0, 1, 0, [])


def test_a_file_without_tags_and_notes_leaves_them(krea: Krea, tmp_path: Path) -> None:
    say(krea, on(0, "keep", tags=("night",), note="left hand"))
    file = write(
        tmp_path / "verdicts.csv", ["image_sha256", "verdict", "reviewer"], [sha256(0), "flag", "x"]
    )
    krea.import_verdicts([file])
    (found,) = krea.verdicts().to_dict("records")
    assert (found["verdict"], found["tags"], found["note"]) == ("flag", ("night",), "left hand")


# -- files that people write -------------------------------------------------------------------


def test_a_row_names_its_image_by_prompt_or_by_request_too(krea: Krea, tmp_path: Path) -> None:
    file = write(
        tmp_path / "verdicts.csv",
        ["prompt_id", "Sample", "request_key", "Verdict", "tags"],
        ["prompt-000002", "3", "", "Reject", " night , left hand;night"],
        ["prompt-000002", "", "", "keep", ""],
        ["", "", request_key(1), "flag", ""],
    )
    krea.import_verdicts([file], reviewer="ada")
    found = krea.verdicts().set_index("image_sha256")
    assert found["verdict"].to_dict() == {
        sha256(11): "reject",
        sha256(8): "keep",
        sha256(1): "flag",
    }
    assert found["tags"][sha256(11)] == ("left hand", "night")
    assert set(found["prompt_id"]) == {"prompt-000000", "prompt-000002"}


def test_a_spreadsheet_may_write_semicolons_and_a_mark_at_the_start(
    krea: Krea, tmp_path: Path
) -> None:
    file = tmp_path / "verdicts.csv"
    text = f"image_sha256;verdict;reviewer;reason\r\n{sha256(0)};reject;ada;'=1, and\r\n"
    file.write_text(text, encoding="utf-8-sig")
    krea.import_verdicts([file])
    assert krea.verdicts()["reason"].tolist() == ["=1, and"]


def test_texts_that_a_spreadsheet_would_compute_are_guarded(krea: Krea, tmp_path: Path) -> None:
    say(krea, on(0, "reject", reason=ODD, reviewer="-edsger", tags=("@home",), note="'=x"))
    krea.export_verdicts(tmp_path / "verdicts.csv")
    (row,) = lines(tmp_path / "verdicts.csv")
    assert row["reason"] == f"'{ODD}"
    assert (row["reviewer"], row["tags"], row["note"]) == ("'-edsger", "'@home", "''=x")
    krea.export_verdicts(tmp_path / "verdicts.parquet")
    (exact,) = pq.read_table(tmp_path / "verdicts.parquet").to_pylist()
    assert (exact["reason"], exact["tags"]) == (ODD, ["@home"])


def test_images_of_another_project_are_counted_and_named(krea: Krea, tmp_path: Path) -> None:
    file = write(
        tmp_path / "verdicts.csv",
        ["image_sha256", "verdict", "reviewer"],
        [sha256(999), "keep", "ada"],
        [sha256(0), "keep", "ada"],
        [sha256(999), "flag", "bob"],
    )
    done = krea.import_verdicts([file])
    assert (done.rows, done.added) == (3, 1)
    assert done.unknown == [f"verdicts.csv row 1: {sha256(999)}"]


def test_every_wrong_row_is_named_and_nothing_is_imported(krea: Krea, tmp_path: Path) -> None:
    file = write(
        tmp_path / "verdicts.csv",
        ["image_sha256", "prompt_id", "sample", "verdict", "reviewer", "reviewed_at", "tags"],
        [sha256(0), "", "", "keep", "ada", "2026-03-01T12:00:00Z", ""],
        [sha256(0), "", "", "maybe", "ada", "", ""],
        [sha256(0), "", "", "keep", "", "", ""],
        ["", "", "", "keep", "ada", "", ""],
        [sha256(0), "", "", "", "ada", "", ""],
        [sha256(0), "", "", "keep", "ada", "1/3/2026 12:00", ""],
        [sha256(0), "", "", "keep", "ada", "2999-01-01", ""],
        [sha256(0), "", "two", "keep", "ada", "", ""],
        ["abc", "", "", "keep", "ada", "", ""],
        [sha256(0), "", "", "keep", "ada", "", "x" * 65],
    )
    with pytest.raises(InputError) as raised:
        krea.import_verdicts([file])
    said = str(raised.value)
    assert said.startswith("9 rows are wrong, and nothing was imported:\n")
    for words in (
        "row 2: verdict is 'maybe'; use one of keep, reject, flag, none",
        "row 3: it has no reviewer; fill that column, or give --reviewer NAME",
        "row 4: it names no image: image_sha256, request_key, prompt_id are empty",
        "row 5: it has neither a verdict (keep, reject, flag, none) nor tags nor a note",
        "row 6: reviewed_at is '1/3/2026 12:00'; write it as 2026-11-20T09:30:00Z",
        "row 7: reviewed_at is 2999-01-01T00:00:00+00:00, which is in the future",
        "row 8: sample is 'two', which is not a whole number from 0",
        "row 9: 'abc' is not a SHA-256",
        "row 10: 'x",
    ):
        assert f"verdicts.csv {words}" in said
    assert krea.verdicts().empty


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("verdicts.txt", "", "ends with .csv or .parquet"),
        ("verdicts.csv", "", "its columns are none"),
        ("verdicts.csv", "sha,verdict\n", "it needs a column image_sha256, request_key or"),
        ("verdicts.csv", "image_sha256,reason\n", "has no column verdict, tags or note"),
        ("verdicts.csv", 'image_sha256,verdict\n"a', "cannot be read"),
        ("verdicts.parquet", "image_sha256,verdict\n", "cannot be read"),
    ],
)
def test_a_file_that_holds_no_verdicts_is_refused(
    krea: Krea, tmp_path: Path, name: str, text: str, said: str
) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(InputError, match=said):
        krea.import_verdicts([file])


def test_without_a_journal_there_are_no_verdicts(tmp_path: Path) -> None:
    empty = Krea.from_environment({"KREA_STORAGE": str(tmp_path / "nothing")})
    with pytest.raises(ConfigError, match="there is no journal, and verdicts are in the journal"):
        empty.export_verdicts(tmp_path / "verdicts.csv")
