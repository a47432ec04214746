"""What may be decided about a purchase whose outcome is unknown, and by whom. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, TypeAlias

from krea_dagster.engine.record import Record
from krea_dagster.errors import ConfigError
from krea_dagster.models import Task, is_task_id

#: By how much the clocks of EvoLink and of this machine may disagree.
_CLOCKS: Final = timedelta(minutes=2)


@dataclass(frozen=True)
class SendAgain:
    """Repeat the POST under the same Idempotency-Key, whatever its age."""

    def __str__(self) -> str:
        return "replay"


@dataclass(frozen=True)
class NotBought:
    """It was not charged: buy it as if it had never been sent."""

    def __str__(self) -> str:
        return "not-charged"


@dataclass(frozen=True)
class Lost:
    """It was charged, and its task cannot be found: paid and lost."""

    def __str__(self) -> str:
        return "lost"


@dataclass(frozen=True)
class HasTask:
    """It was charged, and this is its task, as the account's task list shows it."""

    task_id: str

    def __str__(self) -> str:
        return f"task:{self.task_id}"


Resolution: TypeAlias = SendAgain | NotBought | Lost | HasTask


def parse_resolution(text: str) -> Resolution:
    """Read ``replay``, ``not-charged``, ``lost`` or ``task:ID``. Raises ConfigError."""
    match text.partition(":"):
        case ("replay", "", ""):
            return SendAgain()
        case ("not-charged", "", ""):
            return NotBought()
        case ("lost", "", ""):
            return Lost()
        case ("task", ":", task_id) if is_task_id(task_id):
            return HasTask(task_id)
    raise ConfigError(f"{text!r} is no decision; use replay, not-charged, lost or task:ID")


@dataclass(frozen=True)
class Claim:
    """A callback about a request: the task that it named, and when it came first. Never a fact."""

    task_id: str
    first_at: datetime


def why_not_taken(claim: Claim, record: Record, task: Task) -> str | None:
    """Why a claimed task cannot be that of a purchase, None where it can.

    ``task`` is what EvoLink says of the claimed one. Whoever knows an address can claim another
    task of the same account, so it must be completed, and its time must fit: created once the
    purchase was sent, and before the first call.
    """
    if task.status != "completed":
        # A task that fails would be taken for proof that the purchase cost nothing.
        return f"it is {task.status}, so that nothing shows whether it is the one"
    if task.created_at is None or record.sent_at is None:
        return "EvoLink does not say when it was created"
    if task.created_at < record.sent_at - _CLOCKS:
        return "it is older than the purchase"
    if task.created_at > claim.first_at + _CLOCKS:
        return "it is younger than the callback"
    return None
