"""What a person may decide about a purchase whose outcome is unknown. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, TypeAlias

from krea_dagster.errors import ConfigError

_TASK_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")


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
        case ("task", ":", task_id) if _TASK_ID.fullmatch(task_id):
            return HasTask(task_id)
    raise ConfigError(f"{text!r} is no decision; use replay, not-charged, lost or task:ID")
