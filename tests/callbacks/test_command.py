"""The command as a process: over TLS from the emulator to the journal, and through a flood."""

from __future__ import annotations

import asyncio
import contextlib
import select
import signal
import socket
import ssl
import time
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from krea_dagster.callbacks import CallbackUrls
from krea_dagster.callbacks.command import callbacks_command
from krea_dagster.emulator import Emulator
from krea_dagster.engine.journal.callback_log import CallbackLog, ReceivedCallback
from krea_dagster.errors import ConfigError
from tests.callbacks.callback_flood import (
    EXPECTED,
    KEYS,
    SECRET,
    URLS,
    flood,
    make_journal,
    serving,
    state_of,
)
from tests.callbacks.tls_certificates import TlsCertificates

PATH = URLS.url(KEYS[0]).removeprefix("https://hooks.example.com")
PLAIN = {"trust_env": False, "timeout": 10.0}
HEADERS = {"Authorization": "Bearer emulator"}


def called(file: Path) -> dict[str, ReceivedCallback]:
    with contextlib.closing(CallbackLog.open(f"sqlite:///{file}")) as log:
        return log.received(KEYS)


def test_the_emulators_callbacks_are_recorded_over_tls(tmp_path: Path) -> None:
    """20 tasks: 2 callbacks are missing, 2 doubled, 2 forged; all but the missing are recorded."""
    file = make_journal(tmp_path)
    tls = TlsCertificates.make(tmp_path)
    wanted = KEYS[:20]
    with (
        serving(tmp_path, *tls.options) as running,
        Emulator(
            latency_s=0.01, latency_jitter=0, callbacks_to_private=True, callback_ca=tls.ca
        ) as emulator,
        httpx.Client(base_url=emulator.url, headers=HEADERS, **PLAIN) as client,  # type: ignore[arg-type]  # the same for all
    ):
        assert running.url.startswith("https://127.0.0.1:")
        urls = CallbackUrls(
            running.url.replace("127.0.0.1", "localhost"), SECRET, private_allowed=True
        )
        for name, arg in (("missing", None), ("doubled", None), ("forged", "task")):
            emulator.world.script(f"callback_{name}", 2, arg=arg)
        task_ids = {}
        for number, request_key in enumerate(wanted):
            body = {
                "model": "krea-2-turbo",
                "prompt": f"a fox, {number}",
                "callback_url": urls.url(request_key),
            }
            answer = client.post("/v1/images/generations", json=body)
            task_ids[request_key] = answer.json()["id"]
        ends = time.monotonic() + 10
        while emulator.stats()["callbacks_waiting"]:
            assert time.monotonic() < ends, emulator.stats()
        stats = emulator.stats()
        assert stats["callbacks"] == {"204": 20}
        with httpx.Client(verify=ssl.create_default_context(cafile=tls.ca), **PLAIN) as http:  # type: ignore[arg-type]  # as above
            health = http.get(running.url.replace("127.0.0.1", "localhost") + "/health")
        assert health.status_code == 200
    found = called(file)
    assert set(found) == set(wanted[2:])
    assert [found[key].count for key in wanted[2:]] == [2, 2, *[1] * 16]
    lies = {key for key in found if found[key].task_id != task_ids[key]}
    assert lies == set(wanted[4:6])


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_on_a_signal_and_recorded_calls_are_in_the_journal(
    tmp_path: Path, stop: signal.Signals
) -> None:
    file = make_journal(tmp_path)
    with serving(tmp_path) as running:
        assert httpx.post(running.url + PATH, **PLAIN).status_code == 204  # type: ignore[arg-type]  # as above
        running.process.send_signal(stop)
        running.process.wait(10)
    assert called(file)[KEYS[0]].count == 1


def test_a_flood_of_wrong_calls_changes_nothing_and_needs_no_memory(tmp_path: Path) -> None:
    """3,000 here; ``callback_flood`` sends 100,000 in half a minute."""
    file = make_journal(tmp_path)
    before = state_of(file)
    free = ("--rate", "1e9", "--burst", "1e9", "--trust-proxy", "127.0.0.1")
    with serving(tmp_path, *free) as running:
        outcome = asyncio.run(flood(running, 3000, look_every=1000))
        assert httpx.get(f"{running.url}/health", **PLAIN).status_code == 200  # type: ignore[arg-type]  # as above
        assert running.process.num_fds() < 100
    answers = outcome.answers
    assert {kind: status for kind, status in answers if kind != "good"} == EXPECTED
    assert answers["good", 204] == 30
    hints = sum(n for (_, status), n in answers.items() if status == 204)
    assert sum(call.count for call in called(file).values()) == hints
    assert state_of(file) == before
    assert outcome.rss_mib[3000] - outcome.rss_mib[1000] < 8
    assert running.stderr.read_text() == ""  # a stranger cannot fill a disk with log lines


def test_data_that_is_not_http_or_is_endless_is_cut_off_and_not_logged(tmp_path: Path) -> None:
    make_journal(tmp_path)

    async def cut_off(port: int, *pieces: bytes) -> bool:
        """Return whether the receiver closes the connection, before or after the last byte."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
            await asyncio.wait_for(reader.read(), 5)
        except ConnectionError:
            return True
        else:
            return True
        finally:
            writer.close()

    with serving(tmp_path) as running:
        port = int(running.url.rpartition(":")[2])
        before = running.rss_mib
        for pieces in (
            [b"\x00\x01\x02\r\n\r\n"],
            [b"POST / HTTP/9.9\r\n\r\n"],
            [b"POST /", *[b"a" * 100_000] * 200],
            [b"POST / HTTP/1.1\r\nhost: a\r\n", *[b"a: " + b"b" * 8000 + b"\r\n"] * 2000],
        ):
            assert asyncio.run(cut_off(port, *pieces))
        assert running.rss_mib - before < 8
        assert httpx.post(running.url + PATH, **PLAIN).status_code == 204  # type: ignore[arg-type]  # as above
    assert running.stderr.read_text() == ""


def test_one_client_has_a_rate_limit_and_a_proxy_is_trusted_only_if_named(tmp_path: Path) -> None:
    make_journal(tmp_path)

    def statuses(*options: str) -> list[int]:
        with (
            serving(tmp_path, "--rate", "0.001", "--burst", "1", *options) as running,
            httpx.Client(base_url=running.url, **PLAIN) as client,  # type: ignore[arg-type]  # as above
        ):
            return [
                client.post(PATH, headers={"x-forwarded-for": f"198.51.100.{n}"}).status_code
                for n in (1, 2)
            ]

    assert statuses() == [204, 429]
    assert statuses("--trust-proxy", "127.0.0.1") == [204, 204]


# -- idle connections -------------------------------------------------------------------------

HALF = b"POST /a HTTP/1.1\r\nhost: a\r\n"


class IdleConnections:
    """Connections of one client that never end a request."""

    def __init__(self, url: str, count: int, said: bytes = HALF) -> None:
        self._port = int(url.rpartition(":")[2])
        self.sockets = [self._opened(said) for _ in range(count)]

    def _opened(self, said: bytes) -> socket.socket:
        opened = socket.create_connection(("127.0.0.1", self._port), timeout=20)
        with contextlib.suppress(ConnectionError):  # closed already
            opened.sendall(said)
        return opened

    def closed(self) -> int:
        """Return how many of them the receiver has closed."""
        ready, _, _ = select.select(self.sockets, [], [], 0)
        return len(ready)

    def close(self) -> None:
        for one in self.sockets:
            one.close()


def call(url: str, client: str, path: str = PATH) -> int:
    """Return the status of a good call from an address of this machine."""
    transport = httpx.HTTPTransport(local_address=client)
    with httpx.Client(transport=transport, **PLAIN) as http:  # type: ignore[arg-type]  # as above
        return http.post(url + path).status_code


def test_a_client_with_too_many_connections_is_limited_and_others_are_answered(
    tmp_path: Path,
) -> None:
    make_journal(tmp_path)
    with (
        serving(tmp_path, "--connections", "40", "--header-timeout", "60") as running,
        contextlib.closing(IdleConnections(running.url, 400)) as hoard,
    ):
        assert call(running.url, "127.0.0.2") == 204
        assert hoard.closed() == 360
        with pytest.raises(httpx.TransportError):
            call(running.url, "127.0.0.1")
        hoard.close()
        assert [call(running.url, "127.0.0.1") for _ in range(50)] == [204] * 50
        assert running.stderr.read_text() == ""


@pytest.mark.parametrize("said", [b"", HALF], ids=["nothing", "half a request"])
def test_connections_without_a_request_in_time_are_closed(tmp_path: Path, said: bytes) -> None:
    make_journal(tmp_path)
    with (
        serving(tmp_path, "--connections", "40", "--header-timeout", "0.5") as running,
        contextlib.closing(IdleConnections(running.url, 40, said)) as hoard,
    ):
        for one in hoard.sockets:
            with contextlib.suppress(ConnectionError):
                assert one.recv(1) == b"", "it waits for its end"
        assert call(running.url, "127.0.0.1") == 204


def test_a_client_that_sends_a_byte_now_and_then_is_cut_off_too(tmp_path: Path) -> None:
    make_journal(tmp_path)
    unread = b"POST /a HTTP/1.1\r\nhost: a\r\ncontent-length: 60000\r\n\r\n"
    with serving(tmp_path, "--header-timeout", "0.5") as running:
        for said in (HALF, unread):
            with contextlib.closing(IdleConnections(running.url, 1, said)) as hoard:
                (one,) = hoard.sockets
                with contextlib.suppress(ConnectionError):
                    for _ in range(1000):
                        one.sendall(b"a")
                        if select.select([one], [], [], 0.05)[0] and not one.recv(1000):
                            break
                    else:
                        pytest.fail("uvicorn alone would never close it")


def test_a_trusted_proxy_has_no_connection_limit(tmp_path: Path) -> None:
    make_journal(tmp_path)
    options = ("--connections", "1", "--trust-proxy", "127.0.0.0/8")
    with (
        serving(tmp_path, *options) as running,
        contextlib.closing(IdleConnections(running.url, 20)) as hoard,
    ):
        assert call(running.url, "127.0.0.1") == 204
        assert hoard.closed() == 0


# -- usage errors -----------------------------------------------------------------------------


def invoke(*options: str, secret: str | None = SECRET) -> tuple[int, str, BaseException | None]:
    environment = {"KREA_CALLBACK_SECRET": secret}
    result = CliRunner().invoke(callbacks_command, ["serve", *options], env=environment)
    return result.exit_code, result.output, result.exception


def test_it_does_not_create_a_journal_because_a_wrong_one_would_know_no_request(
    tmp_path: Path,
) -> None:
    _, _, error = invoke("--storage", str(tmp_path))
    assert isinstance(error, ConfigError)
    assert "the journal does not exist yet" in str(error)
    assert list(tmp_path.iterdir()) == []


def test_a_storage_url_needs_a_journal_url() -> None:
    _, _, error = invoke("--storage", "memory://bucket/krea")
    assert isinstance(error, ConfigError)
    assert "KREA_JOURNAL_URL" in str(error)


def test_a_missing_secret_names_its_variable(tmp_path: Path) -> None:
    make_journal(tmp_path)
    _, _, error = invoke("--storage", str(tmp_path), "--port", "0", secret=None)
    assert isinstance(error, ConfigError)
    assert "KREA_CALLBACK_SECRET" in str(error)


def test_a_certificate_without_its_key_is_a_usage_error(tmp_path: Path) -> None:
    cert = tmp_path / "cert.pem"
    cert.write_text("")
    code, output, _ = invoke("--tls-cert", str(cert))
    assert (code, "must be given together" in output) == (2, True)


def test_a_taken_port_is_a_usage_error(tmp_path: Path) -> None:
    make_journal(tmp_path)
    with serving(tmp_path) as running:
        code, output, _ = invoke(
            "--storage", str(tmp_path), "--port", running.url.rpartition(":")[2]
        )
    assert (code, "cannot listen" in output) == (2, True)


def test_help_lists_the_required_settings() -> None:
    result = CliRunner().invoke(callbacks_command, ["serve", "--help"])
    assert result.exit_code == 0
    for word in (
        "--host", "--port", "--storage", "--journal", "--secret-file", "--tls-cert", "--tls-key",
        "--trust-proxy", "--rate", "--burst", "--connections", "--header-timeout",
        "KREA_CALLBACK_SECRET", "BASE/health",
    ):  # fmt: skip
        assert word in result.output
