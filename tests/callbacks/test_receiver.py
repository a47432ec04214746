"""The receiver: each call is recorded or refused, and its content is not trusted."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from krea_dagster.callbacks import CallbackUrls, Receiver
from krea_dagster.callbacks.receiver import MAX_BODY_BYTES, claimed_task_id
from krea_dagster.errors import ConfigError, JournalError
from tests.manual_clock import ManualClock

SECRET = "f3a1" * 16
BASE = "https://hooks.example.com"
URLS = CallbackUrls(BASE, SECRET)
KEY, OTHER, UNKNOWN = "a" * 64, "b" * 64, "c" * 64
TASK_ID = "task-unified-1800000000-abcdefgh"
SAID = {"id": TASK_ID, "status": "completed", "results": ["https://files.example.com/1.png"]}


class FakeCallbackLog:
    """A callback log that may be slow or fail."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[str, str | None]]] = []
        self.error: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()

    def remember(self, calls: Sequence[tuple[str, str | None]]) -> Collection[str]:
        self.batches.append(list(calls))
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        return {key for key, _ in calls} - {UNKNOWN}

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    @property
    def calls(self) -> list[tuple[str, str | None]]:
        return [call for batch in self.batches for call in batch]


@pytest.fixture
def log() -> FakeCallbackLog:
    return FakeCallbackLog()


def receiver(log: FakeCallbackLog, **settings: Any) -> Receiver:
    return Receiver(SECRET, log.remember, check=log.check, **settings)


def ask(app: Any, method: str, url: str, client: str = "192.0.2.1", **sent: Any) -> httpx.Response:
    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, client=(client, 1))
        async with httpx.AsyncClient(transport=transport) as http:
            return await http.request(method, url, **sent)

    return asyncio.run(asked())


def post(app: Any, url: str | None = None, **sent: Any) -> int:
    if not sent.keys() & {"json", "content"}:
        sent["json"] = SAID
    return ask(app, "POST", url or URLS.url(KEY), **sent).status_code


# -- recorded calls ---------------------------------------------------------------------------


def test_a_call_gets_204_once_it_is_recorded(log: FakeCallbackLog) -> None:
    answer = ask(receiver(log), "POST", URLS.url(KEY), json=SAID)
    assert (answer.status_code, answer.content) == (204, b"")
    assert log.calls == [(KEY, TASK_ID)]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not JSON",
        b"\xff\xfe",
        b"[" * 50_000,
        b"9" * 50_000,
        b'{"id": 7}',
        b'{"id": "a b"}',
        b'{"id": "' + b"a" * 129 + b'"}',
        b'["task"]',
        b"NaN",
    ],
)
def test_a_call_with_a_meaningless_body_is_still_recorded(
    log: FakeCallbackLog, body: bytes
) -> None:
    assert post(receiver(log), content=body) == 204
    assert log.calls == [(KEY, None)]


def test_the_task_id_of_a_body_is_bounded() -> None:
    assert claimed_task_id(json.dumps({"id": "a" * 128}).encode()) == "a" * 128
    for wrong in ("a" * 129, "a\x00", "ä", "", "a'; drop table requests", "a\nb"):
        assert claimed_task_id(json.dumps({"id": wrong}).encode()) is None


def test_repeated_and_late_calls_are_recorded_like_the_first(log: FakeCallbackLog) -> None:
    app = receiver(log)
    assert [post(app) for _ in range(3)] == [204] * 3
    assert log.calls == [(KEY, TASK_ID)] * 3


# -- refused calls ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/health/x",
        f"/{'0' * 32}/{KEY}.{'0' * 32}",
        URLS.url(KEY).removeprefix(BASE)[:-1] + "g",
        URLS.url(KEY).removeprefix(BASE).upper(),
        URLS.url(KEY).removeprefix(BASE).replace(KEY, OTHER),
        CallbackUrls(BASE, "9b07" * 16).url(KEY).removeprefix(BASE),
        URLS.url(KEY).removeprefix(BASE) + "/more",
        "/" + "a" * 5000,
    ],
)
def test_a_wrong_token_is_404_without_a_reason_and_without_a_log_line(
    log: FakeCallbackLog, path: str
) -> None:
    answer = ask(receiver(log), "POST", BASE + path, json=SAID)
    assert (answer.status_code, answer.content) == (404, b"")
    assert log.calls == []


def test_a_request_that_the_journal_does_not_know_is_404(log: FakeCallbackLog) -> None:
    assert post(receiver(log), URLS.url(UNKNOWN)) == 404


def test_anything_but_post_is_405_whether_the_token_is_right_or_not(log: FakeCallbackLog) -> None:
    app = receiver(log)
    for url in (URLS.url(KEY), f"{BASE}/{'0' * 32}/{KEY}.{'0' * 32}"):
        for method in ("GET", "PUT", "DELETE", "OPTIONS"):
            answer = ask(app, method, url)
            assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert log.calls == []


def test_a_body_above_64_kib_is_413_and_not_recorded(log: FakeCallbackLog) -> None:
    app = receiver(log)
    whole = json.dumps({**SAID, "more": "a" * MAX_BODY_BYTES}).encode()

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(whole), 4096):
            yield whole[at : at + 4096]

    assert post(app, content=whole) == 413
    assert post(app, content=pieces()) == 413  # without a declared length
    assert post(app, content=b"a" * MAX_BODY_BYTES) == 204
    assert log.calls == [(KEY, None)]


def test_an_endless_body_is_read_only_up_to_the_limit(log: FakeCallbackLog) -> None:
    read = 0

    async def receive() -> dict[str, Any]:
        nonlocal read
        read += 1
        return {"type": "http.request", "body": b"a" * 1024, "more_body": True}

    assert status_of(receiver(log), receive) == 413
    assert read == MAX_BODY_BYTES // 1024 + 1


def test_a_wrong_token_is_refused_before_its_body_is_read(log: FakeCallbackLog) -> None:
    async def receive() -> dict[str, Any]:
        raise AssertionError("the body was read")

    assert status_of(receiver(log), receive, path="/unknown") == 404


def test_a_body_that_takes_too_long_is_408(log: FakeCallbackLog) -> None:
    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    assert status_of(receiver(log, body_timeout_s=0.01), receive) == 408
    assert log.calls == []


def test_a_call_is_recorded_although_its_caller_leaves_early(log: FakeCallbackLog) -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    assert status_of(receiver(log), receive) == 204
    assert log.calls == [(KEY, None)]


def status_of(
    app: Receiver, receive: Callable[[], Any], path: str = URLS.url(KEY).removeprefix(BASE)
) -> int:
    """Return the status for a body that comes from ``receive``."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope: dict[str, Any] = {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": [],
        "client": None,
    }
    asyncio.run(app(scope, receive, send))
    return int(sent[0]["status"])


# -- limits -----------------------------------------------------------------------------------


def test_a_client_above_its_rate_gets_429_until_its_bucket_fills(log: FakeCallbackLog) -> None:
    clock = ManualClock()
    app = receiver(log, rate_per_s=1, burst=2, monotonic=clock)
    assert [post(app) for _ in range(3)] == [204, 204, 429]
    assert post(app, client="192.0.2.2") == 204
    clock.now_s += 1
    assert [post(app) for _ in range(2)] == [204, 429]


def test_wrong_tokens_do_not_use_up_the_limit_of_right_ones_behind_the_same_proxy(
    log: FakeCallbackLog,
) -> None:
    app = receiver(log, rate_per_s=1, burst=2, monotonic=ManualClock())
    assert [post(app, f"{BASE}/unknown") for _ in range(4)] == [404, 404, 429, 429]
    assert post(app) == 204


# -- a burst ----------------------------------------------------------------------------------


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(100_000):
        if condition():
            return
        await asyncio.sleep(0.0001)
    raise AssertionError("it did not come to that")


def test_calls_that_arrive_during_a_commit_are_one_next_commit(log: FakeCallbackLog) -> None:
    app = receiver(log)
    urls = CallbackUrls(BASE, SECRET)

    async def burst() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app)) as http:
            log.gate.clear()
            calls = [asyncio.create_task(http.post(urls.url(KEY)))]
            await until(lambda: len(log.calls) == 1)
            calls += [
                asyncio.create_task(http.post(urls.url(f"{number:064x}"))) for number in range(299)
            ]
            await until(lambda: len(log.calls) + len(app._batcher._waiting) == 300)
            log.gate.set()
            return [answer.status_code for answer in await asyncio.gather(*calls)]

    assert asyncio.run(burst()) == [204] * 300
    assert [len(batch) for batch in log.batches] == [1, 299]


def test_a_caller_that_leaves_does_not_affect_others(log: FakeCallbackLog) -> None:
    app = receiver(log)

    async def leave() -> list[Any]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app)) as http:
            log.gate.clear()
            calls = [asyncio.create_task(http.post(URLS.url(key))) for key in (KEY, OTHER)]
            await until(lambda: len(log.calls) + len(app._batcher._waiting) == 2)
            calls[0].cancel()
            calls[1].cancel()
            log.gate.set()
            last = await http.post(URLS.url(KEY))
            return [last.status_code, *await asyncio.gather(*calls, return_exceptions=True)]

    status, *left = asyncio.run(leave())
    assert status == 204
    assert [type(one) for one in left] == [asyncio.CancelledError] * 2
    assert {key for key, _ in log.calls} == {KEY, OTHER}


# -- a failing journal ------------------------------------------------------------------------


def test_a_failing_journal_is_503_so_that_evolink_calls_again(
    log: FakeCallbackLog, caplog: pytest.LogCaptureFixture
) -> None:
    app = receiver(log)
    log.error = JournalError("the disk is full")
    with caplog.at_level(logging.DEBUG):
        assert [post(app) for _ in range(5)] == [503] * 5
        log.error = None
        assert post(app) == 204
    assert [record.levelname for record in caplog.records if "disk is full" in record.message] == [
        "ERROR"
    ]


def test_health_reports_whether_calls_can_be_recorded_and_checks_the_journal_once_a_second(
    log: FakeCallbackLog,
) -> None:
    clock = ManualClock()
    app = receiver(log, monotonic=clock)
    assert ask(app, "GET", f"{BASE}/health").status_code == 200
    log.error = JournalError("gone")
    assert ask(app, "GET", f"{BASE}/health").status_code == 200
    clock.now_s += 1.5
    assert ask(app, "GET", f"{BASE}/health").status_code == 503
    log.error = None
    clock.now_s += 1.5
    assert ask(app, "HEAD", f"{BASE}/health").status_code == 200


# -- mounting and logging ---------------------------------------------------------------------


def test_it_can_be_mounted_under_a_path_of_another_application(log: FakeCallbackLog) -> None:
    app = Starlette(routes=[Mount("/krea", receiver(log))])
    url = CallbackUrls(f"{BASE}/krea", SECRET).url(KEY)
    assert post(app, url) == 204
    assert ask(app, "GET", f"{BASE}/krea/health").status_code == 200
    assert log.calls == [(KEY, TASK_ID)]


def test_nothing_of_a_path_or_a_body_is_logged(
    log: FakeCallbackLog, caplog: pytest.LogCaptureFixture
) -> None:
    app = receiver(log)
    with caplog.at_level(logging.DEBUG, logger="krea_dagster"):
        post(app)
        post(app, f"{BASE}/unknown")
        post(app, content=b"a-word-of-the-body")
        log.error = JournalError("full")
        post(app, content=b"a-word-of-the-body")
    ours = " ".join(one.message for one in caplog.records if one.name.startswith("krea_dagster"))
    assert KEY not in ours
    assert "a-word-of-the-body" not in ours
    assert SECRET not in ours


def test_a_weak_secret_is_refused_at_the_start(log: FakeCallbackLog) -> None:
    with pytest.raises(ConfigError, match="KREA_CALLBACK_SECRET"):
        Receiver("short", log.remember)
