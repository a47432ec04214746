"""Answers to purchases that could not be written to the journal, saved in files for the next run.

Only the answer contains the id of the bought task. It must not be lost because the journal is
locked, full or unavailable, or because another run has claimed the request. So it is written to a
file in the storage root or, if that fails too, in the temporary folder.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from krea_dagster.engine.journal.changes import Change
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.owners import new_owner
from krea_dagster.engine.record import Record, idempotency_key
from krea_dagster.engine.states import Event, State
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import KreaError

_log = logging.getLogger(__name__)

#: The folder under the storage root, and under the temporary folder.
FOLDER: Final = "unwritten"
_TEMPORARY: Final = "krea-dagster-unwritten"

#: States in which a purchase waits for its answer.
_OPEN: Final = frozenset({State.SUBMITTING, State.UNKNOWN, State.EXPIRED})
_NOT_BOUGHT: Final = frozenset({State.PLANNED, State.DEFERRED})


@dataclass(frozen=True)
class SavedAnswer:
    """The server's answer to a purchase. ``values`` are those of its event."""

    journal_id: str
    request_key: str
    idempotency_key: str
    values: Mapping[str, Any]
    answer: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Return the name of its file: the same purchase is saved once."""
        return f"{self.idempotency_key}-{str(self.values['task_id']).replace(':', '_')}.json"


def save_answer(storage: Storage, answer: SavedAnswer) -> str:
    """Save an answer for the next run, and return its location, for people.

    Raises OSError if it cannot be saved.
    """
    content = json.dumps(answer.__dict__).encode()
    try:
        storage.write(f"{FOLDER}/{answer.name}", lambda file: file.write(content))
        return storage.shown(f"{FOLDER}/{answer.name}")
    except Exception as error:  # noqa: BLE001 - the temporary folder remains
        folder = Path(tempfile.gettempdir()) / _TEMPORARY
        _log.warning("%s cannot be written (%s), trying %s", storage.shown(FOLDER), error, folder)
        folder.mkdir(mode=0o700, exist_ok=True)
        (folder / answer.name).write_bytes(content)
        return str(folder / answer.name)


def write_saved_answers(
    journal: Journal, storage: Storage, *, run_id: str, at: datetime
) -> list[str]:
    """Write the saved answers to the journal, and return messages for people.

    Answers of other journals, and for requests that another run holds, stay saved. Raises
    JournalError.
    """
    found = [one for one in _kept(storage) if one[1].journal_id == journal.database.journal_id]
    if not found:
        return []
    owner = new_owner(run_id)
    journal.claims.register(owner)
    said: list[str] = []
    try:
        mine = journal.claims.claim({answer.request_key for _, answer in found}, owner.owner)
        for place, answer in found:
            if answer.request_key in mine:
                written, text = _write(journal, answer, owner.owner, run_id, at)
                said.append(text)
                if written:
                    _remove(storage, place)
    finally:
        journal.claims.release(owner.owner)
    return said


def _write(
    journal: Journal, answer: SavedAnswer, owner: str, run_id: str, at: datetime
) -> tuple[bool, str]:
    """Write an answer; return whether the journal has its task now, and a message."""
    record = journal.records([answer.request_key]).get(answer.request_key)
    task_id = answer.values["task_id"]
    named = f"task {task_id} of request {answer.request_key}"
    if record is None:
        return False, f"{named} was bought, and this journal does not know the request"
    if record.task_id == task_id:
        return True, f"{named} is in the journal already"
    changes = []
    if _was_before(record, answer):
        # The journal was restored from before the purchase, so the intent is lost too.
        values = {"partition_key": record.partition_key, "table_id": record.table_id}
        changes.append(Change(answer.request_key, Event.SUBMITTING, at, values))
    elif not _waits_for(record, answer):
        said = f"{named} was bought, but its request has another state now"
        return False, f"{said} (as task {record.task_id})" if record.task_id else said
    data = {"answer": dict(answer.answer), "taken_up": "its answer could not be written before"}
    change = Change(answer.request_key, Event.ACCEPTED, at, dict(answer.values), data)
    *_, written = journal.append([*changes, change], owner=owner, run_id=run_id)
    if isinstance(written, KreaError):
        return False, f"{named} could not be written: {written}"
    return True, f"{named} was bought by an earlier run, and is in the journal now"


def _was_before(record: Record, answer: SavedAnswer) -> bool:
    """Return whether a record is from before the purchase."""
    next_key = record.idempotency_key or idempotency_key(record.request_key, record.submissions + 1)
    return record.state in _NOT_BOUGHT and answer.idempotency_key == next_key


def _waits_for(record: Record, answer: SavedAnswer) -> bool:
    return (
        record.state in _OPEN
        and record.task_id is None
        and record.idempotency_key == answer.idempotency_key
    )


def _kept(storage: Storage) -> Iterator[tuple[str | Path, SavedAnswer]]:
    """Yield the saved answers with their places. Unreadable ones are skipped."""
    places: list[str | Path] = list(storage.names(FOLDER))
    places += sorted((Path(tempfile.gettempdir()) / _TEMPORARY).glob("*.json"))
    for place in places:
        try:
            content = place.read_bytes() if isinstance(place, Path) else storage.read(place)
            yield place, SavedAnswer(**json.loads(content))
        except (OSError, ValueError, TypeError) as error:
            _log.warning("the saved answer to a purchase in %s cannot be read: %s", place, error)


def _remove(storage: Storage, place: str | Path) -> None:
    with suppress(OSError):
        if isinstance(place, Path):
            place.unlink(missing_ok=True)
        else:
            storage.remove(place)
