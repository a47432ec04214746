"""EvoLink's documented contract for ``krea-2-turbo``: sizes, prices, errors, request bodies. Pure.

Written from EvoLink's documentation and without the rest of this package, so that a mistake of the
client is not repeated here.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

MODEL: Final = "krea-2-turbo"

#: (width, height) in pixels by size, at 1K and at 2K.
PIXELS: Final[Mapping[str, tuple[tuple[int, int], tuple[int, int]]]] = {
    "1:1": ((1024, 1024), (2048, 2048)),
    "4:3": ((1152, 896), (2304, 1728)),
    "3:4": ((896, 1152), (1728, 2304)),
    "5:4": ((1152, 896), (2240, 1792)),
    "4:5": ((896, 1152), (1792, 2240)),
    "2:3": ((832, 1280), (1664, 2496)),
    "3:2": ((1280, 832), (2496, 1664)),
    "9:16": ((768, 1344), (1472, 2688)),
    "16:9": ((1344, 768), (2688, 1472)),
    "1:2": ((704, 1472), (1408, 2816)),
    "2:1": ((1472, 704), (2816, 1408)),
}
QUALITIES: Final = ("1K", "2K")

#: Price of one call in units of 1/10,000 credit.
PRICE_UNITS: Final[Mapping[str, int]] = {"1K": 4_500, "2K": 18_000}
UNITS_PER_CREDIT: Final = 10_000

MAX_SEED: Final = 1_048_576
MAX_PROMPT_TOKENS: Final = 640
MAX_CALLBACK_URL: Final = 2048
MAX_BATCH: Final = 50
MAX_PAGE_SIZE: Final = 50
MAX_BODY_BYTES: Final = 1 << 20
TASK_ID_PREFIX: Final = "task-unified-"

_IDEMPOTENCY_KEY: Final = re.compile(r"[A-Za-z0-9._-]{16,96}")


@dataclass(frozen=True)
class Order:
    """The body of an accepted create call, with the documented defaults filled in.

    ``seed`` is the requested one: None or 0 lets the server draw one.
    """

    prompt: str
    size: str = "1:1"
    quality: str = "1K"
    seed: int | None = None
    nsfw_check: bool = False
    callback_url: str | None = None

    @property
    def pixels(self) -> tuple[int, int]:
        """Width and height of the image."""
        return PIXELS[self.size][QUALITIES.index(self.quality)]

    @property
    def fingerprint(self) -> str:
        """A hash of all fields that decide the image: two orders with the same one buy it twice."""
        parts = [self.prompt, self.size, self.quality, self.seed or 0, self.nsfw_check]
        return _digest(parts)

    @property
    def body_hash(self) -> str:
        """A hash of the parsed body, to compare the bodies of a repeated key."""
        return _digest([self.fingerprint, self.callback_url])


class ErrorResponse(Exception):
    """An error that the API responds with.

    ``code`` and ``kind`` are those of the body; ``param`` is the field that is wrong, if any.
    """

    def __init__(
        self,
        status: int,
        code: str | int,
        message: str,
        kind: str = "invalid_request_error",
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, code, message)
        self.status = status
        self.code = code
        self.message = message
        self.kind = kind
        self.param = param
        self.headers = dict(headers or {})

    def body(self, request_id: str | None = None) -> dict[str, Any]:
        """Return the JSON body. With ``request_id``, the message ends with it."""
        tail = f" (request id: {request_id})" if request_id else ""
        error: dict[str, Any] = {
            "code": self.code,
            "message": self.message + tail,
            "type": self.kind,
        }
        if self.param is not None:
            error["param"] = self.param
        return {"error": error}


# -- the documented errors --------------------------------------------------------------------


def invalid_request(param: str | None = None, detail: str = "") -> ErrorResponse:
    """Return 400 for a create, batch or list call with a wrong field."""
    message = "Invalid request parameters" + (f": {detail}" if detail else "")
    return ErrorResponse(400, "invalid_request", message, param=param)


def unauthorized(route: str) -> ErrorResponse:
    """Return 401. The message of the create call differs from the others."""
    message = "Invalid or expired token" if route == "create" else "Authentication required"
    return ErrorResponse(401, "unauthorized", message, "authentication_error")


def out_of_credits(route: str, code: str | None = None) -> ErrorResponse:
    """Return 402: the account (or, with another code, the key) lacks credits."""
    usual = "insufficient_quota" if route == "create" else "quota_exceeded"
    message = "Insufficient quota. Please top up your account."
    return ErrorResponse(402, code or usual, message, "insufficient_quota")


def access_denied(route: str, code: str | None = None) -> ErrorResponse:
    """Return 403: no access to the model, or to another account's task."""
    if route == "create":
        message = f"Token does not have access to model: {MODEL}"
        return ErrorResponse(403, code or "model_access_denied", message)
    message = "You don't have permission to access this task"
    return ErrorResponse(403, code or "permission_denied", message)


def invalid_task_id() -> ErrorResponse:
    """Return 400 for a task id of the wrong form."""
    message = f"Invalid task ID format, must start with '{TASK_ID_PREFIX}'"
    return ErrorResponse(400, "invalid_task_id", message, param="task_id")


def task_not_found() -> ErrorResponse:
    """Return 404 for a task that is not known, or no longer."""
    return ErrorResponse(404, "task_not_found", "The requested task could not be found")


def rate_limited(route: str, retry_after: str | None = None) -> ErrorResponse:
    """Return 429. ``retry_after`` is the header's text: seconds or an HTTP date."""
    headers = {} if retry_after is None else {"retry-after": retry_after}
    if route == "create":
        message = "Too many requests, please try again later"
        return ErrorResponse(
            429, "rate_limit_exceeded", message, "rate_limit_error", headers=headers
        )
    return ErrorResponse(
        429, "rate_limit_exceeded", "Rate limit exceeded", "evo_api_error", headers=headers
    )


def internal_error(route: str, status: int = 500) -> ErrorResponse:
    """Return 500 (or another 5xx) as JSON."""
    message = "Internal server error" if route == "create" else "Failed to retrieve task status"
    return ErrorResponse(status, "internal_error", message, "api_error")


def no_such_route(method: str, path: str) -> ErrorResponse:
    """Return 404 for an endpoint that does not exist."""
    return ErrorResponse(404, "not_found", f"Invalid URL ({method} {path})")


def idempotency_conflict() -> ErrorResponse:
    """Return 409: the Idempotency-Key was used for another body."""
    message = "This Idempotency-Key was already used with a different request body"
    return ErrorResponse(409, "idempotency_conflict", message)


def paid_outcome_unknown() -> ErrorResponse:
    """Return 409: the first submission with this key is not decided yet."""
    message = "The first request with this Idempotency-Key is still being decided"
    return ErrorResponse(409, "paid_outcome_unknown", message, "api_error")


# -- task errors ------------------------------------------------------------------------------

#: The message of a failed task for each documented code. Some contain line breaks.
TASK_ERRORS: Final[Mapping[str, str]] = {
    "content_policy_violation": (
        "Content policy violation.\nThe prompt or the image was blocked by safety filters.\n"
        "Change the prompt and try again."
    ),
    "invalid_parameters": "Invalid parameters.",
    "image_processing_error": "The image could not be processed.",
    "image_dimension_mismatch": "The image dimensions do not match.",
    "request_cancelled": "The request was cancelled.",
    "resource_not_found": "A resource was not found.",
    "service_error": "The service reported an error.\nTry again in a while.",
    "generation_timeout": "The generation took too long.",
    "resource_exhausted": "Resources are exhausted.\nTry again in a few minutes.",
    "quota_exceeded": "Rate or concurrency limit reached.",
    "service_unavailable": "The service is not available for now.",
    "generation_failed_no_content": "The generation returned no content.",
    "unknown_error": "An unknown error occurred.",
}


def task_error_message(code: str) -> str:
    """Return the message for a task error code, a general one if it is not documented."""
    return TASK_ERRORS.get(code, "The task failed.")


# -- reading requests -------------------------------------------------------------------------


def parse_json(raw: bytes) -> Any:
    """Read a JSON body strictly: UTF-8, no NaN or Infinity. Raises ErrorResponse 400 otherwise."""

    def no_constant(text: str) -> Any:
        raise ValueError(text)

    try:
        return json.loads(raw.decode("utf-8"), parse_constant=no_constant)
    except (ValueError, RecursionError):  # ValueError also covers bad UTF-8 and endless digits
        raise invalid_request() from None


def approximate_tokens(prompt: str) -> int:
    """Estimate the tokens of a prompt; EvoLink does not document the tokenizer.

    1.3 tokens for each word, and one more for each character from U+2E80 on, where the scripts
    without spaces begin.
    """
    words = len(prompt.split())
    dense = 0 if prompt.isascii() else sum(1 for character in prompt if character >= "\u2e80")
    return math.ceil(words * 1.3) + dense


def read_order(body: object, *, callbacks_to_private: bool = False) -> Order:
    """Check a create body against the contract. Raises ErrorResponse 400 with the field.

    ``callbacks_to_private`` also accepts a ``callback_url`` at a private address. Fields that
    the contract does not name are ignored. Lone surrogates in the prompt become U+FFFD, as in a
    server that stores text as UTF-8.
    """
    if not isinstance(body, dict):
        raise invalid_request()
    if body.get("model") != MODEL:
        raise invalid_request("model")
    seed = _read_seed(body)
    nsfw_check = body.get("nsfw_check", False)
    if not isinstance(nsfw_check, bool):
        raise invalid_request("nsfw_check")
    return Order(
        prompt=_read_prompt(body.get("prompt")),
        size=_read_choice(body, "size", "1:1", tuple(PIXELS)),
        quality=_read_choice(body, "quality", "1K", QUALITIES),
        seed=seed,
        nsfw_check=nsfw_check,
        callback_url=_read_callback_url(body, callbacks_to_private),
    )


def read_idempotency_key(header: str | None) -> str | None:
    """Check the Idempotency-Key header, None if there is none. Raises ErrorResponse 400."""
    if header is None:
        return None
    if not _IDEMPOTENCY_KEY.fullmatch(header):
        raise invalid_request("Idempotency-Key")
    return header


def read_task_ids(body: object) -> list[str]:
    """Check the body of a batch read: up to 50 ids as text. Raises ErrorResponse 400."""
    ids = body.get("task_ids") if isinstance(body, dict) else None
    if not isinstance(ids, list) or len(ids) > MAX_BATCH:
        raise invalid_request("task_ids")
    if not all(isinstance(task_id, str) for task_id in ids):
        raise invalid_request("task_ids")
    return [_whole_text(task_id) for task_id in ids]


def read_page(query: Mapping[str, str]) -> tuple[int, int]:
    """Return page (from 1) and page size (1 to 50) of a list call. Raises ErrorResponse 400."""
    values = []
    for name, default, most in (("page", "1", 1_000_000), ("page_size", "20", MAX_PAGE_SIZE)):
        text = query.get(name, default)
        if not (text.isascii() and text.isdigit() and len(text) < 9 and 1 <= int(text) <= most):
            raise invalid_request(name)
        values.append(int(text))
    return values[0], values[1]


def _read_prompt(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise invalid_request("prompt")
    prompt = _whole_text(value)
    if approximate_tokens(prompt) > MAX_PROMPT_TOKENS:
        raise invalid_request("prompt", f"prompt is longer than {MAX_PROMPT_TOKENS} tokens")
    return prompt


def _read_choice(body: Mapping[str, Any], name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = body.get(name, default)
    if not isinstance(value, str) or value not in allowed:
        raise invalid_request(name)
    return value


def _read_seed(body: Mapping[str, Any]) -> int | None:
    if "seed" not in body:
        return None
    value = body["seed"]
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # JSON does not distinguish 7.0 from 7
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_SEED:
        raise invalid_request("seed")
    return value


def _read_callback_url(body: Mapping[str, Any], private_too: bool) -> str | None:
    if "callback_url" not in body:
        return None
    url = body["callback_url"]
    if not isinstance(url, str) or len(url) > MAX_CALLBACK_URL:
        raise invalid_request("callback_url")
    if not is_public_https(url, private_too=private_too):
        raise invalid_request("callback_url")
    return url


def is_public_https(url: str, *, private_too: bool = False) -> bool:
    """Return whether a URL may be called, also at a private host with ``private_too``.

    Host names are not resolved here.
    """
    if not url.isprintable() or not url.isascii() or " " in url:
        return False
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        _ = parts.port  # raises if the port is not a number
    except ValueError:
        return False
    if parts.scheme.lower() != "https" or not host:
        return False
    if private_too:
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        name = host.rstrip(".")
        return not (name == "localhost" or name.endswith((".localhost", ".local", ".internal")))
    return is_public_address(host)


def is_public_address(text: str) -> bool:
    """Return whether an IP address is reachable on the public internet."""
    return ipaddress.ip_address(text.partition("%")[0]).is_global


def _whole_text(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=True).encode()).hexdigest()
