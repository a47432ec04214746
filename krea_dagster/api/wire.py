"""Reads and writes EvoLink's JSON: requests to bytes, and answers to values or errors, by table.

Nothing here does I/O or looks at a clock: an answer is a status, headers and bytes, and the
present time is handed in. Reading is lenient about shape (fields that are missing, integer or
upper-case codes, HTML, bytes that are not UTF-8) and strict about money: an answer to a
purchase is a :class:`~krea_dagster.models.Submission`, or certainly unspent, or unknown.

The codes come from EvoLink's API documentation (create image, get task detail, get credits)
and, where a comment says so, from its own published clients.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from decimal import Decimal
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, Final

from krea_dagster.errors import (
    AccessDenied,
    ApiError,
    ContentRefused,
    GatewayRefused,
    IdempotencyConflict,
    InputError,
    InsufficientCredits,
    KeyRejected,
    ModelDenied,
    NoCapacity,
    NotSupported,
    NoUsableAnswer,
    OutcomeUnknown,
    OutOfCredits,
    PurchasePending,
    RateLimited,
    Refused,
    SubmitError,
    TaskNotFound,
    TurnedAway,
    Unauthorized,
)
from krea_dagster.models import (
    SEED_MAX,
    SEED_MIN,
    AccountCredits,
    ImageRequest,
    Submission,
    Task,
    TaskFailure,
    is_task_id,
    units_from_credits,
)

#: Takes a text from outside and returns it without the API key.
Hide = Callable[[str], str]

CREATE_PATH: Final = "/v1/images/generations"
TASKS_PATH: Final = "/v1/tasks"
#: Undocumented: seen in EvoLink's own clients. At most :data:`BATCH_MAX` ids.
BATCH_PATH: Final = "/v1/tasks/batch"
BATCH_MAX: Final = 50
CREDITS_PATH: Final = "/v1/credits"

CALLBACK_URL_MAX_CHARS: Final = 2048
MESSAGE_MAX_CHARS: Final = 500
RETRY_AFTER_MAX_S: Final = 3600.0
#: The end of the year 9998: a later second is no time of a task.
_LAST_SECOND: Final = 253_370_764_800

# -- the tables -------------------------------------------------------------------------------

#: A create answer whose status alone says what it means. 400 and 409 need their code.
SUBMIT_ERRORS: Final[Mapping[int, type[SubmitError]]] = {
    401: KeyRejected,
    402: OutOfCredits,
    403: ModelDenied,
    413: Refused,
    415: Refused,
    429: TurnedAway,
}

#: 400 on create with one of these codes is a lack of capacity (seen in EvoLink's clients).
CAPACITY_CODES: Final = frozenset({"no_available_channel", "model_unavailable"})
#: … or with a code that begins like this.
CAPACITY_PREFIXES: Final = ("channel_", "channel:")

#: 400 on create with one of these codes is moderation (seen in EvoLink's clients).
MODERATION_CODES: Final = frozenset(
    {
        "content_policy_violation",
        "content_filter",
        "sensitive_content",
        "moderation_blocked",
    }
)

#: 409 on create, by code (seen in EvoLink's clients).
CONFLICT_ERRORS: Final[Mapping[str, type[OutcomeUnknown]]] = {
    "idempotency_conflict": IdempotencyConflict,
    "paid_outcome_unknown": PurchasePending,
}

#: An answer to a question whose status alone says what it means.
READ_ERRORS: Final[Mapping[int, type[ApiError]]] = {
    401: Unauthorized,
    402: InsufficientCredits,
    403: AccessDenied,
    429: RateLimited,
}

#: The one code that says that a task is gone.
TASK_GONE_CODE: Final = "task_not_found"
#: What the message says where a 404 carries a number, or nothing, for a code.
TASK_GONE_MESSAGES: Final = ("task could not be found", "task not found")

#: What the undocumented batch endpoint may answer though it is there. Any other 4xx is taken
#: to mean that it is not: single reads cost a little more, and never miss a paid task.
_BATCH_ERRORS_THAT_PASS: Final = frozenset({401, 402, 408, 425, 429})
#: What the field ``code`` of a batch answer holds where nothing is wrong.
_OK_CODES: Final = frozenset({"200", "0", "success", ""})

#: What a code means beyond EvoLink's message, for the person who must mend it.
HINTS: Final[Mapping[str, str]] = {
    "insufficient_token_quota": "this is the key's own limit, not the account's",
    "key_quota_exhausted": "this is the key's own limit, not the account's",
    "token_daily_quota_exceeded": "this is the key's own daily limit, not the account's",
    "ip_restricted": "the key may not be used from this machine's address",
    "user_disabled": "the account is disabled",
}

#: Other spellings of a status.
STATUS_ALIASES: Final[Mapping[str, str]] = {"canceled": "cancelled"}

_DECIMAL = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,20})?", re.ASCII)
_SECONDS = re.compile(r"[0-9]{1,300}(\.[0-9]{1,20})?", re.ASCII)
_REQUEST_ID_TAIL = re.compile(r"\s*\(request id: ([^()]{1,128})\)\s*\Z", re.IGNORECASE)
_TITLE = re.compile(r"<title[^>]{0,200}>([^<]{0,200})", re.IGNORECASE)
# Terminal escapes whole (CSI, OSC, then any other), so that no remainder such as "[31m" is left.
_ESCAPES = re.compile(
    "\x1b\\[[0-?]*[ -/]*[@-~]|[\x1b]\\][^\x07\x1b]{0,300}(?:\x07|\x1b\\\\)?|\x1b[@-Z\\\\^_]?"
)
# Controls, surrogates, and the marks that turn the reading direction of what follows.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]+"
)
# What a database cannot store in a text: surrogates that stand alone, and NUL.
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")

_MAX_DEPTH: Final = 64
_MAX_CREDITS: Final = 1e12


def _as_is(text: str) -> str:
    return text


# -- what is sent -----------------------------------------------------------------------------


def generation_body(request: ImageRequest, callback_url: str | None = None) -> dict[str, Any]:
    """The JSON object of ``POST /v1/images/generations`` for one request.

    All six fields are always written, so that no default of the server decides a picture.

    Raises:
        InputError: the seed is not from 1 to 1048576 (with 0 the server would draw one and not
            say which), or the callback URL is not HTTPS or too long. Nothing was sent.
    """
    seed = request.seed
    if isinstance(seed, bool) or not SEED_MIN <= seed <= SEED_MAX:
        raise InputError(f"the seed is {seed!r}; it must be from {SEED_MIN} to {SEED_MAX}")
    body: dict[str, Any] = {
        "model": request.model,
        "prompt": request.prompt,
        "size": request.size,
        "quality": request.quality,
        "seed": seed,
        "nsfw_check": request.nsfw_check,
    }
    if callback_url is not None:
        if not callback_url.lower().startswith("https://"):
            raise InputError("the callback URL must begin with https://")
        if len(callback_url) > CALLBACK_URL_MAX_CHARS:
            raise InputError(f"the callback URL is longer than {CALLBACK_URL_MAX_CHARS} characters")
        body["callback_url"] = callback_url
    return body


def batch_body(task_ids: Collection[str]) -> dict[str, Any]:
    """The JSON object that asks for many tasks at once."""
    return {"task_ids": list(task_ids)}


def encode_json(value: object) -> bytes:
    """JSON as bytes that depend on the value only: sorted, compact, ASCII.

    A repeated purchase must send the very same body, or its Idempotency-Key is refused.
    Everything beyond ASCII is escaped, so that a lone surrogate in a prompt cannot fail here.
    """
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return text.encode("ascii")


# -- what is read -----------------------------------------------------------------------------


def read_submission(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    now: datetime,
    hide: Hide = _as_is,
) -> Submission:
    """The answer to a create call.

    A usable answer is 200, 201 or 202 with a task id and without an error.

    Args:
        status: the HTTP status.
        headers: the answer's headers; case does not matter.
        body: the whole body.
        now: the present, with a time zone, for ``Retry-After`` where the answer has no ``Date``.
        hide: removes the API key from a text.

    Raises:
        SubmitError: of the class that the tables above give. What they do not name is
            OutcomeUnknown, and so is a success without an id, or with an error beside it.
    """
    value, readable = _parse(body)
    if status in (200, 201, 202) and isinstance(value, dict) and not _may_hold_error(value):
        task_id = value.get("id")
        if readable and isinstance(task_id, str) and is_task_id(task_id):
            return _submission(task_id, headers, value, hide)
    fault = _read_fault(status, headers, value, body, hide)
    facts: dict[str, Any] = {
        "status": status,
        "code": fault.code,
        "retry_after_s": retry_after_s(headers, now),
        "request_id": fault.request_id,
    }
    if status in (200, 201, 202):
        task_id = value.get("id") if isinstance(value, dict) else None
        if not readable or not isinstance(value, dict):
            message = f"the answer to the purchase is not a JSON object: {fault.message}"
        elif fault.present:
            named = f"task {hide(str(task_id))}: " if is_task_id(task_id) else ""
            message = f"a success that carries an error: {named}{fault.message}"
        elif not isinstance(task_id, str) or not is_task_id(task_id):
            message = "a success without a usable task id"
        else:  # what looked like an error holds none
            return _submission(task_id, headers, value, hide)
        raise OutcomeUnknown(message, **facts)
    raise _submit_error_class(status, fault)(fault.message, **facts)


def _submission(
    task_id: str, headers: Mapping[str, str], value: Mapping[str, Any], hide: Hide
) -> Submission:
    usage = _object(value.get("usage"))
    answer: Mapping[str, Any] = value
    shown = str(value)
    if hide(shown) != shown or "\\" in shown:  # an escape in the text could part the key
        answer = {
            hide(key): item if key == "id" else _map_texts(item, hide, 0)
            for key, item in value.items()
        }
    return Submission(
        task_id=task_id,
        status=_status(value.get("status"), hide) or "pending",
        credits_reserved_units=_units(usage.get("credits_reserved")),
        billing_rule=_optional_text(usage.get("billing_rule"), hide),
        user_group=_optional_text(usage.get("user_group"), hide),
        replayed=_header(headers, "idempotency-replayed").strip().lower() == "true",
        answer=answer,
    )


def _submit_error_class(status: int, fault: _ErrorBody) -> type[SubmitError]:
    by_status = SUBMIT_ERRORS.get(status)
    if by_status is not None:
        return by_status
    # A server that writes a number as the code may write the word as the type. Capacity comes
    # first: where both could be meant, the money is not certainly unspent.
    words = (fault.code, fault.kind)
    if status == 400:
        if any(word in CAPACITY_CODES or word.startswith(CAPACITY_PREFIXES) for word in words):
            return NoCapacity
        if any(word in MODERATION_CODES for word in words):
            return ContentRefused
        # Without EvoLink's error it is a gateway's page, which says nothing of the row.
        return Refused if fault.present else GatewayRefused
    if status == 409:
        for word in words:
            if word in CONFLICT_ERRORS:
                return CONFLICT_ERRORS[word]
    return OutcomeUnknown


def read_task(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    task_id: str,
    now: datetime,
    hide: Hide = _as_is,
) -> Task:
    """The answer to ``GET /v1/tasks/{task_id}``.

    Raises:
        TaskNotFound: a 404 whose JSON says that this task is not known. A 404 that says
            anything else (a proxy's page, a wrong base URL) is NoUsableAnswer, because "gone"
            ends in "paid and lost" and so must be certain. So is a 400 ``invalid_task_id``:
            the id came from EvoLink, and the error's ``code`` tells a policy what was said.
        ApiError: of the class that the table gives; NoUsableAnswer for all that it does not
            name, for a success that cannot be read, and for an answer about another task.
    """
    value, _ = _parse(body)
    task = None
    if status == 200 and isinstance(value, dict):
        task = _task(value, hide, default_id=task_id)
        if task is not None and task.task_id == task_id:
            return task
    fault = _read_fault(status, headers, value, body, hide)
    if status == 200 and isinstance(value, dict):
        if task is not None:
            fault = replace(
                fault, message=f"the answer is about another task, {hide(task.task_id)}"
            )
        elif not fault.present:
            fault = replace(fault, message="the answer has no task status")
    raise _read_error(status, headers, fault, now, about_task=True)


def read_tasks(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    task_ids: Collection[str],
    now: datetime,
    hide: Hide = _as_is,
) -> dict[str, Task]:
    """The answer to ``POST /v1/tasks/batch``: the tasks by id, in the order asked.

    Ids that the server left out, or answered unreadably, are absent. Tasks that were not asked
    for are dropped.

    Raises:
        NotSupported: the endpoint is not there. Because it is undocumented, that is what a 4xx
            is taken for (except 401, 402, 408, 425 and 429), and 501, and a 200 that is not a
            list of tasks.
        ApiError: as for :func:`read_task`.
    """
    value, _ = _parse(body)
    if status == 200:
        items = _batch_items(value)
        if items is not None:
            found: dict[str, Task] = {}
            for item in items:
                task = _task(item, hide) if isinstance(item, dict) else None
                if task is not None:
                    found.setdefault(task.task_id, task)
            return {task_id: found[task_id] for task_id in task_ids if task_id in found}
    fault = _read_fault(status, headers, value, body, hide)
    code = _code(value.get("code", 200), hide) if isinstance(value, dict) else ""
    if status == 200 and code not in _OK_CODES:
        fault = replace(
            fault,
            code=safe_text(code, max_chars=100),
            message=safe_text(value.get("message"), hide),
        )
        raise _read_error(status, headers, fault, now)
    missing = (
        (status == 200 and not fault.present)
        or status == 501
        or (400 <= status < 500 and status not in _BATCH_ERRORS_THAT_PASS)
    )
    raise _read_error(status, headers, fault, now, error=NotSupported if missing else None)


def _batch_items(value: Any) -> list[Any] | None:
    """The list in a batch answer, or None where there is none."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict) or "data" not in value:
        return None
    data = value["data"]
    if data is None and _code(value.get("code", 200)) in _OK_CODES:
        return []
    return data if isinstance(data, list) else None


def read_credits(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    now: datetime,
    hide: Hide = _as_is,
) -> AccountCredits:
    """The answer to ``GET /v1/credits``; ``now`` becomes its ``read_at``.

    Raises:
        NotSupported: 404, 405 or 501: the server has no such endpoint.
        ApiError: of the class that the table gives; NoUsableAnswer for anything else, among
            them ``success: false`` with 200, and an answer without the account's two figures.
    """
    value, _ = _parse(body)
    fault = _read_fault(status, headers, value, body, hide)
    if status == 200 and isinstance(value, dict) and value.get("success") is not False:
        data = _object(value.get("data")) or value
        user, token = _object(data.get("user")), _object(data.get("token"))
        remaining = _units(user.get("remaining_credits"), negative=True)
        used = _units(user.get("used_credits"), negative=True)
        if remaining is not None and used is not None:
            return AccountCredits(
                user_remaining_units=remaining,
                user_used_units=used,
                token_remaining_units=_units(token.get("remaining_credits"), negative=True),
                token_used_units=_units(token.get("used_credits"), negative=True),
                token_unlimited=token.get("unlimited_credits") is True,
                read_at=now,
            )
        if not fault.present:
            fault = replace(fault, message="the answer does not hold the account's credits")
    missing = status in (404, 405, 501)
    raise _read_error(status, headers, fault, now, error=NotSupported if missing else None)


def _read_error(
    status: int,
    headers: Mapping[str, str],
    fault: _ErrorBody,
    now: datetime,
    *,
    about_task: bool = False,
    error: type[ApiError] | None = None,
) -> ApiError:
    if error is None:
        error = READ_ERRORS.get(status, NoUsableAnswer)
        if about_task and status == 404 and _says_task_gone(fault):
            error = TaskNotFound
    return error(
        fault.message,
        status=status,
        code=fault.code,
        retry_after_s=retry_after_s(headers, now),
        request_id=fault.request_id,
    )


def _says_task_gone(fault: _ErrorBody) -> bool:
    if TASK_GONE_CODE in (fault.code, fault.kind):
        return True
    unnamed = not fault.code or fault.code.isdecimal()
    return unnamed and any(text in fault.message.lower() for text in TASK_GONE_MESSAGES)


def retry_after_s(headers: Mapping[str, str], now: datetime) -> float | None:
    """``Retry-After`` in seconds, from 0 to 3600; None where absent or unreadable.

    Both forms of RFC 9110 are read: seconds, and an HTTP date. That is counted from the answer's
    own ``Date``, since this machine's clock may be wrong, and from ``now`` where there is none.
    """
    text = _header(headers, "retry-after").strip()
    if _SECONDS.fullmatch(text):
        return min(float(text), RETRY_AFTER_MAX_S)
    date = http_date(text)
    if date is None:
        return None
    answered_at = http_date(_header(headers, "date").strip()) or now
    return min(max((date - answered_at).total_seconds(), 0.0), RETRY_AFTER_MAX_S)


def http_date(text: str) -> datetime | None:
    """A time as HTTP writes it; None where the text is none."""
    if not text or len(text) > 100:
        return None
    try:
        date = parsedate_to_datetime(text)
        if date.tzinfo is None:
            date = date.replace(tzinfo=timezone.utc)
        return date.astimezone(timezone.utc)
    except (TypeError, ValueError, OverflowError, IndexError):
        return None


# -- the parts of an answer -------------------------------------------------------------------


@dataclass(frozen=True)
class _ErrorBody:
    """What an answer says went wrong, already safe to print.

    ``present`` is true where the body holds an error; ``kind`` is its lower-cased ``type``.
    """

    present: bool
    code: str
    kind: str
    message: str
    request_id: str | None


def _may_hold_error(value: Mapping[str, Any]) -> bool:
    """Whether an answer is worth reading for an error."""
    return bool(value.get("error")) or value.get("success") is False


def _read_fault(
    status: int, headers: Mapping[str, str], value: Any, body: bytes, hide: Hide
) -> _ErrorBody:
    whole = value if isinstance(value, dict) else {}
    error = whole.get("error")
    if isinstance(error, dict):
        present = any(error.get(key) for key in ("code", "message", "type"))
        source: Mapping[str, Any] = error
    elif error:
        present = True
        source = {"message": error, "code": whole.get("code"), "type": whole.get("type")}
    else:
        present = whole.get("success") is False
        source = whole if status >= 300 or present else {}
    message = safe_text(source.get("message"), hide, 10_000)
    tail = _REQUEST_ID_TAIL.search(message)
    message = _shortened(message[: tail.start()] if tail else message, MESSAGE_MAX_CHARS)
    request_id = (
        _header(headers, "x-request-id")
        or _header(headers, "x-oneapi-request-id")
        or source.get("request_id")
        or whole.get("request_id")
        or (tail.group(1) if tail else "")
    )
    code = safe_text(_code(source.get("code"), hide), max_chars=100)
    message = message or _message_without_json(status, value, body, hide)
    hint = HINTS.get(code)
    return _ErrorBody(
        present=present,
        code=code,
        kind=safe_text(_code(source.get("type"), hide), max_chars=100),
        message=f"{message} ({hint})" if hint else message,
        request_id=safe_text(request_id, hide, 128) or None,
    )


def _message_without_json(status: int, value: Any, body: bytes, hide: Hide) -> str:
    """A sentence for an answer that brought none."""
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = "unusual status"
    if value is not None:
        return phrase
    if not body.strip():
        return f"{phrase} (the body is empty)"
    start = body[:4096].decode("utf-8", "replace")
    if not start.lstrip("\ufeff \t\r\n").startswith("<"):
        return f"{phrase} (the body is not JSON)"
    title = _TITLE.search(start)
    named = safe_text(title.group(1), hide, 120) if title else ""
    return f"{phrase} (a page, not JSON{': ' + named if named else ''})"


def _task(value: Mapping[str, Any], hide: Hide, default_id: str | None = None) -> Task | None:
    """A task from its JSON object; None where it has no usable id or no status."""
    task_id = value.get("id")
    if task_id is None:
        task_id = default_id
    status = _status(value.get("status"), hide)
    if not isinstance(task_id, str) or not is_task_id(task_id) or not status:
        return None
    usage = _object(value.get("usage"))
    used = usage.get("credits_used")
    if used is None:
        used = _object(usage.get("cost")).get("credits")
    return Task(
        task_id=task_id,
        status=status,
        progress=_progress(value.get("progress"), status),
        results=_results(value.get("results")),
        failure=_failure(value.get("error"), status, hide),
        credits_used_units=_units(used),
        created_at=_time(value.get("created")),
    )


def _time(value: Any) -> datetime | None:
    """A time in seconds since 1970; None where it is none."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _LAST_SECOND:
        return None
    return datetime.fromtimestamp(value, timezone.utc)


def _failure(error: Any, status: str, hide: Hide) -> TaskFailure | None:
    if isinstance(error, dict):
        code, message = _code(error.get("code"), hide), error.get("message")
    else:
        code, message = "", error
    failure = TaskFailure(
        code=safe_text(code, max_chars=100) or "unknown_error", message=safe_text(message, hide)
    )
    if status == "failed" or failure != TaskFailure("unknown_error", ""):
        return failure
    return None


def _results(value: Any) -> tuple[str, ...]:
    """The links: texts, or objects with a ``url``; what is neither is left out."""
    items = value if isinstance(value, list) else [value]
    links = [item.get("url") if isinstance(item, dict) else item for item in items]
    return tuple(link.strip() for link in links if isinstance(link, str) and link.strip())


def _progress(value: Any, status: str) -> int:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return int(min(max(value, 0), 100))
    return 100 if status == "completed" else 0


def _status(value: Any, hide: Hide) -> str:
    status = safe_text(value, hide, 64).lower() if isinstance(value, str) else ""
    return STATUS_ALIASES.get(status, status)


def _code(value: Any, hide: Hide = _as_is) -> str:
    """A code as lower-case text: servers write them as words, as numbers, and in capitals."""
    if isinstance(value, str):
        return hide(value).strip().lower()
    if isinstance(value, int) and not isinstance(value, bool):
        return hide(str(value))
    return ""


def _units(value: Any, *, negative: bool = False) -> int | None:
    """Credits, as a number or as its text, in units; None where it is not a sane amount."""
    if isinstance(value, str):
        if not _DECIMAL.fullmatch(value.strip()):
            return None
        value = Decimal(value.strip())
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if not math.isfinite(value) or abs(value) > _MAX_CREDITS or (value < 0 and not negative):
        return None
    return units_from_credits(value)


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _optional_text(value: Any, hide: Hide) -> str | None:
    return safe_text(value, hide, 200) or None if isinstance(value, str) else None


def _header(headers: Mapping[str, str], name: str) -> str:
    """One header, by its lower-case name; "" where it is absent."""
    found = headers.get(name)
    if found is not None:
        return found
    return next((value for key, value in headers.items() if key.lower() == name), "")


def safe_text(value: Any, hide: Hide = _as_is, max_chars: int = MESSAGE_MAX_CHARS) -> str:
    """A text from outside, made safe to print and to store; "" where it is no text or number.

    Terminal escapes, controls and direction marks go, white space becomes single spaces, the
    key is hidden (first as well: what goes could part it), and only then is it shortened, so that
    no half of a key is left at the end.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return ""
    text = hide(str(value)[:100_000])
    if not (text.isascii() and text.isprintable()):
        text = _UNPRINTABLE.sub(" ", _ESCAPES.sub("", text))
    return _shortened(hide(" ".join(text.split())), max_chars)


def _shortened(text: str, max_chars: int) -> str:
    return text if len(text) <= max_chars else text[: max_chars - 1] + "…"


# -- JSON from outside ------------------------------------------------------------------------


def _parse(body: bytes) -> tuple[Any, bool]:
    """The JSON value of a body and true; or None and false where it is not usable JSON.

    Texts in it can be stored, numbers are finite, and it is at most 64 levels deep.
    """
    text = body.decode("utf-8-sig", "replace")
    try:
        value = _JSON.decode(text)
        if _is_plain(body):
            return value, True
        return _map_texts(value, _storable, 0), True
    except (ValueError, RecursionError):
        return None, False


def _is_plain(body: bytes) -> bool:
    """Whether JSON can hold no text that cannot be stored, and cannot be nested too deeply.

    Without escapes by number there are neither lone surrogates nor NULs in it.
    """
    return b"\\u" not in body and body.count(b"[") + body.count(b"{") <= _MAX_DEPTH


def _parse_int(digits: str) -> int | None:
    # Nothing that EvoLink counts has 40 digits, and reading a million of them takes seconds.
    return int(digits) if len(digits) <= 40 else None


def _parse_float(digits: str) -> float | None:
    number = float(digits) if len(digits) <= 400 else math.inf
    return number if math.isfinite(number) else None


def _parse_constant(_name: str) -> None:
    """NaN and Infinity are not JSON; a database would not take them back."""


_JSON: Final = json.JSONDecoder(
    parse_int=_parse_int, parse_float=_parse_float, parse_constant=_parse_constant
)


def _storable(text: str) -> str:
    return _UNSTORABLE.sub("\ufffd", text)


def _map_texts(value: Any, change: Callable[[str], str], depth: int) -> Any:
    """The same JSON value with every text changed. ValueError where it is too deep."""
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_map_texts(item, change, depth + 1) for item in value]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value if change(str(value)) == str(value) else change(str(value))
    if isinstance(value, dict):
        return {change(key): _map_texts(item, change, depth + 1) for key, item in value.items()}
    return value
