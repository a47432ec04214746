"""Purchases whose answer could not be written into the journal: kept in files, for the next run.

The id of a bought task is in no other place once its answer is gone: a journal that is locked, full
or away, or one in which another run has taken the request over, must not lose it. So it is written
to a file of its own in the storage root, or, where that fails too, in the temporary folder.
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
    """What the server answered to a purchase. ``values`` are those of its event."""

    journal_id: str
    request_key: str
    idempotency_key: str
    values: Mapping[str, Any]
    answer: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name of its file: the same purchase is kept once."""
        return f"{self.idempotency_key}-{str(self.values['task_id']).replace(':', '_')}.json"


def save_answer(storage: Storage, answer: SavedAnswer) -> str:
    """Write an answer where the next run finds it; returns where, for people.

    Raises OSError where it can be written nowhere.
    """
    content = json.dumps(answer.__dict__).encode()
    try:
        storage.write(f"{FOLDER}/{answer.name}", lambda file: file.write(content))
        return storage.shown(f"{FOLDER}/{answer.name}")
    except Exception as error:  # noqa: BLE001 - whatever the store says, there is one more place
        folder = Path(tempfile.gettempdir()) / _TEMPORARY
        _log.warning("%s cannot be written (%s), %s is tried", storage.shown(FOLDER), error, folder)
        folder.mkdir(mode=0o700, exist_ok=True)
        (folder / answer.name).write_bytes(content)
        return str(folder / answer.name)


def write_saved_answers(
    journal: Journal, storage: Storage, *, run_id: str, at: datetime
) -> list[str]:
    """Write the answers that are kept into the journal; returns what was done, for people.

    An answer whose request another run holds, or whose journal this is not, stays where it is.
    Raises JournalError.
    """
    found = [one for one in _kept(storage) if one[1].journal_id == journal.journal_id]
    if not found:
        return []
    owner = new_owner(run_id)
    journal.register(owner)
    said: list[str] = []
    try:
        mine = journal.claim({answer.request_key for _, answer in found}, owner.owner)
        for place, answer in found:
            if answer.request_key in mine:
                written, text = _write(journal, answer, owner.owner, run_id, at)
                said.append(text)
                if written:
                    _remove(storage, place)
    finally:
        journal.release(owner.owner)
    return said


def _write(
    journal: Journal, answer: SavedAnswer, owner: str, run_id: str, at: datetime
) -> tuple[bool, str]:
    """Write an answer; returns whether the journal has its task now, and what was done."""
    record = journal.records([answer.request_key]).get(answer.request_key)
    task_id = answer.values["task_id"]
    named = f"task {task_id} of request {answer.request_key}"
    if record is None:
        return False, f"{named} was bought, and this journal does not know the request"
    if record.task_id == task_id:
        return True, f"{named} is in the journal already"
    changes = []
    if _was_before(record, answer):
        # The journal was restored from before the purchase: its intent is lost, too.
        values = {"partition_key": record.partition_key, "table_id": record.table_id}
        changes.append(Change(answer.request_key, Event.SUBMITTING, at, values))
    elif not _waits_for(record, answer):
        said = f"{named} was bought, but its request stands elsewhere by now"
        return False, f"{said} (as task {record.task_id})" if record.task_id else said
    data = {"answer": dict(answer.answer), "taken_up": "its answer could not be written before"}
    change = Change(answer.request_key, Event.ACCEPTED, at, dict(answer.values), data)
    *_, written = journal.append([*changes, change], owner=owner, run_id=run_id)
    if isinstance(written, KreaError):
        return False, f"{named} could not be written: {written}"
    return True, f"{named} was bought by an earlier run, and is in the journal now"


def _was_before(record: Record, answer: SavedAnswer) -> bool:
    """Whether a record is of before the purchase that is answered."""
    next_key = record.idempotency_key or idempotency_key(record.request_key, record.submissions + 1)
    return record.state in _NOT_BOUGHT and answer.idempotency_key == next_key


def _waits_for(record: Record, answer: SavedAnswer) -> bool:
    return (
        record.state in _OPEN
        and record.task_id is None
        and record.idempotency_key == answer.idempotency_key
    )


def _kept(storage: Storage) -> Iterator[tuple[str | Path, SavedAnswer]]:
    """Yield the answers that are kept, with their places. One that cannot be read is left."""
    places: list[str | Path] = list(storage.names(FOLDER))
    places += sorted((Path(tempfile.gettempdir()) / _TEMPORARY).glob("*.json"))
    for place in places:
        try:
            if isinstance(place, Path):
                content = place.read_bytes()
            else:
                with storage.open(place) as file:
                    content = file.read()
            yield place, SavedAnswer(**json.loads(content))
        except (OSError, ValueError, TypeError) as error:
            _log.warning(
                "the answer to a purchase that is kept in %s cannot be read: %s", place, error
            )


def _remove(storage: Storage, place: str | Path) -> None:
    with suppress(OSError):
        if isinstance(place, Path):
            place.unlink(missing_ok=True)
        else:
            storage.remove(place)
