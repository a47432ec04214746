"""Writes what the page posts to the journal: verdicts and annotations, of one image or of many.

Many are named by their places in a list, and written in one commit. Their ids are made of the
batch's id and the image, so that they can be found again to be undone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from sqlalchemy import select

from krea_dagster.curation.review.index import ReviewIndex
from krea_dagster.curation.review.selection import Rows
from krea_dagster.curation.review.verdict_cache import VerdictView
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.rows import rows_with
from krea_dagster.engine.journal.schema import requests
from krea_dagster.engine.verdict import NONE, TagChange, Verdict
from krea_dagster.errors import InputError

_TEXTS: Final = (
    "verdict_id", "image_sha256", "reviewer", "request_key", "prompt_id", "partition_key",
)  # fmt: skip
_BATCH_ID: Final = re.compile(r"[0-9a-f]{32}")
_ROW: Final = ("image_sha256", "request_key", "prompt_id", "sample", "attempt", "partition_key")


@dataclass(frozen=True)
class Said:
    """What a post says of its images."""

    verdict: str
    reason: str | None
    note: str | None
    tag_change: TagChange
    annotates: bool

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Said:
        """Return what an entry of the page says. Raises InputError."""
        verdict = entry.get("verdict")
        if verdict is not None and not isinstance(verdict, str):
            raise InputError("the verdict must be a text, or null for tags and a note only")
        for name in ("reason", "note"):
            if not isinstance(entry.get(name), str | None):
                raise InputError(f"the {name} must be a text")
        return cls(
            verdict=NONE if verdict is None else verdict,
            reason=entry.get("reason") or None,
            note=entry.get("note"),
            tag_change=TagChange(_tags(entry, "tag"), _tags(entry, "untag")),
            annotates=verdict is None,
        )


def _tags(entry: Mapping[str, Any], name: str) -> tuple[str, ...]:
    tags = entry.get(name) or []
    if not isinstance(tags, list) or not all(isinstance(one, str) for one in tags):
        raise InputError(f"{name} must be a list of texts")
    return tuple(tags)


def verdict_of(entry: Mapping[str, Any]) -> Verdict:
    """Return a verdict on one image that the page posted. Raises InputError."""
    wrong = [one for one in _TEXTS if not isinstance(entry.get(one), str)]
    numbers = [entry.get(one) for one in ("sample", "attempt")]
    if wrong or not all(type(one) is int and 0 <= one < 2**31 for one in numbers):
        raise InputError(f"the verdict lacks {', '.join(wrong) or 'a sample or attempt'}")
    given = Verdict(
        **{one: entry[one] for one in _TEXTS},
        sample=entry["sample"],
        attempt=entry["attempt"],
        **vars(Said.of(entry)),
    )
    given.check()
    return given


class PostedVerdicts:
    """Writes verdicts to a journal, and reads them back into the review's view."""

    def __init__(self, journal: Journal, view: VerdictView) -> None:
        self._journal = journal
        self._view = view

    def add(self, given: Sequence[Verdict]) -> list[Verdict]:
        """Write verdicts in one commit; return what each of them says. Raises JournalError."""
        tables = self._tables([one.request_key for one in given])
        known = [replace(one, table_id=at) for one, at in zip(given, tables, strict=True)]
        stored = self._journal.verdicts.add(known)
        self._view.catch_up()
        first = min((one.number for one in stored), default=0)
        said = {one.number: one for one in self._view.since(first - 1)}
        # An annotation has the id of its verdict in what is said: the page waits for its own.
        return [replace(said[one.number], verdict_id=one.verdict_id) for one in stored]

    def add_batch(
        self, index: ReviewIndex, rows: Rows, batch_id: str, reviewer: str, said: Said
    ) -> int:
        """Say the same of the images of many rows; return their number. Raises InputError."""
        _, firsts = np.unique(index.sha_codes[rows], return_index=True)
        chosen = rows[np.sort(firsts)]
        chosen = chosen[index.sha_codes[chosen] >= 0]
        columns = {name: index.table[name].take(chosen).to_pylist() for name in _ROW}
        columns["table_id"] = self._tables(columns["request_key"])
        given = [
            Verdict(
                verdict_id=_id_in(batch_id, values[0]),
                reviewer=reviewer,
                **dict(zip(columns, values, strict=True)),
                **vars(said),
            )
            for values in zip(*columns.values(), strict=True)
        ]
        self._write(given)
        return len(given)

    def undo_batch(self, batch_id: str, undo_id: str, reviewer: str) -> tuple[int, int]:
        """Restore what was said before a batch, on images on which nothing was said since.

        Returns the number of these images and of the others.
        """
        self._view.catch_up()
        batch = self._view.batch(_checked_id(batch_id))
        given = [
            _restored(one.given, one.before, undo_id, reviewer) for one in batch if not one.since
        ]
        self._write(given)
        return len(given), len(batch) - len(given)

    def _write(self, given: Sequence[Verdict]) -> None:
        self._journal.verdicts.add(given)
        self._view.catch_up()

    def _tables(self, request_keys: Sequence[str]) -> list[str]:
        """Return the prompt table of each request; empty where it is not known."""
        query = select(requests.c.request_key, requests.c.table_id)
        with self._journal.database.read() as connection:
            rows = rows_with(connection, query, requests.c.request_key, sorted(set(request_keys)))
            found = {row.request_key: row.table_id for row in rows}
        return [found.get(key, "") for key in request_keys]


def ranges_of(ranges: Iterable[Any], rows: Rows) -> Rows:
    """Return the rows at places, given as pairs of the first and the last. Raises InputError."""
    chosen = np.zeros(len(rows), bool)
    try:
        for first, last in ranges:
            if type(first) is not int or type(last) is not int or not 0 <= first <= last:
                raise InputError("a range of places is two whole numbers")
            chosen[first : last + 1] = True
    except (TypeError, ValueError):
        raise InputError("the places must be pairs of whole numbers") from None
    return rows[chosen]


def _restored(one: Verdict, before: Verdict | None, undo_id: str, reviewer: str) -> Verdict:
    return replace(
        one,
        verdict_id=_id_in(undo_id, one.image_sha256),
        reviewer=reviewer,
        verdict=NONE if before is None else before.verdict,
        reason=None if before is None else before.reason,
        tags=() if before is None else before.tags or (),
        note="" if before is None else before.note or "",
        at=None,
        number=0,
    )


def _checked_id(batch_id: object) -> str:
    if not isinstance(batch_id, str) or not _BATCH_ID.fullmatch(batch_id):
        raise InputError("a batch's id must be 32 hexadecimal digits")
    return batch_id


def _id_in(batch_id: str, sha256: str) -> str:
    own = hashlib.sha256(f"{_checked_id(batch_id)} {sha256}".encode()).hexdigest()
    return f"{batch_id}{own[:32]}"
