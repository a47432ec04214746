"""An event loop on virtual time: it never waits, and the same scenario runs in the same order.

If nothing is ready it jumps to the next timer. If there is no timer either, nothing can ever go
on, and that is a failure.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Final

from anyio._backends._asyncio import CancelScope

#: Turns of the loop without a pause after which it counts as endless.
_MOST_TURNS: Final = 100_000
#: Seconds that a turn takes, and the shortest time that counts as a pause.
_TURN_S: Final = 1e-6
_PAUSE_S: Final = 1e-4


class Stuck(Exception):
    """Nothing can go on, or the loop never pauses."""


class VirtualLoop(asyncio.BaseEventLoop):
    """Time almost stands still while anything is ready, and jumps if nothing is."""

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0
        self._turns = 0
        self._selector = self  # where BaseEventLoop reads its events
        self.set_task_factory(_task_factory)

    def time(self) -> float:
        """Return the virtual seconds since the loop was made."""
        return self._now_s

    def select(self, timeout: float | None) -> list[Any]:
        """Let time pass until the next timer. Raises Stuck."""
        if timeout is None:
            raise Stuck("nothing is ready, and there is no timer: it hangs for ever")
        self._turns = self._turns + 1 if timeout < _PAUSE_S else 0
        if self._turns > _MOST_TURNS:
            raise Stuck(f"it goes round in circles at {self._now_s:.3f} s")
        self._now_s += _TURN_S
        if timeout > 0:
            self._now_s = max(self._now_s, self._next_s())
        return []

    def _next_s(self) -> float:
        timers = self._scheduled  # type: ignore[attr-defined]
        return float(timers[0].when()) if timers else 0.0

    def _process_events(self, _events: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        """Do nothing: there is no other thread."""

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Any, *args: Any
    ) -> Any:
        """Refuse a thread: it does not know virtual time."""
        if executor is None:
            raise RuntimeError(f"{func} is called in a thread, which a simulation does not have")
        return super().run_in_executor(executor, func, *args)


class Task(asyncio.Task[Any]):
    """A task whose place in a set depends on its number, and not on its address."""

    def __init__(self, coro: Any, number: int, **options: Any) -> None:
        self.number = number
        super().__init__(coro, **options)

    def __hash__(self) -> int:
        return self.number


#: Called with each new task, to count the tasks of one process.
ON_TASK: Final[contextvars.ContextVar[Callable[[asyncio.Task[Any]], None]]] = (
    contextvars.ContextVar("ON_TASK")
)

_numbers = itertools.count(1)


def _task_factory(
    loop: asyncio.AbstractEventLoop,
    coro: Coroutine[Any, Any, Any] | Generator[Any, None, Any],
    **options: Any,
) -> Task:
    task = Task(coro, next(_numbers), loop=loop, **options)
    told = ON_TASK.get(None)
    if told is not None:
        told(task)
    return task


def ordered() -> None:
    """Restart the count of tasks, and count the cancel scopes of anyio too.

    anyio keeps its scopes in sets, ordered by address, and cancels them in that order.
    """
    global _numbers  # noqa: PLW0603 - one scenario after another
    _numbers = itertools.count(1)
    _scopes.clear()


_scopes: dict[int, int] = {}


def _new_scope(cls: type[CancelScope], **_: Any) -> CancelScope:
    scope = object.__new__(cls)
    _scopes[id(scope)] = next(_numbers)
    return scope


def _number_of_scope(scope: CancelScope) -> int:
    return _scopes.get(id(scope), 0)


CancelScope.__new__ = _new_scope  # type: ignore[assignment,method-assign]
CancelScope.__hash__ = _number_of_scope  # type: ignore[assignment,method-assign]
