"""Callbacks as EvoLink documents them: when, with which body, how often, and to which addresses."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from click.testing import CliRunner

from krea_dagster.emulator import Emulator, UnknownFaultError, World, emulator_command
from krea_dagster.emulator.callback_sender import MAX_CALLS, CallbackSender
from krea_dagster.emulator.contract import read_order
from krea_dagster.emulator.http_post import HttpPoster
from tests.emulator.harness import Clock, EmulatorClient
from tests.emulator.https_listener import Listener, certificates, listening

BODY = {"model": "krea-2-turbo", "prompt": "a fox"}


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def ca_file(ca: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificates(ca, tmp_path_factory.mktemp("ca"))


@pytest.fixture
def listener(ca: trustme.CA) -> Iterator[Listener]:
    with listening(ca) as running:
        yield running


@contextlib.contextmanager
def calling(
    state: Path, ca_file: Path | None, clock: Clock, **settings: Any
) -> Iterator[EmulatorClient]:
    """Run an emulator that may call this machine; tasks take 2 s of the test's clock."""
    with Emulator(
        state=state,
        clock=clock,
        latency_s=2.0,
        latency_jitter=0.0,
        callback_ca=ca_file,
        **{"callbacks_to_private": True, **settings},
    ) as emulator:
        client = EmulatorClient(emulator, clock)
        yield client
        client.close()


@pytest.fixture
def client(tmp_path: Path, ca_file: Path) -> Iterator[EmulatorClient]:
    with calling(tmp_path / "state", ca_file, Clock()) as running:
        yield running


def until(client: EmulatorClient, **wanted: int) -> dict[str, Any]:
    """Wait until the statistics have these values, which another thread writes."""
    ends = time.monotonic() + 10
    while True:
        stats = client.emulator.stats()
        if all(stats[name] == value for name, value in wanted.items()):
            return stats
        assert time.monotonic() < ends, stats
        threading.Event().wait(0.002)


# -- when, and with which body ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "status"),
    [
        ("a fox", "completed"),
        ("a fox [emulator: fail service_error]", "failed"),
        ("a fox [emulator: cancelled]", "cancelled"),
    ],
)
def test_the_end_of_a_task_is_called_back_with_the_body_of_its_query(
    client: EmulatorClient, listener: Listener, prompt: str, status: str
) -> None:
    task_id = client.finished(prompt, callback_url=f"{listener.url}/hook?x=1")
    call = listener.next()
    said, read = call.json, client.read(task_id).json()
    assert call.path == "/hook?x=1"
    assert call.headers["content-type"] == "application/json"
    assert "authorization" not in {name.lower() for name in call.headers}
    assert said["status"] == status
    links = (said.pop("results", []), read.pop("results", []))
    assert said == read
    assert [len(some) for some in links] == ([1, 1] if status == "completed" else [0, 0])
    for link in links[0]:
        assert client.anonymous.get(link).content.startswith(b"\x89PNG")


def test_callbacks_do_not_use_a_proxy(
    tmp_path: Path, ca_file: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # a closed port
    with calling(tmp_path / "state", ca_file, Clock()) as client:
        client.finished(callback_url=listener.url)
        assert listener.next().json["status"] == "completed"


def test_nothing_is_called_before_the_end_and_the_task_is_settled_then(
    client: EmulatorClient, listener: Listener
) -> None:
    client.create(callback_url=listener.url)
    client.clock.move(1.9)
    assert until(client, callbacks_waiting=1)["callbacks_sent"] == 0
    client.clock.move(0.2)
    assert listener.next().json["status"] == "completed"
    stats = until(client, callbacks_waiting=0)
    assert (stats["charged_units"], stats["held_units"]) == (4500, 0)
    assert (stats["callbacks_sent"], stats["callbacks_answered"]) == (1, 1)
    assert stats["callbacks"] == {"204": 1}


def test_a_task_without_a_callback_url_sends_no_callback(client: EmulatorClient) -> None:
    client.finished()
    assert client.world.due_callbacks(1) == []


def test_a_replay_does_not_call_again(client: EmulatorClient, listener: Listener) -> None:
    for _ in range(2):
        client.post(key="key-0000000000000001", callback_url=listener.url)
    client.clock.move(3)
    listener.next()
    assert until(client, callbacks_waiting=0)["callbacks_sent"] == 1


def test_the_same_key_with_another_callback_url_is_a_conflict(client: EmulatorClient) -> None:
    """So a repeat must send the same URL."""
    key = "key-0000000000000001"
    assert client.post(key=key, callback_url="https://localhost:1/a").status_code == 200
    answer = client.post(key=key, callback_url="https://localhost:1/b")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "idempotency_conflict")


# -- retries ----------------------------------------------------------------------------------


def test_a_response_other_than_2xx_is_retried_after_1_2_and_4_seconds_and_then_given_up(
    tmp_path: Path, ca_file: Path, listener: Listener
) -> None:
    """By the world's clock, with each due callback sent by the test."""
    clock = Clock()
    emulator = Emulator(
        state=tmp_path, clock=clock, latency_s=2.0, latency_jitter=0.0, callbacks_to_private=True
    )
    world = emulator.world
    account = world.account("emulator")
    assert account is not None
    order = read_order({**BODY, "callback_url": listener.url}, callbacks_to_private=True)
    world.create(account, order)
    listener.statuses += [500, 302, 404, 429]

    async def calls_after(*moves: float) -> list[int]:
        made = []
        async with CallbackSender(world, "http://emulator", to_private=True, ca=ca_file) as sender:
            for move in moves:
                clock.move(move)
                sender._start_due()
                calls = list(sender._in_progress.values())
                await asyncio.gather(*calls)
                made.append(len(calls))
        return made

    made = asyncio.run(calls_after(2.0, 0.99, 0.02, 1.97, 0.04, 3.95, 0.06, 1000))
    assert made == [1, 0, 1, 0, 1, 0, 1, 0]
    stats = emulator.stats()
    assert stats["callbacks"] == {"302": 1, "404": 1, "429": 1, "500": 1}
    assert (stats["callbacks_given_up"], stats["callbacks_waiting"]) == (1, 0)
    assert stats["callbacks_answered"] == 0
    emulator.stop()


def test_a_receiver_that_recovers_gets_the_retry(
    client: EmulatorClient, listener: Listener
) -> None:
    listener.statuses.append(503)
    client.finished(callback_url=listener.url)
    first = listener.next()
    until(client, callbacks_sent=1)
    client.clock.move(1)
    assert listener.next().json["id"] == first.json["id"]
    assert until(client, callbacks_waiting=0)["callbacks_answered"] == 1


def test_a_callback_without_a_response_in_time_counts_as_failed(
    tmp_path: Path, ca_file: Path, listener: Listener
) -> None:
    listener.open.clear()
    with calling(tmp_path, ca_file, Clock(), callback_timeout_s=0.1) as client:
        client.finished(callback_url=listener.url)
        assert until(client, callbacks_sent=1)["callbacks"] == {"no answer": 1}
        assert client.emulator.stats()["callbacks_waiting"] == 1


def test_a_receiver_that_never_completes_the_tls_handshake_leaves_no_open_connection(
    ca_file: Path,
) -> None:
    """The time ends within the TLS handshake. An open connection would be a warning here."""

    async def posted(url: str) -> int:
        return await HttpPoster(ca_file, to_private=True, timeout_s=0.1).post(url, b"{}")

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://localhost:{silent.getsockname()[1]}/"
        assert asyncio.run(posted(url)) == 0
        caller, _ = silent.accept()
        with caller:
            caller.settimeout(5)
            while caller.recv(4096):  # the ClientHello, then the end
                pass
    gc.collect()


def test_a_slow_receiver_delays_neither_the_api_nor_the_stop_of_the_emulator(
    tmp_path: Path, ca_file: Path, listener: Listener
) -> None:
    listener.open.clear()
    clock = Clock()
    with calling(tmp_path, ca_file, clock, callback_timeout_s=60) as client:
        task_ids = [
            client.create(f"fox {n}", callback_url=listener.url) for n in range(MAX_CALLS + 5)
        ]
        client.clock.move(3)
        for _ in range(MAX_CALLS):
            listener.next()
        assert listener.arrived.empty()  # no more at a time
        assert client.read(task_ids[0]).json()["status"] == "completed"
        assert client.create("another") not in task_ids
    with contextlib.closing(World(tmp_path, clock=clock)) as world:
        stats = world.stats(tasks=False)
    assert (stats["callbacks_sent"], stats["callbacks_waiting"]) == (0, MAX_CALLS + 5)


def test_a_callback_that_was_not_sent_is_sent_by_the_next_emulator_on_the_same_state(
    tmp_path: Path, ca_file: Path, listener: Listener
) -> None:
    clock = Clock()
    with calling(tmp_path, ca_file, clock) as client:
        task_id = client.create(callback_url=listener.url)
    clock.move(100)
    with calling(tmp_path, ca_file, clock) as client:
        assert listener.next().json["id"] == task_id
        until(client, callbacks_waiting=0)


# -- addresses --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    ["https://localhost/hook", "https://127.0.0.1/hook", "https://10.1.2.3/hook", "https://[::1]/"],
)
def test_a_private_address_is_refused_unless_it_was_allowed(
    tmp_path: Path, ca_file: Path, url: str
) -> None:
    with calling(tmp_path / "no", None, Clock(), callbacks_to_private=False) as client:
        answer = client.post(callback_url=url)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "callback_url")
        assert client.emulator.stats()["creates"] == 0
    with calling(tmp_path / "yes", ca_file, Clock()) as client:
        assert client.post(callback_url=url).status_code == 200
        assert client.post(callback_url=url.replace("https", "http")).status_code == 400


def test_a_name_that_resolves_to_a_private_address_is_not_called(
    ca: trustme.CA, ca_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The create call does not resolve names, so the callback does. This name resolves to here."""
    real = socket.getaddrinfo

    def here(host: Any, *rest: Any, **named: Any) -> Any:
        ours = host in ("hooks.example.com", b"hooks.example.com")
        return real("127.0.0.1" if ours else host, *rest, **named)

    async def posted(url: str, *, to_private: bool) -> int:
        return await HttpPoster(ca_file, to_private=to_private, timeout_s=5).post(url, b"{}")

    monkeypatch.setattr(socket, "getaddrinfo", here)
    with listening(ca, "hooks.example.com") as listener:
        url = listener.url.replace("localhost", "hooks.example.com")
        assert asyncio.run(posted(url, to_private=False)) == 0
        assert listener.arrived.empty()
        assert asyncio.run(posted(url, to_private=True)) == 204


def test_a_receiver_with_an_untrusted_certificate_gets_nothing(
    tmp_path: Path, listener: Listener
) -> None:
    with calling(tmp_path, None, Clock()) as client:
        client.finished(callback_url=listener.url)
        assert until(client, callbacks_sent=1)["callbacks"] == {"no answer": 1}
    assert listener.arrived.empty()


def test_a_redirect_is_not_followed(client: EmulatorClient, listener: Listener) -> None:
    listener.statuses.append(307)
    client.finished(callback_url=listener.url)
    listener.next()
    assert until(client, callbacks_sent=1)["callbacks"] == {"307": 1}


# -- faults -----------------------------------------------------------------------------------


def test_a_late_callback_comes_arg_seconds_later(
    client: EmulatorClient, listener: Listener
) -> None:
    client.world.script("callback_late", arg=7)
    client.finished(callback_url=listener.url)  # 10 s later: 8 after the end
    listener.next()
    client.world.script("callback_late", arg=70)
    client.finished("another", callback_url=listener.url)
    assert until(client, callbacks_waiting=1, callbacks_sent=1)
    client.clock.move(70)
    listener.next()


def test_a_doubled_callback_comes_twice_and_a_missing_one_never(
    client: EmulatorClient, listener: Listener
) -> None:
    client.world.script("callback_doubled")
    client.world.script("callback_missing")
    twice = client.create("one", callback_url=listener.url)
    client.create("two", callback_url=listener.url)
    client.clock.move(3)
    assert [listener.next().json["id"] for _ in range(2)] == [twice, twice]
    assert until(client, callbacks_waiting=0)["callbacks_sent"] == 2


def test_a_forged_callback_claims_another_end_or_another_task(
    client: EmulatorClient, listener: Listener
) -> None:
    client.world.script("callback_forged")
    task_id = client.finished(callback_url=listener.url)
    said = listener.next().json
    assert (said["id"], said["status"]) == (task_id, "failed")
    client.world.script("callback_forged", arg="task")
    task_id = client.finished("another", callback_url=listener.url)
    said = listener.next().json
    assert said["id"] != task_id
    assert client.read(said["id"]).status_code == 404


def test_an_early_forged_callback_comes_before_the_end_and_the_true_one_on_time(
    client: EmulatorClient, listener: Listener
) -> None:
    client.world.script("callback_forged", arg="early")
    task_id = client.create(callback_url=listener.url)
    assert listener.next().json["status"] == "completed"
    assert client.read(task_id).json()["status"] == "pending"
    client.clock.move(3)
    assert listener.next().json["results"] != []


def test_callback_faults_strike_only_tasks_with_a_callback_and_are_recorded(
    client: EmulatorClient, listener: Listener
) -> None:
    client.world.script("callback_missing")
    client.finished("no url")
    client.finished("no end [emulator: stuck]", callback_url=listener.url)
    assert [one["name"] for one in client.world.unconsumed()] == ["callback_missing"]
    client.finished("a wolf [emulator: callback_doubled]", callback_url=listener.url)
    assert client.world.unconsumed() == []
    assert client.stats()["tasks"][-1]["faults"] == ["callback_doubled", "callback_missing"]
    with pytest.raises(UnknownFaultError, match="does not take 'other'"):
        client.world.script("callback_forged", arg="other")


# -- the command ------------------------------------------------------------------------------


def test_the_command_refuses_a_file_without_certificates(tmp_path: Path) -> None:
    wrong = tmp_path / "ca.pem"
    wrong.write_text("nothing")
    result = CliRunner().invoke(emulator_command, ["--callback-ca", str(wrong)])
    assert result.exit_code == 2
    assert "contains no certificates" in result.output


def test_health_answers_while_calls_fail(client: EmulatorClient) -> None:
    client.finished(callback_url="https://localhost:1/refused")
    until(client, callbacks_sent=1)
    assert httpx.get(f"{client.emulator.url}/emulator/health", trust_env=False).status_code == 200
