"""How many tasks are in flight, and when each is asked about."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from krea_dagster.engine.pace import EXPECTED_LATENCY_S, Latencies, Window, is_overdue, next_look_s


def taken(window: Window, times: int) -> Window:
    for _ in range(times):
        window = window.taken()
    return window


def test_a_window_starts_small_and_doubles_with_every_full_window_that_is_taken() -> None:
    window = Window.opening(64)
    assert window.size == 8
    window = taken(window, 8)
    assert window.size == 16
    assert taken(window, 16).size == 32


def test_a_window_never_grows_beyond_the_most_nor_starts_there() -> None:
    assert taken(Window.opening(64), 1000).size == 64
    assert Window.opening(3).size == 3
    assert taken(Window.opening(3), 10).size == 3


def test_a_refusal_cuts_the_window_to_70_percent() -> None:
    window = taken(Window.opening(64), 92)
    assert window.turned_away(10.0, None).size == 44


def test_one_burst_of_refusals_cuts_once() -> None:
    window = taken(Window.opening(64), 92).turned_away(10.0, None)
    assert window.turned_away(10.5, None).turned_away(11.9, None).size == 44
    assert window.turned_away(12.0, None).size == 31


def test_after_a_refusal_the_window_grows_back_quickly_and_then_by_one_per_full_window() -> None:
    window = taken(Window.opening(128), 92).turned_away(10.0, None)
    assert window.size == 70
    back = taken(window, 20)
    assert back.size == 90, "quickly up to 90 % of the 100 where it was cut"
    assert taken(back, 92).size == 91
    assert taken(back, 184).size == 92


def test_a_task_is_overdue_when_it_takes_far_longer_than_its_kind() -> None:
    known = Latencies(recent={"1K": (2.0,)})
    assert not is_overdue(known, "1K", 13.0)
    assert is_overdue(known, "1K", 13.1)
    assert not is_overdue(Latencies(), "2K", 33.0)


def test_a_window_always_has_room_for_one() -> None:
    window = Window.opening(2)
    for number in range(50):
        window = window.turned_away(number * 10.0, None)
    assert window.size == 1


def test_retry_after_pauses_everybody_also_within_a_burst_and_the_longest_counts() -> None:
    window = Window.opening(8).turned_away(100.0, 5.0)
    assert window.pause_until_s == 105.0
    assert window.turned_away(100.5, 20.0).pause_until_s == 120.5
    assert window.turned_away(100.5, 1.0).pause_until_s == 105.0
    assert window.turned_away(100.5, None).pause_until_s == 105.0


@given(
    most=st.integers(1, 4096),
    events=st.lists(st.none() | st.tuples(st.floats(0, 1e6), st.none() | st.floats(0, 3600))),
)
def test_whatever_happens_the_window_stays_between_one_and_the_most(
    most: int, events: list[tuple[float, float | None] | None]
) -> None:
    window = Window.opening(most)
    for event in events:
        window = window.taken() if event is None else window.turned_away(*event)
        assert 1 <= window.size <= most


def test_before_anything_is_learned_the_published_figures_are_expected() -> None:
    assert Latencies().expected_s("1K") == EXPECTED_LATENCY_S["1K"]
    assert Latencies().expected_s("2K") == EXPECTED_LATENCY_S["2K"]


def test_latencies_are_learned_from_the_middle_of_the_bracket_by_quality() -> None:
    learned = Latencies().finished("1K", 4.0, 6.0).finished("1K", 6.0, 8.0).finished("1K", 0, 100)
    assert learned.expected_s("1K") == 7.0
    assert learned.expected_s("2K") == EXPECTED_LATENCY_S["2K"]


def test_only_the_recent_latencies_count() -> None:
    learned = Latencies(keep=4)
    for latency_s in (100.0, 100.0, 100.0, 2.0, 2.0, 2.0, 2.0):
        learned = learned.finished("1K", latency_s, latency_s)
    assert learned.recent["1K"] == (2.0, 2.0, 2.0, 2.0)


def test_a_task_is_first_asked_about_when_half_of_its_kind_are_done() -> None:
    assert next_look_s(Latencies(), "1K", age_s=0.5, asks=0) == 1.5
    assert next_look_s(Latencies(), "1K", age_s=9.0, asks=0) == 0.0


@pytest.mark.parametrize(
    ("age_s", "wait_s"), [(2.0, 0.5), (6.0, 1.0), (42.0, 10.0), (1000.0, 15.0)]
)
def test_then_ever_more_seldom_as_it_grows_older(age_s: float, wait_s: float) -> None:
    assert next_look_s(Latencies(), "1K", age_s=age_s, asks=1) == wait_s


@given(
    recent=st.lists(st.floats(0, 1e5), max_size=10).map(tuple),
    age_s=st.floats(0, 1e7),
    asks=st.integers(1, 100),
)
def test_two_looks_at_a_task_are_between_a_fifth_of_a_second_and_15_seconds_apart(
    recent: tuple[float, ...], age_s: float, asks: int
) -> None:
    assert 0.2 <= next_look_s(Latencies({"1K": recent}), "1K", age_s, asks) <= 15.0
