"""All errors that this package raises; the class says whether money was spent.

.. code-block:: text

    KreaError
    ├── InputError            what the caller gave is wrong; nothing was sent or bought
    │   ├── ConfigError         a setting; correct it and run again
    │   └── PromptTableError    rows of the prompt table; names each row and column
    ├── JournalError          the journal cannot be trusted or written; nothing more is bought
    │   ├── JournalUnavailable  its database does not answer; run again when it does
    │   ├── PurchasesNotWritten tasks were created and could not be recorded; it names them
    │   ├── TakenOver           another run holds this request now, and continues it
    │   ├── TaskTaken           another purchase has this task; nothing changed
    │   └── IllegalTransition   an event that the state does not allow; nothing changed
    ├── ImagesNotAsStored     files are missing or not what was verified (curation/export)
    ├── CorruptShard          a shard that was read back is not what was written (curation/export)
    ├── StorageError          a paid image cannot be written; nothing more is bought until it can
    │   ├── StorageUnavailable  the store does not answer; run again when it does
    │   └── StorageRefused      it does not exist or refuses access; correct the setting
    ├── BuyingClosed          nothing was sent; the row is deferred
    │   ├── CapReached          a cap leaves no room; the text says when it frees
    │   └── RunStopped          the account stopped another shard of this run
    │       └── TryLater          the API is unavailable, or refuses everything: run again later
    ├── ApiError              a *read* did not get a usable answer; reads are free
    │   ├── TaskNotFound        the task is not known (any more)
    │   ├── Unauthorized        401: the key is wrong or expired; replace it
    │   ├── AccessDenied        403
    │   ├── InsufficientCredits 402
    │   ├── RateLimited         429; read again after ``retry_after_s``
    │   ├── NotSupported        the server does not have this endpoint; use another
    │   └── NoUsableAnswer      disconnect, time-out, 5xx, HTML, garbage; read again
    ├── SubmitError           a *purchase* did not get a usable answer
    │   ├── NotCharged          certainly unspent
    │   │   ├── NotSent           no connection was made; send it again when there is one
    │   │   ├── TurnedAway        429: the server was too busy; send it again later
    │   │   ├── GatewayRefused    400 of a gateway, not of EvoLink; send it again later
    │   │   ├── Refused           400, 413, 415: never accepted unchanged; change the row
    │   │   │   └── ContentRefused  moderation at submit; change the prompt
    │   │   └── AccountStopped    nothing can be bought with this key now; stop buying
    │   │       ├── KeyRejected     401
    │   │       ├── OutOfCredits    402
    │   │       └── ModelDenied     403
    │   └── OutcomeUnknown      may be spent; repeat with the same key, or ask a person
    │       ├── NoCapacity        a 400 for lack of capacity; not documented as free
    │       ├── PurchasePending   409 paid_outcome_unknown: wait a minute, the same key
    │       └── IdempotencyConflict 409: the key has another body; ask a person
    └── DownloadError         a paid image is not available yet; certainly spent
        ├── LinkRefused         the link is unsafe: a private address, a file
        ├── LinkExpired         it has expired or is gone; read the task for a fresh one
        ├── NoUsableBody        truncated, endless, HTML, or no answer; fetch again
        └── ImageRejected       a complete file, but not the requested image

An ``except`` clause thus shows what was spent: ``NotCharged`` nothing, ``OutcomeUnknown`` perhaps
the price, ``DownloadError`` the price, and an ``ApiError`` nothing, because reads are free.

Which answers are certainly not charged follows EvoLink's own client: no connection, or 400 (not for
capacity), 401, 402, 403, 413, 415. 429 is added, because by its documented meaning the request was
not processed, and because the repetition has the same Idempotency-Key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from krea_dagster import redact

#: Why no connection was made: the pool had none, or which step failed.
Cause = Literal["connection", "name", "certificate", "proxy", "pool"]


class KreaError(Exception):
    """The base of every error of this package. No URL in its text shows a credential."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(redact.text(arg) if isinstance(arg, str) else arg for arg in args))


# -- input ------------------------------------------------------------------------------------


class InputError(KreaError):
    """The input is wrong. Nothing was sent and nothing was bought."""


class ConfigError(InputError):
    """A setting is wrong: the message names it, its value, and what is allowed."""


@dataclass(frozen=True)
class Problem:
    """A problem in a prompt table.

    ``row`` counts from 1 in the table's order; None means the whole table. ``value`` is shortened
    and safe to print.
    """

    row: int | None
    prompt_id: str | None
    column: str
    value: str
    allowed: str

    def __str__(self) -> str:
        where = "the table" if self.row is None else f"row {self.row}"
        who = "" if self.prompt_id is None else f" (prompt_id {self.prompt_id})"
        what = f" is {self.value}" if self.value else ""
        return f"{where}{who}: {self.column}{what}{';' if what else ':'} {self.allowed}"


class PromptTableError(InputError):
    """The prompt table cannot be used as it is. Nothing was bought.

    ``problems`` are the first ones, in row order; ``count`` is the total number. ``hints`` may help
    to correct them.
    """

    def __init__(
        self,
        source: str,
        problems: Sequence[Problem],
        count: int | None = None,
        hints: Sequence[str] = (),
    ) -> None:
        self.source = redact.location(source)
        self.problems = tuple(problems)
        self.count = len(self.problems) if count is None else count
        self.hints = tuple(hints)
        super().__init__(self.source, self.problems, self.count, self.hints)

    def __str__(self) -> str:
        many = "1 problem" if self.count == 1 else f"{self.count} problems"
        lines = [f"{self.source}: {many}. Nothing was bought. Correct the table and run again."]
        lines += [f"  {problem}" for problem in self.problems]
        if self.count > len(self.problems):
            lines.append(f"  … and {self.count - len(self.problems)} more")
        lines += [f"  hint: {hint}" for hint in self.hints]
        return "\n".join(lines)


# -- the journal ------------------------------------------------------------------------------


class JournalError(KreaError):
    """The journal cannot be read, written or trusted. Nothing more is bought until it can."""


class JournalUnavailable(JournalError):
    """The journal's database does not answer or is locked, perhaps only for a while."""


@dataclass(frozen=True)
class UnwrittenPurchase:
    """A task that the server created, and that the journal does not have.

    ``credits`` is what the server reserved for it, if it said so.
    """

    request_key: str
    idempotency_key: str
    task_id: str
    credits: float | None

    def __str__(self) -> str:
        cost = "unknown credits" if self.credits is None else f"{self.credits:g} credits"
        return f"task {self.task_id} ({cost}) of request {self.request_key}"


class PurchasesNotWritten(JournalError):
    """Tasks were created, and the journal could not be written. The message names them.

    Repair the journal and run again: within 23 hours the next run repeats their POSTs under the
    same Idempotency-Keys, which returns the same tasks and buys nothing. Later, or with the policy
    ``hold``, a person resolves them by their task ids.
    """

    def __init__(self, purchases: Sequence[UnwrittenPurchase], why: str) -> None:
        self.purchases = tuple(purchases)
        self.why = redact.text(why)
        super().__init__(self.purchases, self.why)

    def __str__(self) -> str:
        many = "1 purchase" if len(self.purchases) == 1 else f"{len(self.purchases)} purchases"
        text = (
            f"{many} could not be written to the journal: {self.why}\n"
            "Once it is repaired, run again within 23 hours, which returns the same tasks and buys "
            "nothing. Bought and not written:"
        )
        return "\n".join([text, *(f"  {purchase}" for purchase in self.purchases)])


class TakenOver(JournalError):
    """Another run holds the request now, and continues it. Nothing was changed."""


class TaskTaken(JournalError):
    """A task belongs to another purchase. Nothing was changed."""


class IllegalTransition(JournalError):
    """The request's present state does not allow the event. Nothing was changed."""


# -- the storage root ---------------------------------------------------------------------------


class StorageError(KreaError):
    """The storage root cannot be written. What was paid for is in the journal: run again."""


class StorageUnavailable(StorageError):
    """The storage root does not answer, perhaps only for a while."""


class StorageRefused(StorageError):
    """The storage root does not exist or refuses access: a setting or a permission is wrong."""


# -- buying is not admitted -------------------------------------------------------------------


class BuyingClosed(KreaError):
    """A purchase was not admitted. Nothing was sent; the row waits for a later run."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class CapReached(BuyingClosed):
    """A cap or budget leaves no room. The message says what is spent, reserved, and when it frees.

    ``scope`` is the full scope, such as ``day:2026-11-22``; ``shown`` is its name for people.
    """

    def __init__(self, code: str, message: str, scope: str = "", shown: str = "") -> None:
        super().__init__(code, message)
        self.scope = scope
        self.shown = shown or scope


class RunStopped(BuyingClosed):
    """Another shard of the same run has found that the account cannot buy."""


class TryLater(RunStopped):
    """The cause may be temporary: the same run later buys what this one left."""


# -- answers of EvoLink -----------------------------------------------------------------------


#: Statuses of gateways that cannot reach the server behind them; 52x and 530 are Cloudflare's.
_GATEWAY_STATUSES = frozenset({502, 503, 504, *range(520, 528), 530})


class _Answered(KreaError):
    """An error that describes an answer, or its absence.

    ``status`` is the HTTP status, None without an answer. ``code`` is lower-cased text, perhaps
    empty. ``cause`` says why no connection was made, None if one was, or may have been. No field
    contains the API key.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str = "",
        retry_after_s: float | None = None,
        request_id: str | None = None,
        cause: Cause | None = None,
    ) -> None:
        super().__init__(message)
        self.message = redact.text(message)
        self.status = status
        self.code = code
        self.retry_after_s = retry_after_s
        self.request_id = request_id
        self.cause: Cause | None = cause

    @property
    def may_be_away(self) -> bool:
        """Return whether the API itself may be unavailable: no answer, or one of a gateway."""
        return self.status is None or self.status in _GATEWAY_STATUSES

    def __str__(self) -> str:
        parts = [str(self.status)] if self.status is not None else []
        if self.code:
            parts.append(self.code)
        head = " ".join(parts)
        tail = f" (request id {self.request_id})" if self.request_id else ""
        return f"{head}: {self.message}{tail}" if head else f"{self.message}{tail}"


class ApiError(_Answered):
    """A read got an error or no answer. Reading again costs nothing."""


class TaskNotFound(ApiError):
    """The task is unknown, or no longer known, or belongs to another account."""


class Unauthorized(ApiError):
    """401: the key is wrong or has expired. Replace it; paid images wait at the server."""


class AccessDenied(ApiError):
    """403: the key does not have this permission."""


class InsufficientCredits(ApiError):
    """402: the account's quota is used up, so that the server does not answer reads."""


class RateLimited(ApiError):
    """429: too many reads. Read again after ``retry_after_s``."""


class NotSupported(ApiError):
    """The server does not have this endpoint."""


class NoUsableAnswer(ApiError):
    """A disconnect, a time-out, a 5xx, HTML or garbage. Read again."""


class SubmitError(_Answered):
    """A purchase did not get a usable answer. The subclasses say whether it may be charged."""


class NotCharged(SubmitError):
    """Certainly unspent."""


class NotSent(NotCharged):
    """No connection was made, so nothing was bought. Send it again when there is one."""


class TurnedAway(NotCharged):
    """429: the server was too busy. Send it again after ``retry_after_s``."""


class GatewayRefused(NotCharged):
    """A 400 without EvoLink's error: a page of a gateway. Send it again."""

    may_be_away = True


class Refused(NotCharged):
    """The request will never be accepted unchanged. Change the row."""


class ContentRefused(Refused):
    """Moderation refused the prompt. Change the prompt."""


class AccountStopped(NotCharged):
    """This key cannot buy anything now. Stop buying, finish what is paid."""


class KeyRejected(AccountStopped):
    """401: the key is wrong or has expired."""


class OutOfCredits(AccountStopped):
    """402: the account, or the key's own limit, is used up."""


class ModelDenied(AccountStopped):
    """403: the key may not use this model."""


class OutcomeUnknown(SubmitError):
    """May have been spent. Repeat it with the same Idempotency-Key only, or ask a person."""


class NoCapacity(OutcomeUnknown):
    """A 400 for lack of capacity. EvoLink's client does not treat it as certainly free."""


class PurchasePending(OutcomeUnknown):
    """409 ``paid_outcome_unknown``: the first try is undecided. Wait a minute; use the same key."""


class IdempotencyConflict(OutcomeUnknown):
    """409 ``idempotency_conflict``: the key was used for another body. A person must look."""


# -- the paid image ---------------------------------------------------------------------------


class DownloadError(KreaError):
    """A paid image could not be fetched, or is not what was requested."""

    code = "download_failed"


class LinkRefused(DownloadError):
    """The link is unsafe: a private or file address, or a redirect to one."""

    code = "link_refused"


class LinkExpired(DownloadError):
    """The link has expired or is gone. Read the task again for a fresh one."""

    code = "link_dead"


class NoUsableBody(DownloadError):
    """Truncated, endless, HTML, or no answer at all. Fetch it again."""

    code = "no_usable_body"


class ImageRejected(DownloadError):
    """A complete file, but not the requested image. ``code`` says how it differs."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
