"""The emulator's records: an account, a task, and what a create call returned. Pure.

Times are unix seconds of the world's clock. Money is in units of 1/10,000 credit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from krea_dagster.emulator.faults import ChosenFault, parse_fault


@dataclass(frozen=True)
class Account:
    """The balance of an account. All amounts in units."""

    id: int
    granted: int
    reserved: int
    charged: int
    returned: int

    @property
    def held(self) -> int:
        """Units reserved for tasks that have not ended."""
        return self.reserved - self.charged - self.returned

    @property
    def remaining(self) -> int:
        """Units that can still be spent: the balance falls when credits are reserved."""
        return self.granted - self.charged - self.held


#: The columns of table ``tasks`` that make an EmulatedTask, in the order of its fields.
TASK_COLUMNS: Final = (
    "n, task_id, account, prompt, size, quality, used_seed, reserved, created_at, started_at, "
    "ready_at, ends_as, error_code, reads_at_end, fetched, file_sha256, faults"
)


@dataclass(frozen=True)
class EmulatedTask:
    """One task. ``ready_at`` is when it ends, None if it never does."""

    n: int
    task_id: str
    account: int
    prompt: str
    size: str
    quality: str
    used_seed: int
    reserved: int
    created_at: float
    started_at: float
    ready_at: float | None
    ends_as: str
    error_code: str | None
    reads_at_end: int
    fetched: int
    file_sha256: str | None
    faults: tuple[ChosenFault, ...]

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> EmulatedTask:
        """Return the task of a row of ``TASK_COLUMNS``."""
        named = json.loads(row[-1]) if row[-1] != "[]" else ()
        return cls(*[*row[:-1], tuple(parse_fault(name, arg or None) for name, arg in named)])

    def status(self, now: float) -> str:
        """Return pending, processing, completed, failed or cancelled."""
        if self.ready_at is not None and now >= self.ready_at:
            return self.ends_as
        return "pending" if now < self.started_at else "processing"

    def progress(self, now: float) -> int:
        """Return 0 to 100; 100 only when completed, and 0 when it failed, as documented."""
        status = self.status(now)
        if status == "completed":
            return 100
        if status != "processing":
            return 0
        end = self.started_at + 60 if self.ready_at is None else self.ready_at
        share = (now - self.created_at) / max(end - self.created_at, 1e-9)
        return max(1, min(99, int(100 * share)))

    def fault(self, effect: str) -> ChosenFault | None:
        """Return the task's fault with this effect, if it has one."""
        return next((one for one in self.faults if one.fault.effect == effect), None)


@dataclass(frozen=True)
class CreateResult:
    """The task that a create call returned; ``replayed`` if it existed before."""

    task: EmulatedTask
    replayed: bool
