"""The meaning of each documented answer of EvoLink, and of arbitrary ones."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from krea_dagster.api import wire
from krea_dagster.api.untrusted import MESSAGE_MAX_CHARS
from krea_dagster.api.wire import RawAnswer
from krea_dagster.errors import (
    AccessDenied,
    ApiError,
    ContentRefused,
    GatewayRefused,
    IdempotencyConflict,
    InputError,
    InsufficientCredits,
    KeyRejected,
    KreaError,
    ModelDenied,
    NoCapacity,
    NotCharged,
    NotSent,
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
from krea_dagster.models import AccountCredits, ImageRequest, Submission, Task, TaskFailure

NOW = datetime(2025, 7, 1, 12, 0, tzinfo=timezone.utc)
TASK_ID = "task-unified-1751280000-k2t9x8a3"
NO_HEADERS: dict[str, str] = {}

CREATED: dict[str, Any] = {
    "created": 1751280000,
    "id": TASK_ID,
    "model": "krea-2-turbo",
    "object": "image.generation.task",
    "progress": 0,
    "status": "pending",
    "task_info": {"can_cancel": False, "estimated_time": 45},
    "type": "image",
    "usage": {"billing_rule": "per_call", "credits_reserved": 0.45, "user_group": "default"},
}
COMPLETED: dict[str, Any] = {
    "created": 1756817821,
    "id": TASK_ID,
    "model": "krea-2-turbo",
    "object": "image.generation.task",
    "progress": 100,
    "results": ["https://files.evolink.ai/a/file_b75c.png"],
    "status": "completed",
    "task_info": {"can_cancel": False},
    "type": "image",
}
FAILED: dict[str, Any] = {
    "id": TASK_ID,
    "object": "image.generation.task",
    "status": "failed",
    "model": "krea-2-turbo",
    "progress": 0,
    "error": {
        "code": "content_policy_violation",
        "message": "Content policy violation.\nYour request was blocked by safety filters...",
    },
}
CREDITS: dict[str, Any] = {
    "data": {
        "token": {
            "remaining_credits": 99416.4429,
            "unlimited_credits": False,
            "used_credits": 583.5571,
        },
        "user": {"remaining_credits": 1095.3996, "used_credits": 135.9048},
    },
    "message": "",
    "success": True,
}

#: status, code, type, message, class: the documentation's table for the create call, then what
#: EvoLink's own clients are prepared for.
SUBMIT_ERRORS: list[tuple[int, object, str, str, type[SubmitError]]] = [
    (400, "invalid_request", "invalid_request_error", "Invalid request parameters", Refused),
    (401, "unauthorized", "authentication_error", "Invalid or expired token", KeyRejected),
    (402, "insufficient_quota", "insufficient_quota", "Insufficient quota.", OutOfCredits),
    (403, "model_access_denied", "invalid_request_error", "Token does not have", ModelDenied),
    (429, "rate_limit_exceeded", "rate_limit_error", "Too many requests", TurnedAway),
    (500, "internal_error", "api_error", "Internal server error", OutcomeUnknown),
    (400, "no_available_channel", "", "no channel", NoCapacity),
    (400, "model_unavailable", "", "down", NoCapacity),
    (400, "channel_no_available_key", "", "no key", NoCapacity),
    (400, "channel:no_available_key", "", "no key", NoCapacity),
    (400, "MODEL_UNAVAILABLE", "", "down", NoCapacity),
    (400, 400, "no_available_channel", "number as code, word as type", NoCapacity),
    (400, "content_policy_violation", "", "no", ContentRefused),
    (400, "content_filter", "", "no", ContentRefused),
    (400, "sensitive_content", "", "no", ContentRefused),
    (400, "moderation_blocked", "", "no", ContentRefused),
    (400, "Content_Filter", "", "no", ContentRefused),
    (400, 1001, "", "an integer code", Refused),
    (402, "insufficient_token_quota", "", "no", OutOfCredits),
    (402, "key_quota_exhausted", "", "no", OutOfCredits),
    (402, "token_daily_quota_exceeded", "", "no", OutOfCredits),
    (403, "ip_restricted", "", "no", ModelDenied),
    (403, "user_disabled", "", "no", ModelDenied),
    (413, "too_large", "", "no", Refused),
    (415, "not_json", "", "no", Refused),
    (409, "idempotency_conflict", "", "no", IdempotencyConflict),
    (409, "paid_outcome_unknown", "", "wait", PurchasePending),
    (409, "anything_else", "", "no", OutcomeUnknown),
    (404, "not_found", "", "no", OutcomeUnknown),
    (405, "method_not_allowed", "", "no", OutcomeUnknown),
    (408, "", "", "", OutcomeUnknown),
    (422, "invalid", "", "no", OutcomeUnknown),
    (301, "", "", "", OutcomeUnknown),
    (307, "", "", "", OutcomeUnknown),
    (502, "", "", "", OutcomeUnknown),
    (503, "no_available_channel", "", "no", OutcomeUnknown),
    (524, "", "", "", OutcomeUnknown),
    (204, "", "", "", OutcomeUnknown),
]

#: The same for a task query.
TASK_ERRORS: list[tuple[int, object, str, str, type[ApiError]]] = [
    (400, "invalid_task_id", "invalid_request_error", "Invalid task ID format", NoUsableAnswer),
    (401, "unauthorized", "authentication_error", "Authentication required", Unauthorized),
    (402, "quota_exceeded", "insufficient_quota", "Insufficient quota.", InsufficientCredits),
    (403, "permission_denied", "invalid_request_error", "You don't have", AccessDenied),
    (404, "task_not_found", "invalid_request_error", "The requested task", TaskNotFound),
    (404, "TASK_NOT_FOUND", "", "", TaskNotFound),
    (404, 404, "", "The requested task could not be found", TaskNotFound),
    (404, "not_found", "", "No such route", NoUsableAnswer),
    (404, 404, "", "Not Found: /v1/tasks/1", NoUsableAnswer),
    (410, "task_not_found", "", "", NoUsableAnswer),
    (429, "rate_limit_exceeded", "evo_api_error", "Rate limit exceeded", RateLimited),
    (500, "internal_error", "api_error", "Failed to retrieve task status", NoUsableAnswer),
    (302, "", "", "", NoUsableAnswer),
]


def request(**changes: Any) -> ImageRequest:
    values: dict[str, Any] = {
        "request_key": "k",
        "prompt": "a red cube",
        "size": "16:9",
        "quality": "2K",
        "seed": 7,
        "nsfw_check": True,
        "attempt": 3,
    }
    return ImageRequest(**{**values, **changes})


def to_bytes(value: object) -> bytes:
    return json.dumps(value).encode()


def error_body(code: object, kind: str, message: str) -> bytes:
    return to_bytes({"error": {"code": code, "message": message, "type": kind}})


def submit_error(status: int, body: bytes, headers: dict[str, str] | None = None) -> SubmitError:
    with pytest.raises(SubmitError) as caught:
        wire.read_submission(RawAnswer(status, headers or {}, body), now=NOW)
    return caught.value


def task_error(status: int, body: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        wire.read_task(RawAnswer(status, {}, body), task_id=TASK_ID, now=NOW)
    return caught.value


def read_task(value: object) -> Task:
    return wire.read_task(RawAnswer(200, {}, to_bytes(value)), task_id=TASK_ID, now=NOW)


def read_created(value: object, headers: dict[str, str] | None = None) -> Submission:
    return wire.read_submission(RawAnswer(200, headers or {}, to_bytes(value)), now=NOW)


# -- requests ---------------------------------------------------------------------------------


def test_a_request_has_all_fields_that_decide_the_image_and_no_others() -> None:
    assert wire.generation_body(request()) == {
        "model": "krea-2-turbo",
        "prompt": "a red cube",
        "size": "16:9",
        "quality": "2K",
        "seed": 7,
        "nsfw_check": True,
    }


def test_a_callback_url_is_sent_only_when_there_is_one() -> None:
    url = "https://example.com/hook"
    assert wire.generation_body(request(), url)["callback_url"] == url


@pytest.mark.parametrize("url", ["http://example.com/", "ftp://x", "", "https://" + "x" * 2048])
def test_a_callback_url_that_the_api_would_refuse_is_not_sent(url: str) -> None:
    with pytest.raises(InputError):
        wire.generation_body(request(), url)


@pytest.mark.parametrize("seed", [0, -1, 1_048_577, True])
def test_a_seed_that_the_server_would_replace_is_not_sent(seed: int) -> None:
    with pytest.raises(InputError):
        wire.generation_body(request(seed=seed))


def test_the_same_request_is_always_the_same_bytes() -> None:
    body = wire.generation_body(request(prompt="é"))
    assert wire.encode_json(body) == wire.encode_json(dict(reversed(body.items())))
    assert wire.encode_json({"b": 1, "a": "é"}) == b'{"a":"\\u00e9","b":1}'


def test_a_prompt_with_a_lone_surrogate_can_be_sent() -> None:
    assert wire.encode_json({"prompt": "\ud800"}) == b'{"prompt":"\\ud800"}'


# -- the answer to a purchase -----------------------------------------------------------------


def test_the_documented_answer_to_a_purchase_is_read_in_full() -> None:
    submission = read_created(CREATED)
    assert submission == Submission(
        task_id=TASK_ID,
        status="pending",
        credits_reserved_units=4500,
        billing_rule="per_call",
        user_group="default",
        replayed=False,
        answer=CREATED,
    )


@pytest.mark.parametrize(
    ("status", "code", "kind", "message", "error"),
    SUBMIT_ERRORS,
    ids=[f"{row[0]}-{row[1]}" for row in SUBMIT_ERRORS],
)
def test_each_answer_to_a_purchase_tells_whether_money_was_spent(
    status: int, code: object, kind: str, message: str, error: type[SubmitError]
) -> None:
    caught = submit_error(status, error_body(code, kind, message))
    assert type(caught) is error
    assert caught.status == status
    assert caught.code == str(code).lower()
    assert message in caught.message


def test_every_error_of_a_purchase_comes_from_an_answer_or_the_connection() -> None:
    """The leaves of the tree in errors.py are those of the tables, and NotSent."""

    def leaves(error: type[SubmitError]) -> set[type[SubmitError]]:
        below = [leaves(child) for child in error.__subclasses__()]
        return set().union(*below) if below else {error}

    in_table = {row[4] for row in SUBMIT_ERRORS}
    assert in_table - {Refused, OutcomeUnknown} | {NotSent, GatewayRefused} == leaves(SubmitError)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html><title>400 Bad Request</title>",
        b"Bad Request",
        b"{}",
        b"[]",
        b'{"message": "no"}',
        b'{"error": {}}',
        b'{"error": null}',
    ],
)
def test_a_gateways_400_is_not_charged_and_does_not_refuse_the_row(body: bytes) -> None:
    error = submit_error(400, body)
    assert type(error) is GatewayRefused
    assert isinstance(error, NotCharged)
    assert not isinstance(error, Refused)
    assert error.status == 400


def test_no_documented_status_is_left_to_the_default() -> None:
    documented = {row[0] for row in SUBMIT_ERRORS[:6]}
    by_code = {400, 409}
    assert documented - set(wire.SUBMIT_ERRORS) - by_code == {500}
    asked = {row[0] for row in TASK_ERRORS if row[1] != ""}
    assert asked - set(wire.READ_ERRORS) == {400, 404, 410, 500}


@pytest.mark.parametrize("status", [401, 402, 403, 413, 415, 429])
@pytest.mark.parametrize("body", [b"", b"<html><title>No</title></html>", b"\xff\xfe", b"[1]"])
def test_a_refusal_by_status_needs_no_readable_body(status: int, body: bytes) -> None:
    assert type(submit_error(status, body)) is wire.SUBMIT_ERRORS[status]


@pytest.mark.parametrize(
    "change",
    [
        {"id": None},
        {"id": ""},
        {"id": 17},
        {"id": "a b"},
        {"id": "../../credits"},
        {"id": ".."},
        {"id": "x" * 129},
        {"id": "täsk"},
        {"id": TASK_ID + "\n"},
        {"error": {"code": "internal_error", "message": "no"}},
        {"error": "broken"},
        {"success": False},
    ],
)
def test_a_success_without_a_usable_id_or_with_an_error_is_an_unknown_outcome(
    change: dict[str, Any],
) -> None:
    assert type(submit_error(200, to_bytes({**CREATED, **change}))) is OutcomeUnknown


@pytest.mark.parametrize(
    "body", [b"", b"null", b"[]", b"{", b"<html>", b'"' + TASK_ID.encode() + b'"', b"[" * 100_000]
)
def test_a_success_that_is_not_an_object_is_an_unknown_outcome(body: bytes) -> None:
    assert type(submit_error(200, body)) is OutcomeUnknown


@pytest.mark.parametrize("error", [None, {}, "", {"code": "", "message": "", "type": ""}])
def test_an_empty_error_with_a_task_id_is_not_an_error(error: object) -> None:
    assert read_created({**CREATED, "error": error}).task_id == TASK_ID


@pytest.mark.parametrize(
    ("reserved", "units"),
    [
        (0.45, 4500),
        (1.8, 18000),
        (0, 0),
        ("0.45", 4500),
        (" 2 ", 20000),
        (0.00004, 0),
        (None, None),
        (-1, None),
        ("-1", None),
        ("1e3", None),
        ("nan", None),
        (True, None),
        ([1], None),
        (1e300, None),
        (math.nan, None),
        (math.inf, None),
        (10**39, None),
    ],
)
def test_reserved_credits_are_read_exactly_or_not_at_all(
    reserved: object, units: int | None
) -> None:
    usage = {"credits_reserved": reserved}
    assert read_created({**CREATED, "usage": usage}).credits_reserved_units == units


@pytest.mark.parametrize("usage", [None, [], "x", {}, {"billing_rule": 7, "user_group": None}])
def test_a_purchase_without_usage_has_no_credits(usage: object) -> None:
    submission = read_created({**CREATED, "usage": usage})
    assert submission.credits_reserved_units is None
    assert submission.billing_rule is None
    assert submission.user_group is None


@pytest.mark.parametrize(("value", "replayed"), [("true", True), ("TRUE", True), ("false", False)])
def test_a_replay_is_recognised_by_its_header(value: str, replayed: bool) -> None:
    assert read_created(CREATED, {"Idempotency-Replayed": value}).replayed is replayed


def test_the_kept_answer_can_be_stored_in_a_database() -> None:
    body = b'{"id":"t-1","a\\u0000":"\\ud800","n":NaN,"h":1e999,"i":' + b"9" * 5000 + b"}"
    submission = wire.read_submission(RawAnswer(200, {}, body), now=NOW)
    assert submission.answer == {"id": "t-1", "a\ufffd": "\ufffd", "n": None, "h": None, "i": None}


def test_a_byte_order_mark_and_bad_utf8_do_not_lose_a_paid_task() -> None:
    body = b'\xef\xbb\xbf{"id":"t-1","status":"PENDING","x":"\xff"}'
    submission = wire.read_submission(RawAnswer(201, {}, body), now=NOW)
    assert (submission.task_id, submission.status) == ("t-1", "pending")


# -- errors -----------------------------------------------------------------------------------


def test_the_request_id_is_removed_from_the_message() -> None:
    error = submit_error(400, error_body("invalid_request", "", "Bad size (request id: 2025abc)"))
    assert error.message == "Bad size"
    assert error.request_id == "2025abc"


@pytest.mark.parametrize("name", ["x-request-id", "X-Oneapi-Request-Id"])
def test_the_request_id_of_a_header_comes_first(name: str) -> None:
    error = submit_error(400, error_body("", "", "No (request id: b)"), {name: "a"})
    assert error.request_id == "a"


def test_a_long_message_is_shortened_after_its_request_id_was_found() -> None:
    error = submit_error(400, error_body("", "", "x" * 900 + " (request id: r1)"))
    assert len(error.message) == MESSAGE_MAX_CHARS
    assert error.request_id == "r1"


def test_a_message_contains_no_terminal_escapes() -> None:
    message = "\x1b[31mred\x1b[0m \x1b]0;title\x07line\r\nnext\x01\u202egnp.exe\x9b2J"
    assert submit_error(400, error_body("", "", message)).message == "red line next gnp.exe 2J"


def test_a_page_is_shown_by_its_title_only() -> None:
    error = submit_error(502, b"<html><head><title>Bad\ngateway</title></head>" + b"x" * 10_000)
    assert error.message == "Bad Gateway (a page, not JSON: Bad gateway)"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "Too Many Requests (the body is empty)"),
        (b"slow down", "Too Many Requests (the body is not JSON)"),
        (b"{}", "Too Many Requests"),
        (b'{"error":"slow down"}', "slow down"),
        (b'{"message":"slow down"}', "slow down"),
        (b'{"error":{"message":null}}', "Too Many Requests"),
        (b'{"error":["slow"]}', "Too Many Requests"),
    ],
)
def test_an_error_of_any_shape_has_a_message(body: bytes, message: str) -> None:
    assert submit_error(429, body).message == message


@pytest.mark.parametrize("code", sorted(wire.HINTS))
def test_a_code_with_a_hint_shows_it(code: str) -> None:
    assert submit_error(403, error_body(code, "", "No.")).message == f"No. ({wire.HINTS[code]})"


def test_the_key_is_hidden_before_a_message_is_shortened() -> None:
    key = "sk-0123456789"
    message = "x" * 495 + " " + key

    def hide(text: str) -> str:
        return text.replace(key, "***")

    with pytest.raises(Refused) as caught:
        wire.read_submission(RawAnswer(400, {}, error_body(key, "", message)), now=NOW, hide=hide)
    assert "sk-" not in str(caught.value)
    answer = {**CREATED, "echo": [f"Bearer {key}"]}
    submission = wire.read_submission(RawAnswer(200, {}, to_bytes(answer)), now=NOW, hide=hide)
    assert submission.answer["echo"] == ["Bearer ***"]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("7", 7.0),
        (" 1.5 ", 1.5),
        ("99999", 3600.0),
        ("9" * 300, 3600.0),
        (format_datetime(NOW + timedelta(seconds=90), usegmt=True), 90.0),
        (format_datetime(NOW - timedelta(days=1), usegmt=True), 0.0),
        (format_datetime(NOW + timedelta(days=9), usegmt=True), 3600.0),
        ("Tue, 01 Jul 2025 14:00:30 +0200", 30.0),
        ("Tue, 01 Jul 2025 12:00:30 -0000", 30.0),
        ("", None),
        ("-5", None),
        ("soon", None),
        ("inf", None),
        ("١", None),
        ("Tue, 99 Jul 2025 12:00:00 GMT", None),
    ],
)
def test_retry_after_is_seconds_or_a_date_within_an_hour(value: str, seconds: float | None) -> None:
    assert wire.retry_after_s({"Retry-After": value}, NOW) == seconds


def test_a_retry_after_date_is_compared_with_the_answers_date() -> None:
    """A machine whose clock is wrong by hours waits as long as the server meant."""
    headers = {
        "date": "Tue, 01 Jul 2031 06:00:00 GMT",
        "retry-after": "Tue, 01 Jul 2031 06:00:40 GMT",
    }
    assert wire.retry_after_s(headers, NOW) == 40
    assert wire.retry_after_s({**headers, "date": "yesterday"}, NOW) == wire.RETRY_AFTER_MAX_S
    assert wire.retry_after_s({**headers, "retry-after": "7"}, NOW) == 7


def test_a_missing_retry_after_is_none() -> None:
    assert wire.retry_after_s(NO_HEADERS, NOW) is None


def test_retry_after_reaches_the_error() -> None:
    assert submit_error(429, b"", {"retry-after": "12"}).retry_after_s == 12.0


# -- the answer to a task read ----------------------------------------------------------------


def test_the_documented_completed_task_is_read() -> None:
    assert read_task(COMPLETED) == Task(
        task_id=TASK_ID,
        status="completed",
        progress=100,
        results=("https://files.evolink.ai/a/file_b75c.png",),
        created_at=datetime(2025, 9, 2, 12, 57, 1, tzinfo=timezone.utc),
    )


def test_the_documented_failed_task_is_read_on_one_line() -> None:
    task = read_task(FAILED)
    assert task.status == "failed"
    assert task.failure == TaskFailure(
        "content_policy_violation",
        "Content policy violation. Your request was blocked by safety filters...",
    )


@pytest.mark.parametrize(
    ("status", "code", "kind", "message", "error"),
    TASK_ERRORS,
    ids=[f"{row[0]}-{row[1]}-{row[4].__name__}" for row in TASK_ERRORS],
)
def test_each_answer_to_a_task_read_has_its_error(
    status: int, code: object, kind: str, message: str, error: type[ApiError]
) -> None:
    caught = task_error(status, error_body(code, kind, message))
    assert type(caught) is error
    assert (caught.status, caught.code) == (status, str(code).lower())


@pytest.mark.parametrize("body", [b"", b"<html>404</html>", b"{}", b'{"detail":"Not Found"}'])
def test_a_404_that_does_not_name_the_task_does_not_mean_that_it_is_gone(body: bytes) -> None:
    assert type(task_error(404, body)) is NoUsableAnswer


def test_a_success_with_task_not_found_does_not_mean_that_it_is_gone() -> None:
    assert type(task_error(200, error_body("task_not_found", "", "gone"))) is NoUsableAnswer


def test_an_answer_about_another_task_is_not_used() -> None:
    error = task_error(200, to_bytes({**FAILED, "id": "task-unified-2"}))
    assert type(error) is NoUsableAnswer
    assert "another task" in error.message


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"status":5}', b'{"status":""}', b"<p>"])
def test_a_success_without_a_status_is_not_usable(body: bytes) -> None:
    assert type(task_error(200, body)) is NoUsableAnswer


def test_a_task_with_nothing_but_a_status_is_read() -> None:
    assert read_task({"status": "Processing"}) == Task(TASK_ID, "processing", 0)


@pytest.mark.parametrize(
    ("results", "links"),
    [
        (None, ()),
        ([], ()),
        (["a", "b"], ("a", "b")),
        ([{"url": "a"}, {"url": None}, {"x": 1}], ("a",)),
        ([None, 5, "", "  ", " a "], ("a",)),
        ("a", ("a",)),
        ({"url": "a"}, ("a",)),
        (17, ()),
    ],
)
def test_results_are_texts_or_objects_with_a_url(results: object, links: tuple[str, ...]) -> None:
    assert read_task({**COMPLETED, "results": results}).results == links


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(0, 0), (55, 55), (55.9, 55), (-3, 0), (1e9, 100), ("x", 0), (None, 0), (True, 0)],
)
def test_progress_is_from_0_to_100(progress: object, expected: int) -> None:
    assert read_task({"status": "pending", "progress": progress}).progress == expected


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (None, TaskFailure("unknown_error", "")),
        ({}, TaskFailure("unknown_error", "")),
        ("it broke", TaskFailure("unknown_error", "it broke")),
        ({"code": 500, "message": "it broke"}, TaskFailure("500", "it broke")),
        ({"code": "SERVICE_ERROR"}, TaskFailure("service_error", "")),
        ({"code": None, "message": 7}, TaskFailure("unknown_error", "7")),
        ([1], TaskFailure("unknown_error", "")),
    ],
)
def test_a_failed_task_always_has_a_failure(error: object, failure: TaskFailure) -> None:
    assert read_task({"status": "failed", "error": error}).failure == failure


def test_a_task_that_did_not_fail_has_none() -> None:
    assert read_task({"status": "pending", "error": {}}).failure is None


def test_cancelled_is_one_status_in_both_spellings() -> None:
    assert read_task({"status": "Canceled"}).status == "cancelled"


@pytest.mark.parametrize(
    ("usage", "units"),
    [
        ({"credits_used": 0.45}, 4500),
        ({"cost": {"credits": "1.8"}}, 18000),
        ({"credits_used": None, "cost": {"credits": 1}}, 10000),
        ({"credits_used": -1}, None),
        ({"cost": 5}, None),
        ({}, None),
        (None, None),
    ],
)
def test_credits_used_are_read_if_the_server_sends_them(usage: object, units: int | None) -> None:
    assert read_task({**COMPLETED, "usage": usage}).credits_used_units == units


# -- many tasks at once -----------------------------------------------------------------------


def read_many(value: object, *ids: str, status: int = 200) -> dict[str, Task]:
    return wire.read_tasks(RawAnswer(status, {}, to_bytes(value)), task_ids=ids, now=NOW)


@pytest.mark.parametrize("wrap", [lambda data: {"code": 200, "data": data}, lambda data: data])
def test_a_batch_is_returned_in_the_requested_order(wrap: Any) -> None:
    data = [{"id": "b", "status": "pending"}, {"id": "a", "status": "failed"}]
    found = read_many(wrap(data), "a", "b", "c")
    assert [(key, task.status) for key, task in found.items()] == [
        ("a", "failed"),
        ("b", "pending"),
    ]


def test_unreadable_and_unrequested_tasks_of_a_batch_are_left_out() -> None:
    data = [None, 5, {}, {"id": "a"}, {"id": "x", "status": "pending"}, {"status": "pending"}]
    assert read_many({"code": 200, "data": data}, "a", "b") == {}


def test_a_batch_of_null_is_empty() -> None:
    assert read_many({"code": 200, "data": None}, "a") == {}


@pytest.mark.parametrize("status", [400, 403, 404, 405, 410, 422, 501])
def test_a_batch_endpoint_that_refuses_is_taken_to_be_missing(status: int) -> None:
    with pytest.raises(NotSupported):
        wire.read_tasks(RawAnswer(status, {}, b"<html>"), task_ids=["a"], now=NOW)


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'"x"', b'{"data":"x"}', b'{"hello":1}'])
def test_a_batch_endpoint_that_answers_something_else_is_taken_to_be_missing(body: bytes) -> None:
    with pytest.raises(NotSupported):
        wire.read_tasks(RawAnswer(200, {}, body), task_ids=["a"], now=NOW)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (401, Unauthorized),
        (402, InsufficientCredits),
        (429, RateLimited),
        (408, NoUsableAnswer),
        (500, NoUsableAnswer),
        (524, NoUsableAnswer),
    ],
)
def test_a_batch_endpoint_with_a_passing_error_is_not_missing(
    status: int, error: type[ApiError]
) -> None:
    with pytest.raises(ApiError) as caught:
        wire.read_tasks(RawAnswer(status, {}, b""), task_ids=["a"], now=NOW)
    assert type(caught.value) is error


@pytest.mark.parametrize(
    "value",
    [
        {"code": 500, "message": "busy", "data": None},
        {"error": {"code": "busy", "message": "busy"}},
    ],
)
def test_a_batch_answer_with_an_error_is_an_error(value: object) -> None:
    with pytest.raises(NoUsableAnswer, match="busy"):
        read_many(value, "a")


# -- the account ------------------------------------------------------------------------------


def test_the_documented_credits_are_read_exactly() -> None:
    assert wire.read_credits(RawAnswer(200, {}, to_bytes(CREDITS)), now=NOW) == AccountCredits(
        user_remaining_units=10_953_996,
        user_used_units=1_359_048,
        token_remaining_units=994_164_429,
        token_used_units=5_835_571,
        token_unlimited=False,
        read_at=NOW,
    )


def test_a_balance_may_be_negative_and_the_keys_limit_missing() -> None:
    value = {"data": {"user": {"remaining_credits": "-0.5", "used_credits": 1}}, "success": True}
    read = wire.read_credits(RawAnswer(200, {}, to_bytes(value)), now=NOW)
    assert (read.user_remaining_units, read.token_remaining_units) == (-5000, None)


@pytest.mark.parametrize(
    ("status", "value", "error"),
    [
        (200, {**CREDITS, "success": False, "message": "no such key"}, NoUsableAnswer),
        (200, {"data": {"user": {"remaining_credits": None}}}, NoUsableAnswer),
        (200, [], NoUsableAnswer),
        (401, {}, Unauthorized),
        (403, {}, AccessDenied),
        (404, {}, NotSupported),
        (429, {}, RateLimited),
        (503, {}, NoUsableAnswer),
    ],
)
def test_credits_that_cannot_be_read_are_an_error(
    status: int, value: object, error: type[ApiError]
) -> None:
    with pytest.raises(ApiError) as caught:
        wire.read_credits(RawAnswer(status, {}, to_bytes(value)), now=NOW)
    assert type(caught.value) is error


def test_the_message_of_an_unsuccessful_success_is_kept() -> None:
    value = {"success": False, "message": "no such key"}
    with pytest.raises(NoUsableAnswer, match="no such key"):
        wire.read_credits(RawAnswer(200, {}, to_bytes(value)), now=NOW)


# -- arbitrary answers ------------------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=20)
    | st.sampled_from(["a", "completed", "task_not_found", "no_available_channel", "1e999"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    *("id", "status", "error", "code", "message", "type", "usage", "results"),
                    *("data", "user", "token", "success", "credits_reserved", "progress", "url"),
                    *("remaining_credits", "used_credits", "credits_used", "cost", "credits"),
                ]
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=20,
)
BODIES = st.binary(max_size=200) | JSON.map(to_bytes)
STATUSES = st.sampled_from([200, 201, 302, 400, 401, 402, 403, 404, 409, 413, 429, 500, 524, 999])
HEADERS = st.dictionaries(
    st.sampled_from(["Retry-After", "x-request-id", "Idempotency-Replayed", "x"]), st.text()
)


@given(status=STATUSES, headers=HEADERS, body=BODIES)
def test_any_answer_is_read_or_raises_an_error_of_the_package(
    status: int, headers: dict[str, str], body: bytes
) -> None:
    readers: list[Callable[[], object]] = [
        lambda: wire.read_submission(RawAnswer(status, headers, body), now=NOW),
        lambda: wire.read_task(RawAnswer(status, headers, body), task_id="a", now=NOW),
        lambda: wire.read_tasks(RawAnswer(status, headers, body), task_ids=["a", "b"], now=NOW),
        lambda: wire.read_credits(RawAnswer(status, headers, body), now=NOW),
    ]
    for read in readers:
        check_read(read)


def check_read(read: Callable[[], object]) -> None:
    try:
        value = read()
    except KreaError as error:
        text = str(error)
        assert not {unicodedata.category(char) for char in text} & {"Cc", "Cs"}
        assert len(text) < 1000
    else:
        repr(value).encode()


@given(value=st.text())
def test_retry_after_is_always_within_its_bounds(value: str) -> None:
    seconds = wire.retry_after_s({"retry-after": value}, NOW)
    assert seconds is None or 0 <= seconds <= wire.RETRY_AFTER_MAX_S
