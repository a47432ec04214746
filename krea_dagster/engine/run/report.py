"""How far a run is, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from krea_dagster.engine.states import State
from krea_dagster.errors import AccountStopped, RunStopped
from krea_dagster.models import evolve

#: States that end in this run without an image.
_WITHOUT_IMAGE = frozenset({State.FAILED, State.REFUSED, State.EXPIRED})


@dataclass(frozen=True)
class Progress:
    """Counts of requested images; an image that two rows request counts twice.

    ``reused`` were stored before the run began, ``delivered`` were stored by it, ``failed`` ended
    without an image, ``left`` are unfinished and wait for a later run or a person. ``in_flight``
    are at the server. ``charged_units`` is what this run's images cost so far, in 1/10,000 credits.
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
        return self.plus(**vars(other))

    def plus(self, **counts: int) -> Progress:
        """Return the progress with these counts added."""
        return evolve(self, **{name: getattr(self, name) + n for name, n in counts.items()})


def count_of(state: State, *, left: bool = False) -> str:
    """Return the name of the count for a request that this run has ended with, or ``left``."""
    if state is State.STORED:
        return "delivered"
    return "failed" if state in _WITHOUT_IMAGE and not left else "left"


@dataclass(frozen=True)
class RunReport:
    """How a run ended.

    Attributes:
        new: Requests that the journal had never seen.
        progress: Final counts.
        seconds: Duration of the run.
        left: Why requests are unfinished, by request key; a thousand at most.
        left_reasons: The reasons of all of them, counted.
        at_stake_units: What the unfinished requests may have cost.
        stopped: What ended the buying, if anything did.
        caps_reached: One sentence for each cap or budget that was reached.
        price_increases: One sentence for each price above the expected one.
        account_error: Why the account's credits could not be read, or None.
        posts: Create calls.
        rate_limited: Create calls that were answered by 429.
        tasks_read: Reads of single tasks, also within batches.
        read_calls: Calls that these reads took.
        missed_callbacks: Tasks that ended without a callback in good time.
        waited: Whether the run was to wait for its tasks.
        left_for_room: Requests that a run which does not wait left, because the server took no
            more.
        recovered: What was done with answers that earlier runs could not write.
        same_files: One sentence for each file that several requests got.
    """

    new: int
    progress: Progress
    seconds: float
    left: Mapping[str, str] = field(default_factory=dict)
    left_reasons: Mapping[str, int] = field(default_factory=dict)
    at_stake_units: int = 0
    stopped: AccountStopped | RunStopped | None = None
    caps_reached: Sequence[str] = ()
    price_increases: Sequence[str] = ()
    account_error: str | None = None
    posts: int = 0
    rate_limited: int = 0
    tasks_read: int = 0
    read_calls: int = 0
    missed_callbacks: int = 0
    waited: bool = True
    left_for_room: int = 0
    recovered: Sequence[str] = ()
    same_files: Sequence[str] = ()
