"""Every error this package raises, as one tree; the class says whether money was spent.

.. code-block:: text

    KreaError
    ├── InputError            what the caller gave is wrong; nothing was sent or bought
    │   ├── ConfigError         a setting; mend it and run again
    │   └── PromptTableError    rows of the prompt table; names each row and column
    ├── JournalError          the journal cannot be trusted or written; nothing more is bought
    │   ├── JournalUnavailable         its database does not answer; run again when it does
    │   ├── PurchasesNotWritten tasks were created and could not be written; it names them
    │   ├── TakenOver           another run holds this request now, and carries it on
    │   ├── TaskTaken           another purchase has this task; nothing changed
    │   └── IllegalTransition   an event that the state does not allow; nothing changed
    ├── ImagesNotAsStored     files are missing or not what was verified (curation/export)
    ├── Damaged               a shard that was read back is not what was written (curation/export)
    ├── StorageError          a paid image cannot be written; nothing more is bought until it can
    │   └── StorageUnavailable         the store does not answer; run again when it does
    ├── BuyingClosed          nothing was sent; the row is deferred
    │   ├── CapReached          a cap leaves no room; the text says when it frees
    │   └── RunStopped          the account stopped another shard of this run
    │       └── TryLater          the API is away, or turns everything away: run again later
    ├── ApiError              EvoLink did not answer a *question* as hoped; asking is free
    │   ├── TaskNotFound        the task is not known (any more)
    │   ├── Unauthorized        401: the key is wrong or expired; mend the key
    │   ├── AccessDenied        403
    │   ├── InsufficientCredits 402
    │   ├── RateLimited         429; ask again after ``retry_after_s``
    │   ├── NotSupported        the server does not have this endpoint; use another
    │   └── NoUsableAnswer      disconnect, time-out, 5xx, HTML, nonsense; ask again
    ├── SubmitError           a *purchase* did not get a usable answer
    │   ├── NotCharged          certainly unspent
    │   │   ├── NotSent           no connection was made; send it again when there is one
    │   │   ├── TurnedAway        429: the server was too busy; send it again later
    │   │   ├── GatewayRefused    400 of a gateway, not of EvoLink; send it again later
    │   │   ├── Refused           400, 413, 415: never taken as it is; change the row
    │   │   │   └── ContentRefused  moderation at submit; change the prompt
    │   │   └── AccountStopped    nothing can be bought with this key now; stop buying
    │   │       ├── KeyRejected     401
    │   │       ├── OutOfCredits    402
    │   │       └── ModelDenied     403
    │   └── OutcomeUnknown      may be spent; repeat with the same key, or ask a person
    │       ├── NoCapacity        a 400 for lack of capacity; not said to be free
    │       ├── PurchasePending   409 paid_outcome_unknown: wait a minute, the same key
    │       └── IdempotencyConflict 409: the key has another body; ask a person
    └── DownloadError         a paid image is not at hand yet; certainly spent
        ├── LinkRefused         the link is unsafe: a private address, a file
        ├── LinkDead            it has expired or is gone; read the task for a fresh one
        ├── NoUsableBody        truncated, endless, HTML, or no answer; fetch again
        └── ImageRejected       a whole file, but not the picture that was asked for

So a reader of an ``except`` clause knows the money: ``NotCharged`` is certainly unspent,
``OutcomeUnknown`` may be spent, ``DownloadError`` is certainly spent, and an ``ApiError``
is the answer to a question, which costs nothing.

Which answers count as certainly not charged follows EvoLink's own client: no connection, or
400 (not capacity), 401, 402, 403, 413, 415. 429 is added, because the documented meaning of
that answer is that the request was not processed, and because the repeat carries the same
Idempotency-Key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from krea_dagster import redact

#: Why no connection was made: none was free, or which step on the way to one failed.
Cause = Literal["connection", "name", "certificate", "proxy", "pool"]


class KreaError(Exception):
    """The base of every error of this package. No URL in its text shows a credential."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(redact.text(arg) if isinstance(arg, str) else arg for arg in args))


# -- what the caller gave ---------------------------------------------------------------------


class InputError(KreaError):
    """What the caller gave is wrong. Nothing was sent and nothing was bought."""


class ConfigError(InputError):
    """A setting is wrong: the message names it, its value, and what is allowed."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a prompt table.

    ``row`` counts from 1 in the table's order, or is None where the table as a whole is meant.
    ``value`` is already shortened and safe to print.
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
        return f"{where}{who}: {self.column}{what}; {self.allowed}"


class PromptTableError(InputError):
    """The prompt table cannot be used as it is. Nothing was bought.

    ``problems`` holds the first of them, at most 20 by default, in row order; ``count`` how
    many there are in all.
    """

    def __init__(self, source: str, problems: Sequence[Problem], count: int | None = None) -> None:
        self.source = redact.location(source)
        self.problems = tuple(problems)
        self.count = len(self.problems) if count is None else count
        super().__init__(self.source, self.problems, self.count)

    def __str__(self) -> str:
        many = "1 problem" if self.count == 1 else f"{self.count} problems"
        lines = [f"{self.source}: {many}. Nothing was bought. Mend the table and run again."]
        lines += [f"  {problem}" for problem in self.problems]
        if self.count > len(self.problems):
            lines.append(f"  … and {self.count - len(self.problems)} more")
        return "\n".join(lines)


# -- the journal ------------------------------------------------------------------------------


class JournalError(KreaError):
    """The journal cannot be read, written or trusted. Nothing more is bought until it can."""


class JournalUnavailable(JournalError):
    """The journal's database does not answer, or is locked: that may pass by itself."""


@dataclass(frozen=True)
class UnwrittenPurchase:
    """A task that the server created, and that is not in the journal.

    ``credits`` is what the server reserved for it, None where it did not say.
    """

    request_key: str
    idempotency_key: str
    task_id: str
    credits: float | None

    def __str__(self) -> str:
        cost = "credits not known" if self.credits is None else f"{self.credits:g} credits"
        return f"task {self.task_id} ({cost}) of request {self.request_key}"


class PurchasesNotWritten(JournalError):
    """Tasks were created, and the journal could not be written. The message names them all.

    Mend the journal and run again: within 23 hours the next run repeats their POSTs under the
    same Idempotency-Keys, which brings the same tasks and buys nothing. Later, or with the
    policy ``hold``, a person resolves them by the task ids.
    """

    def __init__(self, purchases: Sequence[UnwrittenPurchase], why: str) -> None:
        self.purchases = tuple(purchases)
        self.why = redact.text(why)
        super().__init__(self.purchases, self.why)

    def __str__(self) -> str:
        many = "1 purchase" if len(self.purchases) == 1 else f"{len(self.purchases)} purchases"
        text = (
            f"{many} could not be written to the journal: {self.why}\n"
            "Once it is mended, run again within 23 hours, which brings the same tasks and buys "
            "nothing. Bought and not written:"
        )
        return "\n".join([text, *(f"  {purchase}" for purchase in self.purchases)])


class TakenOver(JournalError):
    """Another run holds the request now. Nothing was changed; that run carries it on."""


class TaskTaken(JournalError):
    """A task is that of another purchase, so it cannot be this one's too. Nothing was changed."""


class IllegalTransition(JournalError):
    """An event that the request's present state does not allow. Nothing was changed."""


# -- the storage root ---------------------------------------------------------------------------


class StorageError(KreaError):
    """The storage root cannot be written. What was paid for is in the journal: run again."""


class StorageUnavailable(StorageError):
    """The storage root does not answer: that may pass by itself."""


# -- what keeps a run from buying -------------------------------------------------------------


class BuyingClosed(KreaError):
    """A purchase was not admitted. Nothing was sent; the row waits for a later run."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class CapReached(BuyingClosed):
    """A cap or budget leaves no room. The message names it, spent, reserved, and when it frees.

    ``scope`` is what is full, such as ``day:2026-11-22``; ``shown`` is what people call it.
    """

    def __init__(self, code: str, message: str, scope: str = "", shown: str = "") -> None:
        super().__init__(code, message)
        self.scope = scope
        self.shown = shown or scope


class RunStopped(BuyingClosed):
    """The account stopped the buying, as another shard of the same run has found."""


class TryLater(RunStopped):
    """What stopped the run may pass by itself: the same run later buys what this one left."""


# -- what EvoLink answered --------------------------------------------------------------------


#: By which gateways say that they cannot reach what is behind them; 52x and 530 are Cloudflare's.
_GATEWAY_STATUSES = frozenset({502, 503, 504, *range(520, 528), 530})


class _Answered(KreaError):
    """What an answer said, for the errors that stand for one.

    ``status`` is the HTTP status, None where there was no answer. ``code`` is lower-cased
    text, "" where there was none. ``cause`` says why no connection was made, None where one was,
    or may have been. Neither the message nor any other field ever holds the key.
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
        """Whether it may be the API itself that is away, and not this request that fails.

        There was no answer, or one of a gateway in front of it.
        """
        return self.status is None or self.status in _GATEWAY_STATUSES

    def __str__(self) -> str:
        parts = [str(self.status)] if self.status is not None else []
        if self.code:
            parts.append(self.code)
        head = " ".join(parts)
        tail = f" (request id {self.request_id})" if self.request_id else ""
        return f"{head}: {self.message}{tail}" if head else f"{self.message}{tail}"


class ApiError(_Answered):
    """EvoLink answered a question with an error, or not at all. Asking again costs nothing."""


class TaskNotFound(ApiError):
    """The task is not known, or not any more, or belongs to another account."""


class Unauthorized(ApiError):
    """401: the key is wrong or has expired. Mend the key; what is paid waits at the server."""


class AccessDenied(ApiError):
    """403: the key may not ask this."""


class InsufficientCredits(ApiError):
    """402: the account's quota is used up, so that the server answers nothing."""


class RateLimited(ApiError):
    """429: asked too often. Ask again after ``retry_after_s``."""


class NotSupported(ApiError):
    """The server does not have this endpoint."""


class NoUsableAnswer(ApiError):
    """A disconnect, a time-out, a 5xx, HTML or nonsense. Ask again."""


class SubmitError(_Answered):
    """A purchase did not get a usable answer. Its two halves say what that means for the money."""


class NotCharged(SubmitError):
    """Certainly unspent."""


class NotSent(NotCharged):
    """No connection was made, so nothing was bought. Send it again when there is one."""


class TurnedAway(NotCharged):
    """429: the server was too busy to take it. Send it again after ``retry_after_s``."""


class GatewayRefused(NotCharged):
    """A 400 without EvoLink's error: a gateway's page, not a word on the row. Send it again."""

    may_be_away = True


class Refused(NotCharged):
    """The request will never be taken as it is. Change the row."""


class ContentRefused(Refused):
    """Moderation refused the prompt. Change the prompt."""


class AccountStopped(NotCharged):
    """Nothing can be bought with this key now. Stop buying, finish what is paid."""


class KeyRejected(AccountStopped):
    """401: the key is wrong or has expired."""


class OutOfCredits(AccountStopped):
    """402: the account, or the key's own limit, is used up."""


class ModelDenied(AccountStopped):
    """403: the key may not use this model."""


class OutcomeUnknown(SubmitError):
    """May have been spent. Repeat it with the same Idempotency-Key only, or ask a person."""


class NoCapacity(OutcomeUnknown):
    """A 400 that is a lack of capacity. EvoLink's client does not count it as certainly free."""


class PurchasePending(OutcomeUnknown):
    """409 ``paid_outcome_unknown``: the first try is undecided. Wait a minute, same key."""


class IdempotencyConflict(OutcomeUnknown):
    """409 ``idempotency_conflict``: the key was used for another body. A person must look."""


# -- the paid image ---------------------------------------------------------------------------


class DownloadError(KreaError):
    """A paid image could not be fetched, or is not what was asked for."""

    code = "download_failed"


class LinkRefused(DownloadError):
    """The link is unsafe: a private or file address, or a redirect to one."""

    code = "link_refused"


class LinkDead(DownloadError):
    """The link has expired or is gone. Read the task again for a fresh one."""

    code = "link_dead"


class NoUsableBody(DownloadError):
    """Truncated, endless, HTML, or no answer at all. Fetch it again."""

    code = "no_usable_body"


class ImageRejected(DownloadError):
    """A whole file, but not the picture that was asked for. ``code`` says in which way."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
