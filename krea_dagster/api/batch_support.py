"""Whether the batch endpoint is used to read tasks. Pure: the time is an argument.

The endpoint is undocumented, so it may be missing, and may come and go. While it is not used, tasks
are read singly, which takes a little longer and misses no paid task.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

#: Unusable answers in a row after which the endpoint is not used for a while.
BATCH_TRIES: Final = 3
#: The first pause. It doubles each time until a batch is answered.
OFF_S: Final = 60.0
OFF_MAX_S: Final = 600.0


@dataclass(frozen=True)
class BatchSupport:
    """What is known about the endpoint. ``unusable`` counts unusable answers in a row."""

    works: bool = False
    unusable: int = 0
    off_until_s: float | None = None
    off_s: float = OFF_S

    def supported(self, now_s: float) -> bool | None:
        """Return True if it has answered, False in a pause, else None: untried."""
        if self.off_until_s is not None and now_s < self.off_until_s:
            return False
        return True if self.works else None

    def answered(self) -> BatchSupport:
        """Return the state after a usable answer."""
        return BatchSupport(works=True)

    def missing(self, now_s: float) -> BatchSupport:
        """Return the state after "no such endpoint". Simultaneous answers count once."""
        if self.supported(now_s) is False:
            return self
        return replace(
            self, works=False, off_until_s=now_s + self.off_s, off_s=min(2 * self.off_s, OFF_MAX_S)
        )

    def not_answered(self, now_s: float) -> BatchSupport:
        """Return the state after an unusable answer. The first one after a pause starts another."""
        if self.supported(now_s) is False:
            return self
        counted = replace(self, unusable=self.unusable + 1)
        return counted.missing(now_s) if counted.unusable >= BATCH_TRIES else counted
