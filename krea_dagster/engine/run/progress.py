"""How far a run is, as one frozen value: what a progress bar or a log line shows."""

from __future__ import annotations

from dataclasses import dataclass, fields

from krea_dagster.engine.frozen import changed
from krea_dagster.engine.record import Record
from krea_dagster.engine.states import State

#: States that end in this run without an image.
_WITHOUT_IMAGE = frozenset({State.FAILED, State.REFUSED, State.EXPIRED})


@dataclass(frozen=True)
class Progress:
    """Counts of images asked for; an image that two rows ask for counts twice.

    ``reused`` were stored before the run began, ``delivered`` were stored by it, ``failed``
    ended without an image, ``left`` are unfinished and wait for a later run or a person.
    ``in_flight`` are at the server. ``charged_units`` is what this run's images cost, in
    1/10,000 credits, as far as it is settled.
    """

    total: int
    reused: int = 0
    delivered: int = 0
    failed: int = 0
    left: int = 0
    in_flight: int = 0
    charged_units: int = 0

    @property
    def ended(self) -> int:
        """Images for which this run has nothing left to do."""
        return self.reused + self.delivered + self.failed + self.left

    def __add__(self, other: Progress) -> Progress:
        """Two runs together."""
        return Progress(
            *(getattr(self, item.name) + getattr(other, item.name) for item in fields(self))
        )

    def wanted(self, rows: int) -> Progress:
        """With more images that are asked for."""
        return changed(self, total=self.total + rows)

    def found_finished(self, record: Record, rows: int) -> Progress:
        """With a request that had come to its end before the run began."""
        if record.state is State.STORED:
            return changed(self, reused=self.reused + rows)
        return self.finished(record, rows)

    def left_behind(self, rows: int) -> Progress:
        """With one more request that this run leaves to a later one."""
        return changed(self, left=self.left + rows)

    def finished(self, record: Record, rows: int, *, left: bool = False) -> Progress:
        """With one more request at its end in this run."""
        if record.state is State.STORED:
            return changed(self, delivered=self.delivered + rows)
        if record.state in _WITHOUT_IMAGE and not left:
            return changed(self, failed=self.failed + rows)
        return changed(self, left=self.left + rows)
