"""Whether many tasks are read at once. Pure: the time is handed in.

The endpoint is undocumented, so that it may be missing, come, and go. While it is not used, tasks
are read singly: that costs a little more, and never misses a paid task.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

#: Unusable batch answers in a row that end the use of the endpoint for a while.
BATCH_TRIES: Final = 3
#: How long it is not used at first. The pause doubles each time until a batch is answered.
OFF_S: Final = 60.0
OFF_MAX_S: Final = 600.0


@dataclass(frozen=True)
class BatchSupport:
    """What is known of the endpoint. ``unusable`` counts unusable answers in a row."""

    works: bool = False
    unusable: int = 0
    off_until_s: float | None = None
    off_s: float = OFF_S

    def supported(self, now_s: float) -> bool | None:
        """True once it has answered, False for a while after it did not, else None: untried."""
        if self.off_until_s is not None and now_s < self.off_until_s:
            return False
        return True if self.works else None

    def answered(self) -> BatchSupport:
        """After a usable answer."""
        return BatchSupport(works=True)

    def missing(self, now_s: float) -> BatchSupport:
        """After an answer that says that it is not there. Answers that came together count once."""
        if self.supported(now_s) is False:
            return self
        return replace(
            self,
            works=False,
            off_until_s=now_s + self.off_s,
            off_s=min(2 * self.off_s, OFF_MAX_S),
        )

    def not_answered(self, now_s: float) -> BatchSupport:
        """After an unusable answer. The first one after a pause begins the next pause."""
        if self.supported(now_s) is False:
            return self
        counted = replace(self, unusable=self.unusable + 1)
        return counted.missing(now_s) if counted.unusable >= BATCH_TRIES else counted
