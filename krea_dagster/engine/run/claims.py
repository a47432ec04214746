"""Claims the requests of a run in parts, and follows those that other runs hold."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Final

from krea_dagster.engine.journal.callback_log import ReceivedCallback
from krea_dagster.engine.policy import RetryState
from krea_dagster.engine.record import Record
from krea_dagster.engine.resolution import Claim
from krea_dagster.engine.run.context import RunContext
from krea_dagster.engine.run.poll import PollStep
from krea_dagster.engine.run.work_item import WorkItem
from krea_dagster.engine.states import State
from krea_dagster.models import is_task_id

#: Requests that are claimed and read from the journal together.
_PART: Final = 512
_HEARTBEAT_S: Final = 20.0
_ELSEWHERE_S: Final = 1.0

#: States of a purchase whose outcome is not known.
_OPEN: Final = frozenset({State.SUBMITTING, State.UNKNOWN})


class Claims:
    """The claims of one run.

    ``enqueue`` is given each claimed request. ``callback_claims`` are the tasks that callbacks
    claim for unknown purchases. Raises JournalError.
    """

    def __init__(
        self, context: RunContext, poll: PollStep, enqueue: Callable[[WorkItem], None]
    ) -> None:
        self._context = context
        self._journal = context.options.journal
        self._in_thread = context.in_thread
        self._work = context.work
        self._poll = poll
        self._owner = context.owner
        self._enqueue = enqueue
        self._elsewhere: deque[str] = deque()  # requests that another run holds
        self._elsewhere_since_s: float | None = None
        self._finished: set[str] = set()  # requests that are finished and still held
        self.callback_claims: dict[str, Claim] = {}
        self.under_way = False

    @property
    def are_open(self) -> bool:
        """Whether requests are yet to be claimed."""
        return bool(self._work.backlog or self.under_way or self._elsewhere)

    async def claim_part(self) -> None:
        """Claim the next part of the backlog."""
        self.under_way = True
        await self._claim(self._work.take(_PART))
        self.under_way = False

    def finish(self, record: Record, reason: str) -> None:
        """End with a request in this run; ``reason`` is why it is left, if it is."""
        self._finished.add(record.request_key)
        self._work.finish(record, reason)
        self._context.wake()  # it may have been the last one

    async def keep_alive(self) -> None:
        """Renew the claims until cancelled, and release what is finished."""
        while True:
            await self._context.clock.sleep(_HEARTBEAT_S)
            await self._in_thread(self._journal.claims.heartbeat, self._owner)
            await self._release_finished()

    async def watch_elsewhere(self) -> None:
        """Follow the requests that another run holds, until cancelled.

        A run that waits for them holds nothing that it has finished, so that no two runs wait for
        each other.
        """
        while True:
            await self._context.clock.sleep(_ELSEWHERE_S)
            if not self._elsewhere:
                self._elsewhere_since_s = None
                continue
            now_s = self._context.clock.monotonic()
            if self._elsewhere_since_s is None:
                self._elsewhere_since_s = now_s
            waited_s = now_s - self._elsewhere_since_s
            if waited_s > self._context.policy.patience_s or self._context.outages.over is not None:
                await self._leave_elsewhere()
                continue
            await self._release_finished()
            # The longest waiting first; requests that are still held go to the end again.
            part = list(islice(self._elsewhere, _PART))
            await self._claim(part)
            for _ in part:
                self._elsewhere.popleft()
            self._context.wake()

    async def _claim(self, keys: list[str]) -> None:
        """Claim requests and enqueue them.

        They are read again after the claim: another run may have carried them further.
        """
        mine = await self._in_thread(self._journal.claims.claim, keys, self._owner)
        found = await self._in_thread(self._journal.records, mine)
        calls = await self._calls_for(found)
        files, elsewhere = await self._in_thread(self._find_files, found)
        for key in keys:
            if key in found:
                retry = RetryState(
                    worth_polling=self._poll.worth_polling(found[key], calls),
                    file=files.get(key),
                    elsewhere=tuple(elsewhere.get(key, ())),
                )
                self._enqueue(self._work.item(found[key], retry))
            elif key not in mine:
                self._elsewhere.append(key)
        self._context.wake()

    def _find_files(
        self, found: Mapping[str, Record]
    ) -> tuple[dict[str, str], Mapping[str, Sequence[str]]]:
        """Return which requests may have a file in the storage root, or in another one. Blocks."""
        root, images = self._context.options.root, self._context.options.images
        files = images.find_all(found.values(), adopts=root.adopts)
        missing = [
            key
            for key, record in found.items()
            if key not in files and record.state is State.STORED
        ]
        return files, root.elsewhere(missing) if missing else {}

    async def _calls_for(self, found: Mapping[str, Record]) -> Mapping[str, ReceivedCallback]:
        """Return the callbacks of requests whose next step may depend on them."""
        unknown = [key for key, record in found.items() if record.state in _OPEN]
        submitted = [key for key, record in found.items() if record.state is State.SUBMITTED]
        left = [] if self._context.policy.wait else submitted
        if not unknown and not left:
            return {}
        calls = await self._in_thread(self._journal.callbacks.received, [*unknown, *left])
        claimed = {key: calls[key] for key in unknown if key in calls}
        task_ids = [call.task_id for call in claimed.values()]
        taken = await self._in_thread(self._journal.known_task_ids, task_ids)
        for key, call in claimed.items():
            if call.task_id and call.task_id not in taken and is_task_id(call.task_id):
                self.callback_claims[key] = Claim(call.task_id, call.first_at)
        return calls

    async def _leave_elsewhere(self) -> None:
        """Leave what another run still holds, with its name."""
        keys = list(self._elsewhere)
        holders = await self._in_thread(self._journal.claims.holders, keys)
        records = await self._in_thread(self._journal.records, keys)
        for key in keys:
            if key in records:
                holder = holders.get(key, "another run")
                self.finish(records[key], f"{holder} holds this row; a later run continues it")
        self._elsewhere.clear()
        self._context.wake()

    async def _release_finished(self) -> None:
        finished, self._finished = self._finished, set()
        await self._in_thread(self._journal.claims.unclaim, finished, self._owner)
