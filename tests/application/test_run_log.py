"""A run's log: lines at once, and what the run is doing whenever it is silent for too long."""

from __future__ import annotations

import queue

from krea_dagster.application.run_log import RunLog
from krea_dagster.engine.run.report import Progress
from tests.plugin.test_materialize import Listening

PATIENCE_S = 30.0
NEVER_S = 3600.0


def test_a_line_is_written_at_once() -> None:
    lines: list[str] = []
    with RunLog(lines.append, NEVER_S) as log:
        log.say("6 to buy")
        assert lines == ["6 to buy"]


def test_a_phase_that_calls_nothing_is_repeated_with_its_time() -> None:
    lines: queue.Queue[str] = queue.Queue()
    with RunLog(lines.put, 0.001) as log:
        log.doing("reading the prompt table")
        for _ in range(2):
            assert lines.get(timeout=PATIENCE_S).startswith("reading the prompt table, ")


def test_progress_is_repeated_as_it_is_then() -> None:
    lines: queue.Queue[str] = queue.Queue()
    with RunLog(lines.put, 0.001) as log:
        for delivered in range(10):
            log.progress(Progress(total=9, delivered=delivered))
        repeated = iter(lambda: lines.get(timeout=PATIENCE_S), None)
        assert next(line for line in repeated if line.startswith("9 of 9 images"))


def test_before_the_run_says_what_it_does_nothing_is_repeated() -> None:
    assert RunLog(print, NEVER_S).line() is None


def test_the_time_to_go_counts_from_the_begin_of_buying() -> None:
    seconds = iter([0.0, 100.0, 110.0])
    log = RunLog(print, NEVER_S, monotonic=lambda: next(seconds))
    log.progress(Progress(total=30, delivered=10))
    assert (log.line() or "").startswith("10 of 30 images, about 20 s to go: ")


def test_another_listener_hears_the_same_except_the_repetitions() -> None:
    heard, progress = Listening(), Progress(total=1)
    log = RunLog(lambda _: None, NEVER_S, also=heard)
    log.say("a line")
    log.doing("reading")
    log.progress(progress)
    assert (heard.said, heard.told) == (["a line", "(reading)"], [progress])


def test_a_line_that_cannot_be_written_ends_no_purchase() -> None:
    written: queue.Queue[str] = queue.Queue()

    def write(line: str) -> None:
        written.put(line)
        raise OSError("the disk is full")

    with RunLog(write, 0.001) as log:
        log.doing("buying")
        for _ in range(2):  # it tries again
            assert written.get(timeout=PATIENCE_S).startswith("buying")
