"""What the journal knows of one request: a frozen row that policy, runner and views read."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from krea_dagster.engine.states import State
from krea_dagster.models import ImageRequest


@dataclass(frozen=True)
class StoredImage:
    """A verified file under the storage root. ``path`` is relative to it, with ``/``."""

    path: str
    sha256: str
    bytes: int
    format: str
    width: int
    height: int


@dataclass(frozen=True)
class Record:
    """One request as it stands. Times are UTC; money is in units (1/10,000 credits).

    A request may be submitted more than once, each time under an Idempotency-Key of its own,
    but only after the earlier submission certainly cost nothing. ``submission`` numbers the
    present one from 1 (0: never submitted), and the fields from ``idempotency_key`` to
    ``run_id`` are that submission's. ``sent_at`` is when its first POST was about to leave:
    the start of the hours in which a repeat is safe.

    ``charged_units`` is None while it is not known: between submission and settlement, and
    for an unknown outcome. ``committed_units`` is what it may cost at most, as far as is known,
    ``expected_units`` what the submission was expected to cost when it was admitted.

    ``bought_for`` is the partition that the present submission was bought for, and ``scopes`` what
    it counts for beside its run, day, month and partition. ``callback_url`` is the address that it
    was sent with: a repeat under its key is sent with the same, or is a conflict. ``table_id`` is
    the prompt table that asked for the request first, ``bought_for_table`` the one that its present
    submission was bought for. ``api_key`` is the fingerprint of the key that it was sent with, None
    where that was not kept. ``replayed``: the server knew its first POST already, so that another
    journal has bought it.

    ``image`` is kept where the file is gone: only a ``stored`` request has its file.

    ``seq`` numbers the request's events from 0, and ``submissions`` counts its submissions: by
    them a change is written only onto the very record that it was made from.
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
        """The request's identity."""
        return self.request.request_key


def idempotency_key(request_key: str, submission: int) -> str:
    """The Idempotency-Key of a request's n-th submission: the same on every machine.

    71 to 75 of ``[A-Za-z0-9._-]``, within the 96 that EvoLink takes. A repeat of the same
    submission has the same key; a submission after a certain failure has the next.
    """
    return f"krea-{request_key}-{submission}"
