"""Waits for callbacks: has each task asked about once it is called about, or quiet for too long.

What a call claims is never looked at here. It says that a task is worth a question, and the answer
to that is EvoLink's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, Protocol

from krea_dagster.engine.clock import Clock
from krea_dagster.engine.journal.callback_log import ReceivedCallback
from krea_dagster.engine.run.poll_schedule import Hint, hint
from krea_dagster.engine.run.poller import Asker
from krea_dagster.engine.threads import InThread

#: Seconds between two looks at the journal, and more where very many are waited for: a look costs
#: some 15 µs of a core for each.
_LOOK_EVERY_S: Final = 0.5
_MORE_S_EACH: Final = 0.0005


class Calls(Protocol):
    """The part of CallbackLog that is needed here."""

    def received(self, request_keys: Iterable[str]) -> Mapping[str, ReceivedCallback]:
        """Those of these requests that were called about. Blocks."""


class Listener:
    """Wakes an asker's tasks by the calls in a journal. ``run`` must be under way."""

    def __init__(self, calls: Calls, asker: Asker, clock: Clock, in_thread: InThread) -> None:
        self._calls = calls
        self._asker = asker
        self._clock = clock
        self._in_thread = in_thread
        self._seen: dict[str, int] = {}  # calls that were followed by a question
        self._asked_s: dict[str, float] = {}

    async def run(self) -> None:
        """Look for calls, for ever. Raises JournalError."""
        quiet_at_s: dict[str, float] = {}
        while True:
            await self._clock.sleep(_LOOK_EVERY_S + _MORE_S_EACH * len(self._asker.listening()))
            waited_for = self._asker.listening()
            if not waited_for:
                continue
            now_s = self._clock.monotonic()
            called = await self._in_thread(self._calls.received, list(waited_for))
            for key, question in waited_for.items():
                if question.awaited is None or question.reading:
                    continue
                calls = called[key].count if key in called else 0
                seen = self._seen.get(key, 0)
                why = hint(
                    self._asker.latencies,
                    question.awaited,
                    calls=calls,
                    seen=seen,
                    asked_s=self._asked_s.get(key, float("-inf")),
                    now_s=now_s,
                )
                if why is None:
                    quiet_at_s[key] = now_s
                    continue
                self._seen[key] = calls
                self._asked_s[key] = now_s
                since_s = question.awaited.since_s
                self._asker.wake(question, why, quiet_at_s.pop(key, since_s))

    def was_called(self, request_key: str) -> bool:
        """Whether a question about the request has followed a call."""
        return self._seen.get(request_key, 0) > 0

    def forget(self, request_key: str) -> None:
        """Forget a request whose task has ended."""
        self._seen.pop(request_key, None)
        self._asked_s.pop(request_key, None)


__all__ = ["Calls", "Hint", "Listener"]
