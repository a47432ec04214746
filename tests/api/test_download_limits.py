"""The judgement of a download's speed, and the number of simultaneous downloads."""

from __future__ import annotations

from krea_dagster.api.download_limits import MIN_BYTES_PER_S, DownloadLimit, RateWindow


def test_fewer_than_a_kilobyte_a_second_is_too_slow() -> None:
    enough = RateWindow(100.0).add(60 * MIN_BYTES_PER_S)
    assert not enough.is_over(159.9, 60.0)
    assert enough.is_over(160.0, 60.0)
    assert not enough.is_too_slow(160.0)
    assert enough.is_too_slow(160.1)
    assert RateWindow(100.0).add(60 * MIN_BYTES_PER_S - 1).is_too_slow(160.0)


def test_time_of_the_sink_does_not_count() -> None:
    assert not RateWindow(100.0).add(MIN_BYTES_PER_S).pause(59.0).is_too_slow(160.0)


def test_a_slow_download_halves_the_limit_and_a_success_adds_one() -> None:
    limit = DownloadLimit(most=16, number=16)
    for now_s, number in enumerate([8, 4, 2, 1, 1]):
        limit = limit.slow(began_at_s=now_s, now_s=now_s + 0.5)
        assert limit.number == number
    for number in (2, 3, 4):
        limit = limit.success()
        assert limit.number == number
    assert DownloadLimit(most=16, number=16).success().number == 16


def test_downloads_that_began_and_stop_together_halve_the_limit_once() -> None:
    limit = DownloadLimit(most=16, number=16)
    for _ in range(16):
        limit = limit.slow(began_at_s=0.0, now_s=60.0)
    assert limit.number == 8
