"""Verdicts out of a project and into one, as files.

An import decides by time, as the review does: on each image, the last verdict counts. A verdict
that is older than the one here is left out, because the journal's order is what counts in it. Tags
and note of a row are left out where newer ones are here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final, NamedTuple

import pyarrow.compute as pc
from sqlalchemy import select

from krea_dagster.application.backend import Backend
from krea_dagster.curation.verdict_files import (
    VerdictRow,
    form_of,
    read_verdict_file,
    verdict_file,
)
from krea_dagster.engine.clock import SystemClock
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.schema import requests
from krea_dagster.engine.storage.page import write_page
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.engine.verdict import NONE, Verdict
from krea_dagster.errors import InputError
from krea_dagster.manifest import present_manifests
from krea_dagster.parquet_files import open_parquet

#: A time later than this from now is a mistake: such a verdict would win over all to come.
_FAST_CLOCK: Final = timedelta(hours=1)
#: Wrong rows that an error shows.
_SHOWN: Final = 20


@dataclass(frozen=True)
class ImportedVerdicts:
    """What an import did: the number of rows of each kind, and the images that are not here.

    ``added`` rows are in the journal now, ``known`` ones were before, ``older`` ones are older than
    the verdict of their image. ``unknown`` names the first row of each image that this project does
    not have; their rows were left out.
    """

    rows: int
    added: int
    known: int
    older: int
    unknown: Sequence[str]


def export_verdicts(backend: Backend, path: Path, *, history: bool = False) -> int:
    """Write the verdicts to a file; see ``Krea.export_verdicts``."""
    form = form_of(path)
    with backend.existing_journal("verdicts") as journal:
        if history:
            found = journal.verdicts.history()
        else:
            found = [
                one
                for one in journal.verdicts.annotated().values()
                if one.verdict != NONE or one.tags or one.note
            ]
            found.sort(key=lambda one: one.image_sha256)
    found.sort(key=_time_of)  # stable: verdicts on one image keep their order
    write_page(path, verdict_file(found, form), "the verdicts")
    return len(found)


def import_verdicts(
    backend: Backend, paths: Sequence[Path], *, reviewer: str = ""
) -> ImportedVerdicts:
    """Add the verdicts of files to the journal; see ``Krea.import_verdicts``."""
    rows: list[VerdictRow] = []
    wrong: list[str] = []
    for path in paths:
        good, bad = read_verdict_file(path)
        rows += good
        wrong += bad
    with backend.existing_journal("verdicts") as journal:
        images = _KnownImages.read(backend.open_storage(), journal)
        merge = _Merge(images, journal.verdicts.history(), SystemClock().now(), reviewer)
        # Times of several files interleave; rows without a time are from now.
        for row in sorted(rows, key=lambda one: one.reviewed_at or merge.now):
            try:
                merge.take(row)
            except InputError as error:
                wrong.append(f"{row.place}: {error}")
        if wrong:
            raise _wrong_rows(wrong)
        journal.verdicts.add(merge.new)
    return ImportedVerdicts(
        rows=len(rows),
        added=len(merge.new),
        known=merge.known,
        older=merge.older,
        unknown=[f"{place}: {name}" for name, place in merge.unknown.items()],
    )


def _wrong_rows(wrong: Sequence[str]) -> InputError:
    more = f"\n… and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    lines = "\n".join(wrong[:_SHOWN])
    count = "1 row is" if len(wrong) == 1 else f"{len(wrong)} rows are"
    return InputError(f"{count} wrong, and nothing was imported:\n{lines}{more}")


def _time_of(one: Verdict) -> datetime:
    assert one.at is not None  # noqa: S101 - it is stored
    return one.at


# -- images ---------------------------------------------------------------------------------------


class _TableRow(NamedTuple):
    """A row that an image was made for."""

    prompt_id: str
    sample: int


class _KnownRequest(NamedTuple):
    """What a verdict repeats of the request of its image."""

    request_key: str
    image_sha256: str
    attempt: int
    partition_key: str
    table_id: str


@dataclass(frozen=True)
class _KnownImages:
    """The images of a project: their requests, and the rows of the manifests that have them."""

    requests: Mapping[str, _KnownRequest]
    by_image: Mapping[str, Sequence[_KnownRequest]]
    rows: Mapping[str, Sequence[_TableRow]]
    by_row: Mapping[_TableRow, Sequence[str]]

    @classmethod
    def read(cls, storage: Storage, journal: Journal) -> _KnownImages:
        columns = [requests.c[name] for name in _KnownRequest._fields]
        query = select(*columns).where(requests.c.image_sha256.is_not(None))
        known = {row.request_key: _KnownRequest(*row) for row in journal.database.fetch(query)}
        rows: dict[str, list[_TableRow]] = {}
        by_row: dict[_TableRow, list[str]] = {}
        for row, request in _manifest_rows(storage):
            known.setdefault(request.request_key, request)
            rows.setdefault(request.image_sha256, []).append(row)
            by_row.setdefault(row, []).append(request.image_sha256)
        by_image: dict[str, list[_KnownRequest]] = {}
        for request in known.values():
            by_image.setdefault(request.image_sha256, []).append(request)
        return cls(known, by_image, rows, by_row)

    def find(self, row: VerdictRow) -> str | None:
        """Return the image of a row; None where it is not here. Raises InputError."""
        if row.image_sha256 is not None:
            return row.image_sha256 if row.image_sha256 in self.by_image else None
        if row.request_key is not None:
            request = self.requests.get(row.request_key)
            return None if request is None else request.image_sha256
        assert row.prompt_id is not None  # noqa: S101 - a row has one of the keys
        found = set(self.by_row.get(_TableRow(row.prompt_id, row.sample or 0), ()))
        if len(found) > 1:
            raise InputError(
                f"prompt_id {row.prompt_id!r}, sample {row.sample or 0} is {len(found)} images "
                "here; say which one by image_sha256"
            )
        return next(iter(found), None)


def _manifest_rows(storage: Storage) -> Iterator[tuple[_TableRow, _KnownRequest]]:
    columns = [*_TableRow._fields, "request_key", "image_sha256", "attempt", "partition_key"]
    for name in present_manifests(storage):
        with storage.open(name) as file:
            table = open_parquet(file).read(columns)
        table = table.filter(pc.is_valid(table["image_sha256"]))
        for values in zip(*(table[one].to_pylist() for one in columns), strict=True):
            row = dict(zip(columns, values, strict=True))
            yield (
                _TableRow(row.pop("prompt_id"), row.pop("sample")),
                _KnownRequest(table_id="", **row),
            )


# -- merging --------------------------------------------------------------------------------------


class _Merge:
    """Decides which rows become verdicts. The rows come in the order of their times."""

    def __init__(
        self, images: _KnownImages, history: Sequence[Verdict], now: datetime, reviewer: str
    ) -> None:
        self.now = now
        self.new: list[Verdict] = []
        self.known = self.older = 0
        self.unknown: dict[str, str] = {}
        self._images = images
        self._reviewer = reviewer
        #: The last row of each image, and what counts of it.
        self._last: dict[str, Verdict] = {}
        self._counts: dict[str, Verdict] = {}
        self._said: dict[str, list[Verdict]] = {}
        for one in history:
            self._remember(one)

    def _remember(self, one: Verdict) -> None:
        sha256 = one.image_sha256
        counts = one.said_after(self._counts.get(sha256))
        self._last[sha256] = one
        self._counts[sha256] = counts
        self._said.setdefault(sha256, []).extend((one, counts))

    def take(self, row: VerdictRow) -> None:
        """Take one row. Raises InputError where it is wrong."""
        sha256 = self._images.find(row)
        given = self._verdict_of(row, sha256 or row.image_sha256 or "0" * 64)
        if sha256 is None:
            name = row.image_sha256 or row.request_key or f"{row.prompt_id}, sample {row.sample}"
            self.unknown.setdefault(name, row.place)
            return
        said = self._said.get(sha256, ())
        if any(one.verdict_id == given.verdict_id or _same(one, given, row) for one in said):
            self.known += 1
            return
        at = given.at or self.now
        last, counts = self._last.get(sha256), self._counts.get(sha256)
        newer = last is not None and _time_of(last) > at
        if newer and (
            given.annotates or counts is None or counts.annotates or _time_of(counts) > at
        ):
            self.older += 1
            return
        if newer:  # than the verdict here, and older than its tags or its note
            given = replace(given, tags=None, note=None)
        given = given.after(last, at)
        self.new.append(given)
        self._remember(given)

    def _verdict_of(self, row: VerdictRow, sha256: str) -> Verdict:
        images = self._images
        reviewer = row.reviewer or self._reviewer
        if not reviewer:
            raise InputError("it has no reviewer; fill that column, or give --reviewer NAME")
        if row.reviewed_at is not None and row.reviewed_at > self.now + _FAST_CLOCK:
            raise InputError(
                f"reviewed_at is {row.reviewed_at.isoformat()}, which is in the future"
            )
        of_image = images.by_image.get(sha256) or [_KnownRequest("unknown", sha256, 0, "", "")]
        named = images.requests.get(row.request_key or "")
        request = named if named in of_image and named is not None else of_image[0]
        for_row = _TableRow(row.prompt_id or "", row.sample or 0)
        rows = images.rows.get(sha256, ())
        if rows and for_row not in rows:
            for_row = rows[0]
        given = Verdict(
            verdict_id=_id_of(row, sha256, reviewer),
            image_sha256=sha256,
            verdict=row.verdict or NONE,
            reviewer=reviewer,
            request_key=request.request_key,
            prompt_id=for_row.prompt_id,
            sample=for_row.sample,
            attempt=request.attempt,
            partition_key=request.partition_key,
            reason=row.reason,
            at=row.reviewed_at,
            table_id=request.table_id,
            note=row.note,
            tags=row.tags,
            annotates=not row.verdict,
        )
        given.check()
        return given


def _same(one: Verdict, given: Verdict, row: VerdictRow) -> bool:
    """Whether a verdict that is here says what a row of a file says."""
    return (
        one.annotates == given.annotates
        and (one.annotates or one.verdict == given.verdict)
        and (one.annotates or (one.reason or None) == given.reason)
        and one.reviewer == given.reviewer
        and (row.reviewed_at is None or one.at == given.at)
        and (row.tags is None or tuple(one.tags or ()) == tuple(sorted(row.tags)))
        and (row.note is None or (one.note or "") == row.note)
    )


def _id_of(row: VerdictRow, sha256: str, reviewer: str) -> str:
    """Return an id that is the same whenever the row is imported."""
    said = (
        sha256, row.verdict, row.reason, reviewer, row.reviewed_at, row.tags, row.note,
    )  # fmt: skip
    return hashlib.sha256(b"krea-dagster/1/import" + repr(said).encode()).hexdigest()
