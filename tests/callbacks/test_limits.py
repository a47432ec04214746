"""How many calls a client may make, and that counting them takes bounded memory."""

from __future__ import annotations

from krea_dagster.callbacks.limits import ConnectionLimit, RateLimiter, client_name


class Seconds:
    """A clock that only the test moves."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_burst_is_admitted_and_then_only_as_much_as_flows_in() -> None:
    clock = Seconds()
    limits = RateLimiter(2, 5, monotonic=clock)
    assert [limits.admit("a") for _ in range(7)] == [True] * 5 + [False] * 2
    clock.now_s += 1
    assert [limits.admit("a") for _ in range(3)] == [True, True, False]
    clock.now_s += 1000
    assert [limits.admit("a") for _ in range(6)] == [True] * 5 + [False]


def test_one_client_takes_nothing_from_another() -> None:
    limits = RateLimiter(1, 1, monotonic=Seconds())
    assert [limits.admit(name) for name in "aab"] == [True, False, True]


def test_a_client_that_is_refused_gets_in_again_although_it_goes_on_trying() -> None:
    clock = Seconds()
    limits = RateLimiter(1, 1, monotonic=clock)
    admitted = 0
    for _ in range(100):
        admitted += limits.admit("a")
        clock.now_s += 0.1
    assert admitted in (10, 11)


def test_the_clients_that_are_remembered_are_bounded_and_the_silent_are_forgotten_first() -> None:
    limits = RateLimiter(1, 1, monotonic=Seconds(), max_clients=10)
    for number in range(1000):
        limits.admit("busy")
        limits.admit(f"client {number}")
    assert len(limits) == 10
    assert not limits.admit("busy")


def test_a_clock_that_steps_back_admits_nobody_more() -> None:
    clock = Seconds()
    limits = RateLimiter(1, 1, monotonic=clock)
    assert limits.admit("a")
    clock.now_s -= 100
    assert not limits.admit("a")


def test_a_host_of_ipv6_counts_as_its_network() -> None:
    assert client_name("2001:db8::1") == client_name("2001:db8::ffff:1%eth0")
    assert client_name("2001:db8::1") != client_name("2001:db8:0:1::1")
    assert client_name("::ffff:192.0.2.1") == client_name("192.0.2.1") == "192.0.2.1"
    assert client_name("a" * 1000) == "a" * 64


def test_a_client_holds_so_many_connections_and_another_one_for_each_that_it_leaves() -> None:
    held = ConnectionLimit(2)
    assert [held.admit(host) for host in ("::1", "::2", "::3")] == ["::/64", "::/64", None]
    assert held.admit("192.0.2.1") == "192.0.2.1", "another client"
    held.leave("::/64")
    assert [held.admit("::4"), held.admit("::5")] == ["::/64", None]


def test_proxies_hold_any_number_of_connections() -> None:
    for free, host in (("192.0.2.1", "192.0.2.1"), ("192.0.2.0/24", "192.0.2.9"), ("*", "")):
        held = ConnectionLimit(1, exempt=[free])
        assert None not in [held.admit(host) for _ in range(9)]
    assert ConnectionLimit(0, exempt=["a.name", "192.0.2.1"]).admit("192.0.2.2") is None
