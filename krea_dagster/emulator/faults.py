"""What the emulator can be told to do wrong, as data.

A fault belongs to one kind of request and is chosen when such a request arrives:

``create``
    ``POST /v1/images/generations``. Those with ``after`` strike when the task exists already.
``task``
    Chosen when a task is created, and kept with it for good.
``read``, ``batch``, ``list``, ``credits``
    The questions. The names begin with the kind: ``read_429``.
``file``
    A ``GET`` of a picture.
``callback``
    Chosen when a task is created that names a ``callback_url`` and will end, and kept with it.

A fault is asked for in one of three ways: scripted for the next request of its kind (once or
``n`` times, optionally only for prompts that hold a given text), at a rate, or by a marker in
the prompt itself, for a table that shows faults: ``[emulator: NAME]``, ``[emulator: NAME ARG]``
and either with ``once`` at the end. ``once`` means the first task for the same request (task
and callback faults), or the first fetch of the picture (file faults). Two short forms exist:
``[emulator: refuse]`` is ``content_refused``, and ``[emulator: fail CODE]`` is ``fail``. A
marker may name a task fault, a callback fault, a file fault, or ``content_refused``.

``ARG`` refines a fault: seconds, a code, a count. Each fault has a default.

Not here: a fault for a plain ``http:`` link, because every link of this emulator is one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

RequestKind = Literal["create", "task", "read", "batch", "list", "credits", "file", "callback"]

READ_KINDS: Final[tuple[RequestKind, ...]] = ("read", "batch", "list", "credits", "file")
ACCOUNT_READ_KINDS: Final[tuple[RequestKind, ...]] = ("read", "credits")


@dataclass(frozen=True)
class Fault:
    """One thing that can go wrong.

    ``effect`` selects what is done, ``status`` is the HTTP status of effects that answer with
    an error, ``arg`` the default argument (None: the fault takes none), ``after`` says that a
    create fault strikes after the task exists.
    """

    name: str
    kind: RequestKind
    effect: str
    says: str
    status: int = 0
    arg: str | None = None
    after: bool = False


@dataclass(frozen=True)
class ChosenFault:
    """A fault that strikes now, with its argument as text ("" where it takes none).

    ``once`` is true only for a prompt marker that says so.
    """

    fault: Fault
    arg: str
    once: bool = False

    @property
    def seconds(self) -> float:
        """The argument as a number of seconds."""
        return float(self.arg)

    @property
    def count(self) -> int:
        """The argument as a count."""
        return int(self.arg)


class UnknownFaultError(ValueError):
    """A fault was asked for that does not exist, or with an argument that it cannot take."""


# What can happen to any request, whatever it asks: (suffix, effect, status, argument, sentence).
_TRANSPORT: Final = (
    ("drop", "drop", 0, None, "the connection is closed without a byte of answer"),
    ("reset", "reset", 0, None, "the connection is reset without a byte of answer"),
    ("garbage", "garbage", 0, None, "the answer is not HTTP"),
    ("500", "error", 500, None, "500 as documented"),
    ("502_html", "html", 502, None, "502 with a page of HTML"),
    ("503", "html", 503, None, "503 with a page of HTML"),
    ("524_html", "html", 524, None, "524 with a page of HTML"),
)
_TOO_BUSY: Final = (
    ("429", "too_busy", 429, "1", "429 with Retry-After; ARG is its seconds"),
    ("429_date", "too_busy_date", 429, "1", "429 with Retry-After as a date, ARG seconds away"),
    ("429_no_retry_after", "too_busy_bare", 429, None, "429 without Retry-After"),
    ("429_empty", "empty", 429, None, "429 with an empty body"),
)
_QUESTION: Final = (
    *_TRANSPORT,
    *_TOO_BUSY,
    ("delay", "delay", 0, "5", "the answer comes ARG seconds late"),
    ("html_200", "html", 200, None, "a page of HTML with status 200"),
)


def _create_faults() -> Iterator[Fault]:
    for suffix, effect, status, arg, says in _TRANSPORT:
        wire = status == 0
        before = f"{suffix}_before_create" if wire else suffix
        yield Fault(before, "create", effect, f"{says}; no task is created", status, arg)
        after = f"{suffix}_after_create"
        yield Fault(after, "create", effect, f"{says}; the task exists", status, arg, after=True)
    for suffix, effect, status, arg, says in _TOO_BUSY:
        yield Fault(suffix, "create", effect, f"{says}; no task is created", status, arg)
    yield Fault(
        "capacity_400",
        "create",
        "code",
        "a 400 that is a lack of capacity; ARG is its code",
        400,
        "no_available_channel",
    )
    yield Fault(
        "integer_code",
        "create",
        "integer_code",
        "an error whose code is a number; ARG is the HTTP status and the code",
        0,
        "503",
    )
    yield Fault(
        "upper_case_code",
        "create",
        "upper_case_code",
        "a 400 whose code is in upper case and whose type is empty; ARG is the code",
        400,
        "INVALID_REQUEST",
    )
    yield Fault("unauthorized", "create", "unauthorized", "401: the key is refused", 401)
    yield Fault(
        "insufficient_quota",
        "create",
        "out_of_credits",
        "402; ARG is the code, as for a key's own limit",
        402,
        "insufficient_quota",
    )
    yield Fault(
        "model_denied",
        "create",
        "denied",
        "403; ARG is the code, such as ip_restricted or user_disabled",
        403,
        "model_access_denied",
    )
    yield Fault(
        "content_refused",
        "create",
        "code",
        "a 400 that is moderation at submit; ARG is its code",
        400,
        "content_policy_violation",
    )
    yield Fault("too_large_413", "create", "error", "413: the body is too large", 413)
    yield Fault("unsupported_415", "create", "error", "415: the body's type is refused", 415)
    yield Fault("redirect_create", "create", "redirect", "307 to another path; no task", 307)
    yield Fault(
        "delay_create",
        "create",
        "delay",
        "the task exists at once, its answer comes ARG seconds later; a repeat with the same "
        "key meanwhile is told that the first is undecided",
        arg="5",
        after=True,
    )
    yield Fault("no_id", "create", "no_id", "200 without an id; the task exists", after=True)
    yield Fault(
        "repeated_id",
        "create",
        "repeated_id",
        "200 with the id of the account's first task; the new task exists",
        after=True,
    )
    yield Fault(
        "html_200", "create", "html", "200 with a page of HTML; the task exists", 200, after=True
    )
    yield Fault(
        "paid_outcome_unknown",
        "create",
        "undecided",
        "the task exists, the connection is closed, and for ARG seconds a repeat with the same "
        "key gets 409 paid_outcome_unknown",
        arg="60",
        after=True,
    )
    yield Fault(
        "idempotency_conflict",
        "create",
        "conflict",
        "409: the key of a first submission counts as used for another body, for good; no task is "
        "created, and a key that has created one is not struck",
        409,
    )
    yield Fault(
        "ignore_idempotency",
        "create",
        "ignore_idempotency",
        "the Idempotency-Key of this request is ignored: a repeat is bought again",
        after=True,
    )


_TASK: Final = (
    Fault("fail", "task", "fail", "the task fails; ARG is the code", arg="service_error"),
    Fault(
        "fail_bare",
        "task",
        "fail",
        "the task fails, answered as in the documented example: without created, type, "
        "task_info and error.type; ARG is the code",
        arg="content_policy_violation",
    ),
    Fault(
        "unknown_error_code",
        "task",
        "fail",
        "the task fails with a code that no documentation names; ARG is the code",
        arg="engine_misaligned",
    ),
    Fault("cancelled", "task", "cancel", "the task ends as cancelled; its credits return"),
    Fault("stuck", "task", "stuck", "the task never ends; its credits stay reserved"),
    Fault("slow_task", "task", "slow", "the task takes ARG seconds longer", arg="30"),
    Fault(
        "no_results",
        "task",
        "no_results",
        "completed, but without results, for the first ARG reads",
        arg="1",
    ),
    Fault(
        "unknown_status",
        "task",
        "status",
        "the status is ARG instead of processing; the task ends on time",
        arg="queued",
    ),
    Fault(
        "unknown_final_status",
        "task",
        "final_status",
        "the task never ends, and its status is ARG for good",
        arg="archived",
    ),
    Fault("price", "task", "price", "the task reserves and costs ARG credits", arg="3"),
    Fault("vanished", "task", "vanished", "no read knows the task; it is charged on time"),
    Fault("with_usage", "task", "usage", "reads hold usage with credits_used, as some do"),
    Fault(
        "private_link",
        "task",
        "link",
        "the result link points to a private address",
        arg="http://10.0.0.1/file.png",
    ),
    Fault(
        "file_link",
        "task",
        "link",
        "the result link points to a file of the reader's machine",
        arg="file:///etc/hostname",
    ),
)

_FILE: Final = (
    Fault("file_403", "file", "error", "403, as for an unknown User-Agent", 403),
    Fault("file_404", "file", "error", "404: the picture is gone", 404),
    Fault("expired_link", "file", "expired", "the link is answered as expired", 403),
    Fault("redirect", "file", "redirect", "302 to a good link", 302),
    Fault(
        "redirect_private",
        "file",
        "redirect_to",
        "302 to a private address; ARG is the address",
        302,
        "http://10.0.0.1/file.png",
    ),
    Fault(
        "redirect_file",
        "file",
        "redirect_to",
        "302 to a file of the reader's machine; ARG is the address",
        302,
        "file:///etc/hostname",
    ),
    Fault("redirect_loop", "file", "redirect_loop", "302 to the same link, for ever", 302),
    Fault("truncated", "file", "truncated", "the length is whole, the connection ends early"),
    Fault("cut_file", "file", "cut", "the file is cut, and the length agrees with the rest"),
    Fault("empty_file", "file", "nothing", "200 without a byte"),
    Fault("jpeg_as_png", "file", "jpeg", "the right picture as JPEG, named and typed as PNG"),
    Fault("octet_stream", "file", "octet_stream", "the right file, typed as octet-stream"),
    Fault("black", "file", "black", "a picture of the right size that is all black"),
    Fault("wrong_dimensions", "file", "half", "a picture of half the size"),
    Fault("endless", "file", "endless", "a body that begins like a PNG and never ends"),
    Fault("bomb", "file", "bomb", "a small PNG that declares 60,000 × 60,000 pixels"),
    Fault("same_file", "file", "same", "one and the same picture, whatever was asked for"),
    Fault("not_an_image", "file", "noise", "random bytes, typed as PNG"),
)


#: What a forged callback can claim.
FORGERIES: Final = ("status", "task", "early")

_CALLBACK: Final = (
    Fault(
        "callback_late",
        "callback",
        "call_late",
        "the callback comes ARG seconds after the task's end",
        arg="5",
    ),
    Fault("callback_doubled", "callback", "call_twice", "the callback comes twice"),
    Fault("callback_missing", "callback", "call_never", "the callback never comes"),
    Fault(
        "callback_forged",
        "callback",
        "call_forged",
        "the callback lies; ARG is how: status (another end than the task's), task (another "
        "task's id), or early (a completion at once, and the true callback in its time)",
        arg="status",
    ),
)


def _all_faults() -> Iterator[Fault]:
    yield from _create_faults()
    yield from _TASK
    for kind in READ_KINDS:
        for suffix, effect, status, arg, says in _QUESTION:
            yield Fault(f"{kind}_{suffix}", kind, effect, says, status, arg)
    for kind in ACCOUNT_READ_KINDS:
        yield Fault(f"{kind}_401", kind, "unauthorized", "401: the key is refused", 401)
        yield Fault(
            f"{kind}_402", kind, "out_of_credits", "402; ARG is the code", 402, "quota_exceeded"
        )
    yield Fault("read_403", "read", "denied", "403; ARG is the code", 403, "permission_denied")
    yield Fault("read_404", "read", "not_found", "404: the task is not known", 404)
    yield Fault("no_batch", "batch", "no_route", "404: the endpoint does not exist", 404)
    yield Fault("batch_failed", "batch", "all_failed", "every task is said to have failed")
    yield Fault("no_list", "list", "no_route", "404: the endpoint does not exist", 404)
    yield Fault("credits_no_success", "credits", "no_success", "200 with success false", 200)
    yield from _FILE
    yield from _CALLBACK


#: Every fault by its name.
FAULTS: Final[Mapping[str, Fault]] = MappingProxyType({f.name: f for f in _all_faults()})

#: The setting that is written like a fault: 402 for all that goes beyond so many credits.
QUOTA: Final = "insufficient_quota_after"

_NUMBER_EFFECTS: Final = {
    "price",
    "delay",
    "undecided",
    "slow",
    "too_busy",
    "too_busy_date",
    "call_late",
}
_COUNT_EFFECTS: Final = {"no_results", "integer_code"}


def choose(name: str, arg: str | float | None = None, *, once: bool = False) -> ChosenFault:
    """Return the fault ``name`` with its argument checked. Raises UnknownFaultError."""
    fault = FAULTS.get(name)
    if fault is None:
        raise UnknownFaultError(f"there is no fault {name!r}")
    if arg is None:
        return ChosenFault(fault, fault.arg or "", once)
    if fault.arg is None:
        raise UnknownFaultError(f"the fault {name!r} takes no argument")
    text = str(arg)
    try:
        if fault.effect in _NUMBER_EFFECTS:
            float(text)
        elif fault.effect in _COUNT_EFFECTS:
            int(text)
        elif fault.effect == "call_forged":
            FORGERIES.index(text)
    except ValueError:
        raise UnknownFaultError(f"the fault {name!r} does not take {text!r}") from None
    return ChosenFault(fault, text, once)


# -- markers in prompts -----------------------------------------------------------------------

_MARKER: Final = re.compile(r"\[emulator:\s*([A-Za-z0-9_]+)(?:\s+([^\]\s]+))??(\s+once)?\s*\]")


def markers(prompt: str) -> list[ChosenFault]:
    """Return the faults that a prompt asks for. Raises UnknownFaultError for a bad marker."""
    found = []
    for name, arg, once in _MARKER.findall(prompt):
        real = "content_refused" if name == "refuse" else name
        chosen = choose(real, arg or None, once=bool(once))
        if chosen.fault.kind not in ("task", "file", "callback") and real != "content_refused":
            raise UnknownFaultError(f"a prompt cannot ask for the fault {name!r}")
        found.append(chosen)
    return found


def of_kind(chosen: Iterable[ChosenFault], kind: RequestKind) -> list[ChosenFault]:
    """Return those of one kind, in order."""
    return [one for one in chosen if one.fault.kind == kind]


# -- what a command line says -----------------------------------------------------------------


@dataclass(frozen=True)
class FaultOption:
    """One fault that was asked for from outside: at a rate, or ``n`` times from now on.

    ``rate`` is from 0 to 1, None where ``n`` counts. For the name ``insufficient_quota_after``
    ``arg`` holds the credits.
    """

    name: str
    rate: float | None = None
    n: int = 0
    arg: str | None = None


def parse_fault_option(text: str) -> FaultOption:
    """Read ``NAME=VALUE`` or ``NAME=VALUE:ARG``.

    A VALUE with a decimal point or a percent sign is a rate from 0 to 1 (or 0 % to 100 %), a
    whole number is a count of requests. ``insufficient_quota_after=CREDITS`` is a setting.
    Raises UnknownFaultError.
    """
    name, _, rest = text.partition("=")
    value, colon, arg = rest.partition(":")
    if name == QUOTA:
        _number(text, value)
        return FaultOption(name, arg=value)
    choose(name, arg if colon else None)
    given = arg if colon else None
    if value.isdigit():
        return FaultOption(name, n=int(value), arg=given)
    rate = _number(text, value[:-1]) / 100 if value.endswith("%") else _number(text, value)
    if not 0 <= rate <= 1:
        raise UnknownFaultError(f"{text!r}: a rate is from 0.0 to 1.0")
    return FaultOption(name, rate=rate, arg=given)


def _number(text: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise UnknownFaultError(f"{text!r} is not NAME=VALUE or NAME=VALUE:ARG") from None
