"""The journal's record of one request."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from krea_dagster.engine.states import State
from krea_dagster.models import ImageRequest

#: The accepted formats of images, and the endings of their files.
FORMATS: Final = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "AVIF": "avif"}

#: The ``error_code`` and the ``error_message`` in a manifest of an image whose file was pruned.
PRUNED: Final = "pruned"
PRUNED_MESSAGE: Final = "its file was pruned"


@dataclass(frozen=True)
class StoredImage:
    """A verified file. ``path`` is relative to the storage root, with ``/``."""

    path: str
    sha256: str
    bytes: int
    format: str
    width: int
    height: int


@dataclass(frozen=True)
class Record:
    """The current state of one request. Times are UTC; money is in units (1/10,000 credits).

    A request may be submitted more than once, each time under a new Idempotency-Key, but only after
    the earlier submission certainly cost nothing. The fields from ``idempotency_key`` to ``run_id``
    are those of the present submission.

    Attributes:
        submission: Number of the present submission, from 1 (0: never submitted).
        sent_at: When its first POST was about to leave: the start of the hours in which a repeat is
            safe.
        charged_units: None while not known: until settlement, and for an unknown outcome.
        committed_units: The most that it may cost.
        expected_units: Its expected cost when it was admitted.
        image: Also kept if the file is gone: only a ``stored`` request has its file.
        seq: Number of its last event, from 0. With ``submissions``, the count of its submissions,
            it ensures that a change is only written to the record from which it was made.
        bought_for: The partition of the present submission.
        scopes: Its budget scopes, in addition to its run, day, month and partition.
        callback_url: Its callback address. A repeat under its key with another one is a conflict.
        api_key: Fingerprint of its API key, None if that was not kept.
        replayed: The server knew its first POST already, so another journal has bought it.
        table_id: The prompt table that first requested the image.
        bought_for_table: The prompt table of the present submission.
    """

    request: ImageRequest
    state: State
    partition_key: str
    submission: int = 0
    idempotency_key: str | None = None
    sent_at: datetime | None = None
    submitted_at: datetime | None = None
    task_id: str | None = None
    reserved_units: int | None = None
    charged_units: int | None = None
    committed_units: int = 0
    billing_rule: str | None = None
    user_group: str | None = None
    run_id: str | None = None
    result_url: str | None = None
    completed_at: datetime | None = None
    stored_at: datetime | None = None
    image: StoredImage | None = None
    error_code: str | None = None
    error_message: str | None = None
    claimed_by: str | None = None
    seq: int = 0
    submissions: int = 0
    expected_units: int = 0
    bought_for: str | None = None
    scopes: tuple[str, ...] = ()
    callback_url: str | None = field(default=None, repr=False)
    api_key: str | None = None
    replayed: bool = False
    table_id: str = ""
    bought_for_table: str = ""

    @property
    def request_key(self) -> str:
        """The identity of the request."""
        return self.request.request_key


def idempotency_key(request_key: str, submission: int) -> str:
    """Return the Idempotency-Key of a request's n-th submission: the same on every machine.

    71 to 75 characters of ``[A-Za-z0-9._-]``; EvoLink takes 96. A repeat of a submission has the
    same key; a submission after a certain failure has the next one.
    """
    return f"krea-{request_key}-{submission}"
