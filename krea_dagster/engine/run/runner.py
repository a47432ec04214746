"""Buys, fetches and verifies requests: what a run is given, and how it ended."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import partial

from krea_dagster.engine.budget import Caps
from krea_dagster.engine.clock import Clock, SystemClock
from krea_dagster.engine.journal.journal import NO_CAPS, Journal
from krea_dagster.engine.journal.saved_answers import write_saved_answers
from krea_dagster.engine.policy import DONE, Policy, Trail, next_action
from krea_dagster.engine.record import Record
from krea_dagster.engine.resolution import Resolution
from krea_dagster.engine.run.latency import Latencies
from krea_dagster.engine.run.outages import Outages, Part
from krea_dagster.engine.run.progress import Progress
from krea_dagster.engine.run.scheduler import Session
from krea_dagster.engine.run.submit import Client
from krea_dagster.engine.run.worklist import Planned, Wanted
from krea_dagster.engine.states import State
from krea_dagster.engine.storage.images import ImageStore
from krea_dagster.engine.threads import InThread, in_thread
from krea_dagster.errors import (
    AccountStopped,
    ApiError,
    JournalUnavailable,
    KreaError,
    RunStopped,
    StorageUnavailable,
)

__all__ = ["RunReport", "Runner", "Wanted"]


@dataclass(frozen=True)
class Root:
    """The storage root of a run, as its journal knows it.

    ``root_id`` is empty where the journal is not to keep which files lie there. ``adopts``: files
    that the journal did not enter are looked for behind a URL too. ``elsewhere`` gives the other
    roots that hold these images.
    """

    root_id: str = ""
    adopts: bool = False
    elsewhere: Callable[[Sequence[str]], Mapping[str, Sequence[str]]] = lambda _: {}


@dataclass(frozen=True)
class RunReport:
    """How a run ended.

    ``new`` counts requests that the journal had never seen. ``left`` says, by request key, why
    a request is not finished although the run is, of a thousand at most; ``left_reasons`` counts
    them all, and ``at_stake_units`` is what they may have cost. ``stopped`` is what ended the
    buying, where one did; ``caps_reached`` what the caps said, ``dearer``
    which prices were above the expected. ``account_error`` is why the
    account's credits could not be read beside, where they could not. ``posts`` counts create calls,
    ``turned_away`` those answered by 429, ``asked`` the tasks asked about, and ``reads`` the
    calls which that took. ``missed_callbacks`` counts the tasks that ended and that nobody called
    about in good time. ``waited``: whether it was to wait for what it submitted;
    ``left_for_room`` are the requests that it then left because the server took no more.
    ``taken_up`` says what became of answers that earlier runs could not write, ``same_files`` which
    requests got one and the same file.
    """

    new: int
    progress: Progress
    seconds: float
    left: Mapping[str, str] = field(default_factory=dict)
    left_reasons: Mapping[str, int] = field(default_factory=dict)
    at_stake_units: int = 0
    stopped: AccountStopped | RunStopped | None = None
    caps_reached: Sequence[str] = ()
    dearer: Sequence[str] = ()
    account_error: str | None = None
    posts: int = 0
    turned_away: int = 0
    asked: int = 0
    reads: int = 0
    missed_callbacks: int = 0
    waited: bool = True
    left_for_room: int = 0
    taken_up: Sequence[str] = ()
    same_files: Sequence[str] = ()


@dataclass(frozen=True)
class Runner:
    """Buys, fetches and verifies requests, and returns once nothing more can be done for them.

    ``root`` is the storage root as the journal knows it, ``table_id`` the prompt table that asks,
    and ``api_key`` the fingerprint of the key that buys. ``connect`` opens a client; it is not
    called where there is nothing to do. ``run_id`` is written with every purchase.
    ``max_in_flight`` bounds the tasks at the server, and ``max_per_s`` the submissions a second,
    where the account's limits are known. ``caps`` bound what it commits, and ``launch`` names the
    runs that stop together where the account stops one (by default this run alone). With ``buying``
    false it only asks and fetches. ``resolutions`` are a person's decisions about unknown outcomes,
    by request key. ``callback_url_of`` gives, for a request key, the address at which a receiver
    that writes into this journal is told of the task's end; without it tasks are asked about when
    they have probably ended. ``randomness`` jitters the pauses. ``latencies`` is what is known
    before the run. ``on_progress`` is called on the event loop whenever something changed.
    ``in_thread`` makes the calls that block.
    """

    connect: Callable[[], AbstractAsyncContextManager[Client]]
    journal: Journal
    images: ImageStore
    run_id: str
    policy: Policy = field(default_factory=Policy)
    max_in_flight: int = 64
    max_per_s: float | None = None
    caps: Caps = NO_CAPS
    launch: str = ""
    root: Root = field(default_factory=Root)
    table_id: str = ""
    api_key: str | None = None
    buying: bool = True
    resolutions: Mapping[str, Resolution] = field(default_factory=dict)
    callback_url_of: Callable[[str], str] | None = None
    clock: Clock = field(default_factory=SystemClock)
    randomness: random.Random = field(default_factory=random.Random)
    latencies: Latencies = field(default_factory=Latencies)
    on_progress: Callable[[Progress], None] = lambda _: None
    in_thread: InThread = in_thread

    async def run(self, wanted: Iterable[Wanted], *, reused_rows: int = 0) -> RunReport:
        """Carry all requests as far as they go.

        ``wanted`` is read once, as a stream, in a thread. ``reused_rows`` counts rows whose
        images are known to be there, and which are not among ``wanted``.

        Raises JournalError where the journal cannot be read or written, and StorageError where
        an image cannot be stored: then nothing more is bought. On cancellation nothing more is
        submitted, a POST under way is given a few seconds, and what is known is written; the
        next run goes on from there.
        """
        started_s = self.clock.monotonic()
        outages = Outages(
            self.clock,
            patience_s=self.policy.outage_patience_s,
            wait_scale=self.policy.wait_scale,
        )
        outages.probes[Part.JOURNAL] = partial(self._said_by, self.journal.ping)
        outages.probes[Part.STORAGE] = partial(self._said_by, self.images.storage.ping)
        in_thread = outages.patient(self.in_thread)
        planned = await Planned.enter(
            wanted,
            self.journal,
            in_thread=in_thread,
            run_id=self.run_id,
            at=self.clock.now(),
            table_id=self.table_id,
            is_unfinished=self._unfinished,
            reused_rows=reused_rows,
        )
        # Once all requests are entered, also those that a restored journal had forgotten.
        taken_up = await in_thread(
            partial(
                write_saved_answers,
                self.journal,
                self.images.storage,
                run_id=self.run_id,
                at=self.clock.now(),
            )
        )
        if not planned.unfinished:
            self.on_progress(planned.progress)
            seconds = self.clock.monotonic() - started_s
            return RunReport(
                planned.new,
                planned.progress,
                seconds,
                waited=self.policy.wait,
                taken_up=taken_up,
            )
        async with self.connect() as client:
            outages.probes[Part.API] = partial(_said_by_api, client)
            session = Session(self, client, planned, outages)
            await session.carry_all()
        buying, asking, asker = session.buying, session.asking, session.asker
        return RunReport(
            new=planned.new,
            progress=session.progress_now(),
            seconds=self.clock.monotonic() - started_s,
            left=session.left,
            left_reasons=session.left_reasons,
            at_stake_units=session.at_stake_units,
            stopped=buying.stopped,
            caps_reached=tuple(buying.caps_reached.values()),
            dearer=tuple(buying.dearer.values()),
            account_error=session.account_error,
            posts=buying.posts,
            turned_away=buying.turned_away,
            asked=asker.asked,
            reads=asker.calls,
            missed_callbacks=asking.missed_callbacks,
            waited=self.policy.wait,
            left_for_room=session.left_for_room,
            taken_up=taken_up,
            same_files=session.same_files,
        )

    async def _said_by(self, ping: Callable[[], object]) -> KreaError | None:
        """Return why a part does not answer, None where it does, or fails for another reason."""
        try:
            await self.in_thread(ping)
        except (JournalUnavailable, StorageUnavailable) as error:
            return error
        except (KreaError, OSError):
            return None
        return None

    def _unfinished(self, record: Record) -> bool:
        if record.state is State.STORED:
            return self.file_is_missing(record)
        if self.images.find(record, adopts=self.root.adopts) is not None:
            return True
        action = next_action(record, Trail(), self.clock.now(), self.policy, buying=True)
        return action != DONE

    def file_is_missing(self, record: Record) -> bool:
        """Whether a stored request's file is gone or has another size."""
        return record.image is None or not self.images.holds(record.image)


async def _said_by_api(client: Client) -> KreaError | None:
    """Return why the API does not answer, None where it does, also with an error."""
    try:
        await client.credits()
    except ApiError as error:
        return error if error.may_be_away else None
    return None
