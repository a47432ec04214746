"""The faults that the emulator can be told to produce. They are listed in ``faults.csv``.

A fault belongs to one kind of request and is chosen when such a request arrives:

``create``
    ``POST /v1/images/generations``. Those with ``after`` strike once the task exists.
``task``
    Chosen when a task is created, and kept with it.
``read``, ``batch``, ``list``, ``credits``
    The calls that only read. The names begin with the kind: ``read_429``.
``file``
    A ``GET`` of an image.
``callback``
    Chosen when a task with a ``callback_url`` is created that will end, and kept with it.

There are three ways to request a fault: scripted for the next requests of its kind (``n`` of
them, optionally only for prompts that contain a text), at a rate, or by a marker in the prompt:
``[emulator: NAME]``, ``[emulator: NAME ARG]``, and either with ``once`` at the end. ``once`` means
the first task for the same request (task and callback faults), or the first fetch of the image
(file faults). Two short forms exist: ``[emulator: refuse]`` is ``content_refused``, and
``[emulator: fail CODE]`` is ``fail``. A marker may name a task, callback or file fault, or
``content_refused``.

``ARG`` refines a fault: seconds, a code, a count. Each fault has a default.

A plain ``http:`` link is not a fault, because every link of this emulator is one.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

RequestKind = Literal["create", "task", "read", "batch", "list", "credits", "file", "callback"]


@dataclass(frozen=True)
class Fault:
    """One thing that can go wrong.

    ``effect`` selects what is done, ``status`` is the HTTP status of effects that respond with
    an error, ``arg`` the default argument (None: the fault takes none). ``after`` means that a
    create fault strikes once the task exists.
    """

    name: str
    kind: RequestKind
    effect: str
    status: int
    arg: str | None
    after: bool
    description: str


@dataclass(frozen=True)
class ChosenFault:
    """A fault that strikes now, with its argument as text ("" if it takes none).

    ``once`` is true only for a prompt marker with ``once``.
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
    """The fault does not exist, or does not take this argument."""


def _read_faults() -> dict[str, Fault]:
    text = Path(__file__).with_name("faults.csv").read_text(encoding="utf-8")
    faults: dict[str, Fault] = {}
    for row in csv.DictReader(text.splitlines()):
        fields: dict[str, Any] = {
            **row,
            "status": int(row["status"] or 0),
            "arg": row["arg"] or None,
            "after": row["after"] == "after",
        }
        faults[row["name"]] = Fault(**fields)
    return faults


#: Every fault by its name.
FAULTS: Final[Mapping[str, Fault]] = MappingProxyType(_read_faults())

#: What a forged callback can claim.
FORGERIES: Final = ("status", "task", "early")

#: A setting that is written like a fault: 402 for what goes beyond this many credits.
QUOTA: Final = "insufficient_quota_after"

_NUMBER_EFFECTS: Final = frozenset(
    {"price", "delay", "undecided", "slow", "too_busy", "too_busy_date", "call_late"}
)
_COUNT_EFFECTS: Final = frozenset({"no_results", "integer_code"})


def parse_fault(name: str, arg: str | float | None = None, *, once: bool = False) -> ChosenFault:
    """Return the fault ``name`` with its argument checked. Raises UnknownFaultError."""
    fault = FAULTS.get(name)
    if fault is None:
        raise UnknownFaultError(f"unknown fault {name!r}")
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
    """Return the faults that a prompt requests. Raises UnknownFaultError for a bad marker."""
    found = []
    for name, arg, once in _MARKER.findall(prompt):
        real = "content_refused" if name == "refuse" else name
        chosen = parse_fault(real, arg or None, once=bool(once))
        if chosen.fault.kind not in ("task", "file", "callback") and real != "content_refused":
            raise UnknownFaultError(f"a prompt cannot request the fault {name!r}")
        found.append(chosen)
    return found


def of_kind(chosen: Iterable[ChosenFault], kind: RequestKind) -> list[ChosenFault]:
    """Return those of one kind, in order."""
    return [one for one in chosen if one.fault.kind == kind]


# -- options of the command line --------------------------------------------------------------


@dataclass(frozen=True)
class FaultOption:
    """One fault that a command line requests: at a rate, or for the next ``n`` requests.

    ``rate`` is from 0 to 1, None if ``n`` counts. For the name ``insufficient_quota_after``
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
    parse_fault(name, arg if colon else None)
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
