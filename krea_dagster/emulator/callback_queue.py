"""The queue of callbacks to send: each stays until it gets a 2xx or is given up.

It is a table of the state file, so a killed emulator sends them when it is started again.
Times are unix seconds of the world's clock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from krea_dagster.emulator.faults import ChosenFault
from krea_dagster.emulator.state_file import StateFile

#: Seconds from a failed call to the next one. After the last of them the call is given up.
RETRY_AFTER_S: Final = (1.0, 2.0, 4.0)


@dataclass(frozen=True)
class QueuedCallback:
    """One callback to send.

    ``n`` is the task's number, ``forged`` how the callback lies ("" if it does not), and
    ``tries`` how often it has failed.
    """

    id: int
    n: int
    url: str
    due_at: float
    forged: str
    tries: int


class CallbackQueue:
    """The callbacks that are still to be sent."""

    def __init__(self, state: StateFile) -> None:
        self._state = state
        self._db = state.db

    def plan(
        self, n: int, chosen: Sequence[ChosenFault], *, created_at: float, ready_at: float
    ) -> None:
        """Enter the callbacks of a task that ends at ``ready_at``, with its faults."""
        effects = {one.fault.effect: one for one in chosen}
        self._db.executemany(
            "INSERT INTO callbacks (n, due_at, forged) VALUES (?, ?, ?)",
            [(n, at, forged) for at, forged in _calls(effects, created_at, ready_at)],
        )

    def due(self, most: int, *, without: Collection[int]) -> list[QueuedCallback]:
        """Return the next callbacks, the earliest first, due or not."""
        with self._state.lock:
            rows = self._db.execute(
                "SELECT c.id, c.n, t.callback_url, c.due_at, c.forged, c.tries "
                "FROM callbacks c JOIN tasks t ON t.n = c.n ORDER BY c.due_at, c.id LIMIT ?",
                (most + len(without),),
            ).fetchall()
        return [QueuedCallback(*row) for row in rows if row[0] not in without][:most]

    def answered(self, call: QueuedCallback, status: int, now: float) -> None:
        """Record the status of the response to a callback, 0 if there was none."""
        with self._state.transaction():
            self._state.count("call", str(status) if status else "no answer")
            if 200 <= status < 300:
                self._state.count("note", "callbacks_answered")
            elif call.tries < len(RETRY_AFTER_S):
                self._db.execute(
                    "UPDATE callbacks SET tries = tries + 1, due_at = ? WHERE id = ?",
                    (now + RETRY_AFTER_S[call.tries], call.id),
                )
                return
            else:
                self._state.count("note", "callbacks_given_up")
            self._db.execute("DELETE FROM callbacks WHERE id = ?", (call.id,))


def _calls(
    effects: dict[str, Any], created_at: float, ready_at: float
) -> Iterator[tuple[float, str]]:
    """Yield when each callback of a task is due, and how it lies."""
    if "call_never" in effects:
        return
    late = effects.get("call_late")
    at = ready_at + (late.seconds if late is not None else 0.0)
    forged = effects["call_forged"].arg if "call_forged" in effects else ""
    if forged == "early":
        yield created_at, forged
        forged = ""
    yield at, forged
    if "call_twice" in effects:
        yield at, forged
