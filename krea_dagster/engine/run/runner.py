"""Buys, fetches and verifies requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from krea_dagster.engine.journal.saved_answers import write_saved_answers
from krea_dagster.engine.policy import DONE, RetryState, next_action
from krea_dagster.engine.record import Record
from krea_dagster.engine.run.options import Client, RunOptions
from krea_dagster.engine.run.outages import Dependency, Outages
from krea_dagster.engine.run.report import RunReport
from krea_dagster.engine.run.requested_image import RequestedImage
from krea_dagster.engine.run.scheduler import RunScheduler
from krea_dagster.engine.run.worklist import WorkList
from krea_dagster.engine.states import State
from krea_dagster.errors import ApiError, JournalUnavailable, KreaError, StorageUnavailable


@dataclass(frozen=True)
class Runner(RunOptions):
    """Buys, fetches and verifies requests, and returns once nothing more can be done for them."""

    async def run(self, requested: Iterable[RequestedImage], *, reused_rows: int = 0) -> RunReport:
        """Carry all requests to their end, or to where a later run goes on.

        ``requested`` is read once, as a stream, in a thread. ``reused_rows`` counts rows whose
        images are known to be stored, and which are not among ``requested``.

        Raises JournalError if the journal cannot be read or written, and StorageError if an image
        cannot be stored: then nothing more is bought. On cancellation nothing more is submitted,
        a POST under way is given a few seconds, and all answers are written; the next run goes on
        from there.
        """
        started_s = self.clock.monotonic()
        outages = Outages(self.clock, self.policy)
        outages.probes[Dependency.JOURNAL] = partial(self._probe, self.journal.database.ping)
        outages.probes[Dependency.STORAGE] = partial(self._probe, self.images.storage.ping)
        in_thread = outages.patient(self.in_thread)
        work = await WorkList.enter(requested, self, in_thread, self._is_unfinished, reused_rows)
        # Once all requests are entered, also those that a restored journal had forgotten.
        recover = partial(
            write_saved_answers,
            self.journal,
            self.images.storage,
            run_id=self.run_id,
            at=self.clock.now(),
        )
        recovered = await in_thread(recover)
        if not work.unfinished:
            self.on_progress(work.progress)
            return RunReport(
                work.new,
                work.progress,
                self.clock.monotonic() - started_s,
                waited=self.policy.wait,
                recovered=recovered,
            )
        async with self.connect() as client:
            outages.probes[Dependency.API] = partial(_probe_api, client)
            scheduler = RunScheduler(self, client, work, outages)
            await scheduler.run()
        return scheduler.report(self.clock.monotonic() - started_s, recovered)

    async def _probe(self, ping: Callable[[], object]) -> KreaError | None:
        """Return the error of a dependency that is away, None if it answers or fails otherwise."""
        try:
            await self.in_thread(ping)
        except (JournalUnavailable, StorageUnavailable) as error:
            return error
        except (KreaError, OSError):
            return None
        return None

    def _is_unfinished(self, record: Record) -> bool:
        if record.state is State.STORED:
            return self.file_is_missing(record)
        action = next_action(record, RetryState(), self.clock.now(), self.policy, buying=True)
        return action != DONE or self.images.find(record, adopts=self.root.adopts) is not None


async def _probe_api(client: Client) -> KreaError | None:
    """Return the error of an API that is away, None if it answers, also with an error."""
    try:
        await client.credits()
    except ApiError as error:
        return error if error.may_be_away else None
    return None
