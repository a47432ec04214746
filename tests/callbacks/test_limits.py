"""The limits of each client, and that they need bounded memory."""

from __future__ import annotations

from krea_dagster.callbacks.limits import ConnectionLimit, RateLimiter, client_name
from tests.manual_clock import ManualClock


def test_a_burst_is_admitted_and_then_only_the_rate() -> None:
    clock = ManualClock()
    limits = RateLimiter(2, 5, monotonic=clock)
    assert [limits.admit("a") for _ in range(7)] == [True] * 5 + [False] * 2
    clock.now_s += 1
    assert [limits.admit("a") for _ in range(3)] == [True, True, False]
    clock.now_s += 1000
    assert [limits.admit("a") for _ in range(6)] == [True] * 5 + [False]


def test_clients_have_separate_limits() -> None:
    limits = RateLimiter(1, 1, monotonic=ManualClock())
    assert [limits.admit(name) for name in "aab"] == [True, False, True]


def test_a_refused_client_is_admitted_again_although_it_keeps_trying() -> None:
    clock = ManualClock()
    limits = RateLimiter(1, 1, monotonic=clock)
    admitted = 0
    for _ in range(100):
        admitted += limits.admit("a")
        clock.now_s += 0.1
    assert admitted in (10, 11)


def test_the_number_of_remembered_clients_is_bounded_and_idle_ones_are_forgotten_first() -> None:
    limits = RateLimiter(1, 1, monotonic=ManualClock(), max_clients=10)
    for number in range(1000):
        limits.admit("busy")
        limits.admit(f"client {number}")
    assert len(limits) == 10
    assert not limits.admit("busy")


def test_a_clock_that_steps_back_admits_no_more_calls() -> None:
    clock = ManualClock()
    limits = RateLimiter(1, 1, monotonic=clock)
    assert limits.admit("a")
    clock.now_s -= 100
    assert not limits.admit("a")


def test_an_ipv6_host_counts_as_its_network() -> None:
    assert client_name("2001:db8::1") == client_name("2001:db8::ffff:1%eth0")
    assert client_name("2001:db8::1") != client_name("2001:db8:0:1::1")
    assert client_name("::ffff:192.0.2.1") == client_name("192.0.2.1") == "192.0.2.1"
    assert client_name("a" * 1000) == "a" * 64


def test_a_client_has_a_connection_limit_and_regains_closed_connections() -> None:
    held = ConnectionLimit(2)
    assert [held.admit(host) for host in ("::1", "::2", "::3")] == ["::/64", "::/64", None]
    assert held.admit("192.0.2.1") == "192.0.2.1", "another client"
    held.leave("::/64")
    assert [held.admit("::4"), held.admit("::5")] == ["::/64", None]


def test_proxies_have_no_connection_limit() -> None:
    for free, host in (("192.0.2.1", "192.0.2.1"), ("192.0.2.0/24", "192.0.2.9"), ("*", "")):
        held = ConnectionLimit(1, exempt=[free])
        assert None not in [held.admit(host) for _ in range(9)]
    assert ConnectionLimit(0, exempt=["a.name", "192.0.2.1"]).admit("192.0.2.2") is None
