"""A process that is killed without warning: the next run delivers all, and buys nothing twice."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from krea_dagster.engine.states import Event, State
from tests.engine.harness import EngineHarness, make_requests, open_harness

ROOT = Path(__file__).parents[2]

#: Far more than any of this takes, even on a busy machine.
PATIENCE_S = 60.0


@contextmanager
def buying(engine: EngineHarness, count: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that buys images, and is killed at the end if it still runs."""
    command = [sys.executable, "-m", "tests.crash.buyer"]
    arguments = [engine.emulator.url, str(engine.folder), str(count)]
    process = subprocess.Popen([*command, *arguments], cwd=ROOT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_until(what: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not what():
        assert process.poll() is None, "the process ended too early"
        assert time.monotonic() < deadline_s, "what was waited for did not happen"
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("moment", "happened"),
    [
        ("some tasks are created", lambda stats: stats["creates"] >= 4),
        ("some files are fetched", lambda stats: stats["file_gets"] >= 2),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_purchases_of_a_killed_process_are_finished_and_not_bought_again(
    tmp_path: Path, moment: str, happened: Callable[[dict[str, Any]], bool]
) -> None:
    with open_harness(tmp_path, latency_s=0.2) as engine:
        with buying(engine, 7) as process:
            wait_until(lambda: happened(engine.emulator.stats(tasks=False)), process)
            process.send_signal(signal.SIGKILL)
            process.wait()
        stats = engine.assert_accounts_agree()
        assert 0 < stats["creates"] <= 7
        report = asyncio.run(engine.run(make_requests(7), "run-2"))
        assert report.posts >= 7 - stats["creates"]
        assert engine.states(make_requests(7)) == ["stored"] * 7
        assert engine.assert_accounts_agree()["creates"] == 7


def test_a_process_that_is_killed_between_post_and_answer_finds_its_task_again(
    tmp_path: Path,
) -> None:
    """Its parent has not reaped it yet, and the next run does not wait for that."""
    with open_harness(tmp_path) as engine:
        engine.emulator.world.script("delay_create", arg=2)
        with buying(engine, 1) as process:
            wait_until(lambda: engine.emulator.stats(tasks=False)["creates"] == 1, process)
            process.send_signal(signal.SIGKILL)
            (request,) = make_requests(1)
            with buying(engine, 1) as second:
                assert second.wait(PATIENCE_S) == 0
        assert engine.record(request).state is State.STORED
        events = engine.events(request)
        assert events[:4] == [
            Event.PLANNED,
            Event.SUBMITTING,
            Event.OUTCOME_UNKNOWN,
            Event.REPLAYING,
        ]
        assert engine.assert_accounts_agree()["creates"] == 1
