"""How long images take, learned from reads that bracket their end."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from krea_dagster.engine.run.latency import EXPECTED_LATENCY_S, Curve, Latencies, is_overdue


def age_when_s(curve: Curve, chance: float, not_yet_s: float = 0.0) -> float:
    """Return the age at which an unfinished task has ended with this chance, within 1 %."""
    ages_s = not_yet_s + np.concatenate([np.arange(0.01, 60.0, 0.01), np.geomspace(60, 1200, 400)])
    ended = curve.done_since(np.full(len(ages_s), not_yet_s), ages_s)
    return float(ages_s[int(np.argmax(ended >= chance))])


def learned(latency_s: float, *, looks_at_s: tuple[float, ...], images: int = 150) -> Curve:
    """Return a curve that saw images of one latency, each read at these ages."""
    curve = Curve.expecting(2.0)
    for _ in range(images):
        not_yet_s = max((age for age in looks_at_s if age < latency_s), default=0.0)
        done_s = min(age for age in looks_at_s if age >= latency_s)
        curve = curve.finished(not_yet_s, done_s)
    return curve


def test_an_expected_latency_applies_to_every_quality_and_is_adapted() -> None:
    latencies = Latencies.expecting(12.0)
    for quality in EXPECTED_LATENCY_S:
        assert latencies.of(quality).median_s == pytest.approx(12.0, rel=0.05)
    for _ in range(20):
        latencies = latencies.finished("1K", 2.9, 3.1)
    assert latencies.of("1K").median_s == pytest.approx(3.0, rel=0.1)
    assert Latencies.expecting(None) == Latencies()


def test_before_anything_is_known_the_published_latency_is_expected() -> None:
    for quality, latency_s in EXPECTED_LATENCY_S.items():
        assert Latencies().of(quality).median_s == pytest.approx(latency_s, rel=0.05)


def test_a_narrow_bracket_teaches_the_latency_within_a_few_images() -> None:
    curve = learned(0.5, looks_at_s=(0.48, 0.52), images=8)
    assert curve.median_s == pytest.approx(0.5, rel=0.1)


def test_a_late_read_does_not_make_the_next_one_later() -> None:
    """If the time of the read counted, 2 s would become 3, and then more."""
    curve = Curve.expecting(2.0)
    look_s = 3.0
    for _ in range(200):
        curve = curve.finished(0.0, look_s)
        look_s = age_when_s(curve, 0.9)
    assert look_s < 3.0


def test_the_distribution_is_found_although_no_latency_is_ever_seen_exactly() -> None:
    randomness = random.Random(1)
    curve = Curve.expecting(2.0)
    for _ in range(400):
        latency_s = randomness.uniform(1.4, 2.6)
        not_yet_s, look_s = 0.0, age_when_s(curve, 0.4)
        while look_s < latency_s:
            not_yet_s, look_s = look_s, age_when_s(curve, 0.4, look_s)
        curve = curve.finished(not_yet_s, look_s)
    assert curve.median_s == pytest.approx(2.0, abs=0.15)
    assert age_when_s(curve, 0.9) == pytest.approx(2.48, abs=0.15)


def test_a_service_that_changes_is_followed() -> None:
    curve = learned(2.0, looks_at_s=(1.9, 2.1))
    for _ in range(300):
        curve = curve.finished(5.8, 6.2)
    assert curve.median_s == pytest.approx(6.0, rel=0.05)


def test_each_quality_is_learned_separately() -> None:
    latencies = Latencies()
    for _ in range(50):
        latencies = latencies.finished("1K", 0.4, 0.6)
    assert latencies.of("1K").median_s < 0.7
    assert latencies.of("2K").median_s == pytest.approx(EXPECTED_LATENCY_S["2K"], rel=0.05)


def test_a_straggler_is_read_again_within_15_percent_of_its_age() -> None:
    curve = learned(2.0, looks_at_s=(1.9, 2.1))
    assert age_when_s(curve, 0.4, 10.0) <= 10.0 * 1.15
    assert age_when_s(curve, 0.9, 600.0) <= 600.0 + 12.0
    chance = curve.done_since(np.array([600.0]), np.array([615.0]))
    assert chance[0] > 0.9, "and in a batch as well"


def test_a_task_is_overdue_when_it_takes_far_longer_than_its_kind() -> None:
    known = Latencies.known({"1K": 2.0})
    assert not is_overdue(known, "1K", 12.0)
    assert is_overdue(known, "1K", 14.0)
    assert not is_overdue(Latencies(), "2K", 32.0)


@given(
    brackets=st.lists(st.tuples(st.floats(0, 2000), st.floats(0, 2000)).map(sorted), max_size=30),
    not_yet_s=st.floats(0, 3000),
    more_s=st.floats(0, 3000),
)
def test_chances_are_always_between_0_and_1(
    brackets: list[list[float]], not_yet_s: float, more_s: float
) -> None:
    curve = Curve.expecting(2.0)
    for low_s, high_s in brackets:
        curve = curve.finished(low_s, high_s)
    assert curve.mass.sum() == pytest.approx(1.0)
    assert (curve.mass >= 0).all()
    found = curve.done_since(np.array([not_yet_s]), np.array([not_yet_s + more_s]))[0]
    assert 0.0 <= found <= 1.0
