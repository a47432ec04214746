"""EvoLink's JSON: request bodies, and the meaning of each answer, by table. Pure.

Parsing is lenient about shape (missing fields, integer or upper-case codes, HTML, bytes that are
not UTF-8) and strict about money: the answer to a purchase is a
:class:`~krea_dagster.models.Submission`, or certainly not charged, or unknown.

The codes come from EvoLink's API documentation (create image, get task detail, get credits) and,
where a comment says so, from EvoLink's own published clients.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from decimal import Decimal
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, Final

from krea_dagster.api.untrusted import (
    MESSAGE_MAX_CHARS,
    Hide,
    map_texts,
    parse_json,
    safe_text,
    shortened,
    unchanged,
)
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

CREATE_PATH: Final = "/v1/images/generations"
TASKS_PATH: Final = "/v1/tasks"
#: Undocumented: seen in EvoLink's own clients. At most :data:`BATCH_MAX` ids.
BATCH_PATH: Final = "/v1/tasks/batch"
BATCH_MAX: Final = 50
CREDITS_PATH: Final = "/v1/credits"

CALLBACK_URL_MAX_CHARS: Final = 2048
RETRY_AFTER_MAX_S: Final = 3600.0
#: The start of the year 9999: a later time is not that of a task.
_LAST_SECOND: Final = 253_370_764_800

_CREATED: Final = (200, 201, 202)

# -- the tables -------------------------------------------------------------------------------

#: Errors of a create call by status. 400 and 409 are decided by their code.
SUBMIT_ERRORS: Final[Mapping[int, type[SubmitError]]] = {
    401: KeyRejected,
    402: OutOfCredits,
    403: ModelDenied,
    413: Refused,
    415: Refused,
    429: TurnedAway,
}

#: Codes of a 400 on create that is a lack of capacity (seen in EvoLink's clients).
CAPACITY_CODES: Final = frozenset({"no_available_channel", "model_unavailable"})
#: … and the beginnings of such codes.
CAPACITY_PREFIXES: Final = ("channel_", "channel:")

#: Codes of a 400 on create that is moderation (seen in EvoLink's clients).
MODERATION_CODES: Final = frozenset(
    {"content_policy_violation", "content_filter", "sensitive_content", "moderation_blocked"}
)

#: Errors of a 409 on create by code (seen in EvoLink's clients).
CONFLICT_ERRORS: Final[Mapping[str, type[OutcomeUnknown]]] = {
    "idempotency_conflict": IdempotencyConflict,
    "paid_outcome_unknown": PurchasePending,
}

#: Errors of a read by status.
READ_ERRORS: Final[Mapping[int, type[ApiError]]] = {
    401: Unauthorized,
    402: InsufficientCredits,
    403: AccessDenied,
    429: RateLimited,
}

#: The code that means that a task is gone.
TASK_GONE_CODE: Final = "task_not_found"
#: Messages of a 404 that means the same, if its code is missing or a number.
TASK_GONE_MESSAGES: Final = ("task could not be found", "task not found")

#: Errors of the undocumented batch endpoint if it exists. Any other 4xx is taken to mean that it
#: does not: single reads take a little longer, and miss no paid task.
_BATCH_ERRORS: Final = frozenset({401, 402, 408, 425, 429})
#: The field ``code`` of a successful batch answer.
_OK_CODES: Final = frozenset({"200", "0", "success", ""})

#: Explanations of codes, added to EvoLink's message.
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

_MAX_CREDITS: Final = 1e12


@dataclass(frozen=True)
class RawAnswer:
    """An HTTP answer. ``whole`` is false if the body broke off or was too long, see ``trouble``.

    The server may have echoed the key, so the repr leaves out headers and body.
    """

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)
    whole: bool = True
    trouble: str = ""


# -- requests ---------------------------------------------------------------------------------


def generation_body(request: ImageRequest, callback_url: str | None = None) -> dict[str, Any]:
    """Return the JSON object of ``POST /v1/images/generations``.

    All six fields are always written, so that no default of the server decides about an image.

    Raises:
        InputError: the seed is not from 1 to 1048576 (with 0 the server would draw one and not
            return it), or the callback URL is not HTTPS or too long. Nothing was sent.
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


def encode_json(value: object) -> bytes:
    """Return JSON bytes that depend on the value only: sorted, compact, ASCII.

    A repeated purchase must send the same bytes, or its Idempotency-Key is refused. Characters
    beyond ASCII are escaped, so that a lone surrogate in a prompt cannot fail here.
    """
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return text.encode("ascii")


# -- answers ----------------------------------------------------------------------------------


def read_submission(answer: RawAnswer, *, now: datetime, hide: Hide = unchanged) -> Submission:
    """Return the submission of a create call.

    A usable answer is 200, 201 or 202 with a task id and without an error.

    Args:
        answer: with a whole body. The case of header names does not matter.
        now: the present, with a time zone, for ``Retry-After`` if the answer has no ``Date``.
        hide: removes the API key from a text.

    Raises:
        SubmitError: of the class in the tables above. What they do not name is OutcomeUnknown,
            and so is a success without an id, or with an error.
    """
    value = parse_json(answer.body)
    found = _read_error_body(answer, value, hide)
    facts: dict[str, Any] = {
        "status": answer.status,
        "code": found.code,
        "retry_after_s": retry_after_s(answer.headers, now),
        "request_id": found.request_id,
    }
    if answer.status not in _CREATED:
        raise _submit_error_class(answer.status, found)(found.message, **facts)
    if not isinstance(value, dict):
        message = f"the answer to the purchase is not a JSON object: {found.message}"
        raise OutcomeUnknown(message, **facts)
    task_id = value.get("id")
    if not isinstance(task_id, str) or not is_task_id(task_id):
        task_id = ""
    if found.present:
        named = f"task {hide(task_id)}: " if task_id else ""
        raise OutcomeUnknown(
            f"EvoLink answered with an error and status success: {named}{found.message}",
            **facts,
        )
    if not task_id:
        raise OutcomeUnknown("EvoLink accepted the request but returned no usable task id", **facts)
    return _submission(task_id, answer.headers, value, hide)


def _submission(
    task_id: str, headers: Mapping[str, str], value: Mapping[str, Any], hide: Hide
) -> Submission:
    usage = _object(value.get("usage"))
    stored: Mapping[str, Any] = value
    shown = str(value)
    if hide(shown) != shown or "\\" in shown:  # an escape in the text could split the key
        stored = {
            hide(key): item if key == "id" else map_texts(item, hide) for key, item in value.items()
        }
    return Submission(
        task_id=task_id,
        status=_status(value.get("status"), hide) or "pending",
        credits_reserved_units=_units(usage.get("credits_reserved")),
        billing_rule=_optional_text(usage.get("billing_rule"), hide),
        user_group=_optional_text(usage.get("user_group"), hide),
        replayed=_header(headers, "idempotency-replayed").strip().lower() == "true",
        answer=stored,
    )


def _submit_error_class(status: int, found: _ErrorBody) -> type[SubmitError]:
    by_status = SUBMIT_ERRORS.get(status)
    if by_status is not None:
        return by_status
    # A server that writes a number as the code may write the word as the type. Capacity comes
    # first: if both could be meant, the money is not certainly unspent.
    words = (found.code, found.kind)
    if status == 400:
        if any(word in CAPACITY_CODES or word.startswith(CAPACITY_PREFIXES) for word in words):
            return NoCapacity
        if any(word in MODERATION_CODES for word in words):
            return ContentRefused
        # Without EvoLink's error it is a gateway's page, which does not concern the row.
        return Refused if found.present else GatewayRefused
    if status == 409:
        for word in words:
            if word in CONFLICT_ERRORS:
                return CONFLICT_ERRORS[word]
    return OutcomeUnknown


def read_task(answer: RawAnswer, *, task_id: str, now: datetime, hide: Hide = unchanged) -> Task:
    """Return the task of ``GET /v1/tasks/{task_id}``.

    Raises:
        TaskNotFound: a 404 whose JSON says that this task is not known. Any other 404 (a proxy's
            page, a wrong base URL) is NoUsableAnswer, because a task that is gone counts as paid
            and lost. So is a 400 ``invalid_task_id``: the id came from EvoLink. The error's
            ``code`` keeps EvoLink's.
        ApiError: of the class in the table; NoUsableAnswer for all other statuses, for a success
            that cannot be read, and for an answer with another task.
    """
    value = parse_json(answer.body)
    success = answer.status == 200 and isinstance(value, dict)
    task = _task(value, hide, default_id=task_id) if success else None
    if task is not None and task.task_id == task_id:
        return task
    found = _read_error_body(answer, value, hide)
    if task is not None:
        found = replace(found, message=f"the answer is about another task, {hide(task.task_id)}")
    elif success and not found.present:
        found = replace(found, message="the answer has no task status")
    gone = answer.status == 404 and _says_task_gone(found)
    raise _read_error(answer, found, now, TaskNotFound if gone else None)


def read_tasks(
    answer: RawAnswer, *, task_ids: Collection[str], now: datetime, hide: Hide = unchanged
) -> dict[str, Task]:
    """Return the tasks of ``POST /v1/tasks/batch`` by id, in the order of ``task_ids``.

    Ids that the server left out, or answered unreadably, are missing. Other tasks are dropped.

    Raises:
        NotSupported: the endpoint does not exist. Because it is undocumented, that is how a 4xx
            is understood (except 401, 402, 408, 425 and 429), and 501, and a 200 that is not a
            list of tasks.
        ApiError: as for :func:`read_task`.
    """
    value = parse_json(answer.body)
    success = answer.status == 200
    items = _batch_items(value) if success else None
    if items is not None:
        tasks = [_task(item, hide) for item in items if isinstance(item, dict)]
        by_id = {task.task_id: task for task in reversed(tasks) if task is not None}
        return {task_id: by_id[task_id] for task_id in task_ids if task_id in by_id}
    found = _read_error_body(answer, value, hide)
    code = _code(value.get("code", 200), hide) if isinstance(value, dict) else ""
    if success and code not in _OK_CODES:
        message = safe_text(value.get("message"), hide)
        found = replace(found, code=safe_text(code, max_chars=100), message=message)
        raise _read_error(answer, found, now)
    missing = (
        (success and not found.present)
        or answer.status == 501
        or (400 <= answer.status < 500 and answer.status not in _BATCH_ERRORS)
    )
    raise _read_error(answer, found, now, NotSupported if missing else None)


def _batch_items(value: Any) -> list[Any] | None:
    """Return the list in a batch answer, None if there is none."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict) or "data" not in value:
        return None
    data = value["data"]
    if data is None and _code(value.get("code", 200)) in _OK_CODES:
        return []
    return data if isinstance(data, list) else None


def read_credits(answer: RawAnswer, *, now: datetime, hide: Hide = unchanged) -> AccountCredits:
    """Return the balance of ``GET /v1/credits``; ``now`` becomes its ``read_at``.

    Raises:
        NotSupported: 404, 405 or 501: the server has no such endpoint.
        ApiError: of the class in the table; NoUsableAnswer for anything else, including
            ``success: false`` with 200, and an answer without the account's two amounts.
    """
    value = parse_json(answer.body)
    found = _read_error_body(answer, value, hide)
    if answer.status == 200 and isinstance(value, dict) and value.get("success") is not False:
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
        if not found.present:
            found = replace(found, message="the answer does not contain the account's credits")
    missing = answer.status in (404, 405, 501)
    raise _read_error(answer, found, now, NotSupported if missing else None)


def _read_error(
    answer: RawAnswer, found: _ErrorBody, now: datetime, error: type[ApiError] | None = None
) -> ApiError:
    """Return the error of a failed read; by default that of its status."""
    return (error or READ_ERRORS.get(answer.status, NoUsableAnswer))(
        found.message,
        status=answer.status,
        code=found.code,
        retry_after_s=retry_after_s(answer.headers, now),
        request_id=found.request_id,
    )


def _says_task_gone(found: _ErrorBody) -> bool:
    if TASK_GONE_CODE in (found.code, found.kind):
        return True
    unnamed = not found.code or found.code.isdecimal()
    return unnamed and any(text in found.message.lower() for text in TASK_GONE_MESSAGES)


def retry_after_s(headers: Mapping[str, str], now: datetime) -> float | None:
    """Return ``Retry-After`` in seconds, from 0 to 3600; None if it is absent or unreadable.

    Both forms of RFC 9110 are read: seconds, and an HTTP date. A date is compared with the
    answer's own ``Date``, since this machine's clock may be wrong, or with ``now`` without one.
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
    """Return the time of an HTTP date, None if the text is not one."""
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
    """The error in an answer, safe to print.

    ``present`` is true if the body contains an error; ``kind`` is its lower-cased ``type``.
    """

    present: bool
    code: str
    kind: str
    message: str
    request_id: str | None


def _read_error_body(answer: RawAnswer, value: Any, hide: Hide) -> _ErrorBody:
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
        source = whole if answer.status >= 300 or present else {}
    message = safe_text(source.get("message"), hide, 10_000)
    tail = _REQUEST_ID_TAIL.search(message)
    message = shortened(message[: tail.start()] if tail else message, MESSAGE_MAX_CHARS)
    request_id = (
        _header(answer.headers, "x-request-id")
        or _header(answer.headers, "x-oneapi-request-id")
        or source.get("request_id")
        or whole.get("request_id")
        or (tail.group(1) if tail else "")
    )
    code = safe_text(_code(source.get("code"), hide), max_chars=100)
    message = message or _message_without_json(answer, value, hide)
    hint = HINTS.get(code)
    return _ErrorBody(
        present=present,
        code=code,
        kind=safe_text(_code(source.get("type"), hide), max_chars=100),
        message=f"{message} ({hint})" if hint else message,
        request_id=safe_text(request_id, hide, 128) or None,
    )


def _message_without_json(answer: RawAnswer, value: Any, hide: Hide) -> str:
    """Return a message for an answer without one."""
    try:
        phrase = HTTPStatus(answer.status).phrase
    except ValueError:
        phrase = "unusual status"
    if value is not None:
        return phrase
    if not answer.body.strip():
        return f"{phrase} (the body is empty)"
    start = answer.body[:4096].decode("utf-8", "replace")
    if not start.lstrip("\ufeff \t\r\n").startswith("<"):
        return f"{phrase} (the body is not JSON)"
    title = _TITLE.search(start)
    named = safe_text(title.group(1), hide, 120) if title else ""
    return f"{phrase} (a page, not JSON{': ' + named if named else ''})"


def _task(value: Mapping[str, Any], hide: Hide, default_id: str | None = None) -> Task | None:
    """Return a task from its JSON object, None if it has no usable id or no status."""
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
    """Return a time from seconds since 1970, None if the value is not one."""
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
    """Return the links: texts, or objects with a ``url``; others are left out."""
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


def _code(value: Any, hide: Hide = unchanged) -> str:
    """Return a code as lower-case text: servers send words, numbers and capitals."""
    if isinstance(value, str):
        return hide(value).strip().lower()
    if isinstance(value, int) and not isinstance(value, bool):
        return hide(str(value))
    return ""


def _units(value: Any, *, negative: bool = False) -> int | None:
    """Return credits, a number or its text, in units; None if it is not a plausible amount."""
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
    """Return a header by its lower-case name, "" if it is absent."""
    found = headers.get(name)
    if found is not None:
        return found
    return next((value for key, value in headers.items() if key.lower() == name), "")
