"""Has a task read once a callback for it has come, or once it is overdue without one.

What a callback claims is not read here. It only shows that a task is worth a read.
"""

from __future__ import annotations

from typing import Final

from krea_dagster.engine.run.context import RunContext
from krea_dagster.engine.run.poll_schedule import poll_reason

#: Seconds between two reads of the journal, and more for each pending task: a read costs about
#: 15 µs of a core for each.
_READ_EVERY_S: Final = 0.5
_MORE_S_EACH: Final = 0.0005


class CallbackListener:
    """Wakes a poller's reads by the callbacks in a journal. ``run`` must be under way."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._poller = context.poller
        self._seen: dict[str, int] = {}  # callbacks that were followed by a read
        self._read_at_s: dict[str, float] = {}

    async def run(self) -> None:
        """Look for callbacks until cancelled. Raises JournalError."""
        received = self._context.options.journal.callbacks.received
        quiet_at_s: dict[str, float] = {}
        while True:
            count = len(self._poller.awaiting_callback())
            await self._context.clock.sleep(_READ_EVERY_S + _MORE_S_EACH * count)
            waiting = self._poller.awaiting_callback()
            if not waiting:
                continue
            now_s = self._context.clock.monotonic()
            called = await self._context.in_thread(received, list(waiting))
            for key, read in waiting.items():
                if read.pending is None or read.under_way:
                    continue
                calls = called[key].count if key in called else 0
                reason = poll_reason(
                    self._poller.latencies,
                    read.pending,
                    calls=calls,
                    seen=self._seen.get(key, 0),
                    read_at_s=self._read_at_s.get(key, float("-inf")),
                    now_s=now_s,
                )
                if reason is None:
                    quiet_at_s[key] = now_s
                    continue
                self._seen[key] = calls
                self._read_at_s[key] = now_s
                since_s = read.pending.since_s
                self._poller.wake(read, reason, quiet_at_s.pop(key, since_s))

    def was_called(self, request_key: str) -> bool:
        """Whether a callback for the request was followed by a read."""
        return self._seen.get(request_key, 0) > 0

    def forget(self, request_key: str) -> None:
        """Forget a request whose task has ended."""
        self._seen.pop(request_key, None)
        self._read_at_s.pop(request_key, None)
