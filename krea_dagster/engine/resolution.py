"""Decisions about a purchase whose outcome is unknown. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, TypeAlias

from krea_dagster.engine.record import Record
from krea_dagster.errors import ConfigError
from krea_dagster.models import Task, is_task_id

#: How far the clocks of EvoLink and of this machine may differ.
_CLOCKS: Final = timedelta(minutes=2)


@dataclass(frozen=True)
class SendAgain:
    """Repeat the POST under the same Idempotency-Key, at any age."""

    def __str__(self) -> str:
        return "replay"


@dataclass(frozen=True)
class NotBought:
    """It was not charged: buy it as if it had never been sent."""

    def __str__(self) -> str:
        return "not-charged"


@dataclass(frozen=True)
class Lost:
    """It was charged, and its task cannot be found."""

    def __str__(self) -> str:
        return "lost"


@dataclass(frozen=True)
class HasTask:
    """It was charged, and this is its task in the account's task list."""

    task_id: str

    def __str__(self) -> str:
        return f"task:{self.task_id}"


Resolution: TypeAlias = SendAgain | NotBought | Lost | HasTask


def parse_resolution(text: str) -> Resolution:
    """Parse ``replay``, ``not-charged``, ``lost`` or ``task:ID``. Raises ConfigError."""
    match text.partition(":"):
        case ("replay", "", ""):
            return SendAgain()
        case ("not-charged", "", ""):
            return NotBought()
        case ("lost", "", ""):
            return Lost()
        case ("task", ":", task_id) if is_task_id(task_id):
            return HasTask(task_id)
    raise ConfigError(f"unknown decision {text!r}; use replay, not-charged, lost or task:ID")


@dataclass(frozen=True)
class Claim:
    """The task that a callback names for a request, and when it first came. Not verified."""

    task_id: str
    first_at: datetime


def why_not_taken(claim: Claim, record: Record, task: Task) -> str | None:
    """Return why a claimed task cannot be that of a purchase, None if it can.

    ``task`` is the claimed one, read from EvoLink. Anyone who knows an address can claim another
    task of the same account, so it must be completed, and its time must fit: created after the
    purchase was sent, and before the first callback.
    """
    if task.status != "completed":
        # A task that fails would be used as proof that the purchase cost nothing.
        return f"it is {task.status}, which does not show whether it is the right one"
    if task.created_at is None or record.sent_at is None:
        return "its time of creation is not known"
    if task.created_at < record.sent_at - _CLOCKS:
        return "it is older than the purchase"
    if task.created_at > claim.first_at + _CLOCKS:
        return "it is younger than the callback"
    return None
