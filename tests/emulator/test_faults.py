"""Every fault has its effect, is used up when it strikes, and can be requested in each way."""

from __future__ import annotations

import email.utils
import io
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from krea_dagster.emulator import FAULTS, Emulator, UnknownFaultError
from krea_dagster.emulator.faults import FaultOption, markers, parse_fault_option
from tests.emulator.harness import PLAIN, Clock, EmulatorClient, running

KEY = "key-0000000000000001"


@pytest.fixture
def client(tmp_path: Path) -> Iterator[EmulatorClient]:
    with running(tmp_path / "state") as made:
        yield made


# -- one request of each kind -----------------------------------------------------------------


def ask(client: EmulatorClient, kind: str, read_timeout_s: float = 60.0) -> httpx.Response:
    """Send one request of a kind, for a finished task if it needs one."""
    timeout = httpx.Timeout(60, read=read_timeout_s)
    if kind == "create":
        return client.post(key=KEY)
    task_id = client.finished() if not client.stats()["creates"] else first_task(client)
    if kind == "read":
        return client.http.get(f"/v1/tasks/{task_id}", timeout=timeout)
    if kind == "batch":
        body = {"task_ids": [task_id]}
        return client.http.post("/v1/tasks/batch", json=body, timeout=timeout)
    if kind == "file":
        link = f"{client.emulator.url}{client.world.link_path(_task(client, task_id))}"
        return client.anonymous.get(link, timeout=timeout)
    return client.http.get({"list": "/v1/tasks", "credits": "/v1/credits"}[kind], timeout=timeout)


def first_task(client: EmulatorClient) -> str:
    return str(client.stats()["tasks"][0]["task_id"])


def _task(client: EmulatorClient, task_id: str) -> Any:
    account = client.world.account("emulator")
    assert account is not None
    return client.world.task(task_id, account)


def creates(client: EmulatorClient) -> int:
    return int(client.stats()["creates"])


# -- faults of any request --------------------------------------------------------------------


def raises(error: type[Exception], client: EmulatorClient, kind: str) -> None:
    with pytest.raises(error):
        ask(client, kind)


def answers(status: int, client: EmulatorClient, kind: str, **expected: Any) -> httpx.Response:
    answer = ask(client, kind)
    assert answer.status_code == status
    for name, value in expected.items():
        assert answer.json()["error"][name] == value
    return answer


def html(status: int, client: EmulatorClient, kind: str) -> None:
    answer = answers(status, client, kind)
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.text.startswith("<!DOCTYPE html>")


def internal_error(client: EmulatorClient, kind: str) -> None:
    answer = answers(500, client, kind)
    if kind != "file":
        assert answer.json()["error"]["code"] == "internal_error"
        assert answer.json()["error"]["type"] == "api_error"


def too_busy(client: EmulatorClient, kind: str) -> None:
    answer = answers(429, client, kind, code="rate_limit_exceeded")
    assert answer.headers["retry-after"] == "1"


def too_busy_date(client: EmulatorClient, kind: str) -> None:
    answer = answers(429, client, kind)
    when = email.utils.parsedate_to_datetime(answer.headers["retry-after"])
    assert when.timestamp() == int(client.clock.now_s + 1)


def too_busy_bare(client: EmulatorClient, kind: str) -> None:
    assert "retry-after" not in answers(429, client, kind).headers


def empty(client: EmulatorClient, kind: str) -> None:
    assert answers(429, client, kind).content == b""


def late(client: EmulatorClient, kind: str) -> None:
    with pytest.raises(httpx.ReadTimeout):
        ask(client, kind, read_timeout_s=0.05)


TRANSPORT: dict[str, Callable[[EmulatorClient, str], None]] = {
    "drop": partial(raises, httpx.RemoteProtocolError),
    "reset": partial(raises, httpx.ReadError),
    "garbage": partial(raises, httpx.RemoteProtocolError),
    "500": internal_error,
    "502_html": partial(html, 502),
    "503": partial(html, 503),
    "524_html": partial(html, 524),
}
TOO_BUSY: dict[str, Callable[[EmulatorClient, str], None]] = {
    "429": too_busy,
    "429_date": too_busy_date,
    "429_no_retry_after": too_busy_bare,
    "429_empty": empty,
}
QUESTION: dict[str, Callable[[EmulatorClient, str], None]] = {
    **TRANSPORT,
    **TOO_BUSY,
    "delay": late,
    "html_200": partial(html, 200),
}


def no_task(check: Callable[[EmulatorClient, str], Any], client: EmulatorClient) -> None:
    """Check that no task exists, and that a repeat with the same key creates it."""
    check(client, "create")
    assert creates(client) == 0
    answer = client.post(key=KEY)
    assert answer.status_code == 200
    assert "idempotency-replayed" not in answer.headers


def one_task(check: Callable[[EmulatorClient, str], Any], client: EmulatorClient) -> None:
    """Check that the task exists, and that a repeat with the same key finds it."""
    check(client, "create")
    assert creates(client) == 1
    answer = client.post(key=KEY)
    assert answer.headers["idempotency-replayed"] == "true"
    assert answer.json()["id"] == first_task(client)
    assert creates(client) == 1


# -- create faults ----------------------------------------------------------------------------


def refused(
    status: int, code: str | int, kind: str, client: EmulatorClient, route: str = "create"
) -> None:
    said = answers(status, client, route).json()["error"]
    assert (said["code"], said["type"]) == (code, kind)


def redirected_create(client: EmulatorClient, kind: str) -> None:
    answer = answers(307, client, kind)
    assert answer.headers["location"].startswith(client.emulator.url)


def without_id(client: EmulatorClient, kind: str) -> None:
    answer = answers(200, client, kind)
    assert "id" not in answer.json()
    assert answer.json()["status"] == "pending"


def delayed_create(client: EmulatorClient) -> None:
    body = {"model": "krea-2-turbo", "prompt": "a fox", "seed": 7}
    with pytest.raises(httpx.ReadTimeout):
        client.http.post(
            "/v1/images/generations",
            json=body,
            headers={"Idempotency-Key": KEY},
            timeout=httpx.Timeout(60, read=0.5),
        )
    assert creates(client) == 1
    assert client.post(key=KEY).json()["error"]["code"] == "paid_outcome_unknown"
    client.clock.move(5)
    assert client.post(key=KEY).headers["idempotency-replayed"] == "true"


def undecided(client: EmulatorClient) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        client.post(key=KEY)
    assert creates(client) == 1
    for _ in range(2):
        answer = client.post(key=KEY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "paid_outcome_unknown")
        client.clock.move(30)
    assert client.post(key=KEY).headers["idempotency-replayed"] == "true"
    assert creates(client) == 1


def taken(client: EmulatorClient) -> None:
    for _ in range(2):
        answer = client.post(key=KEY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "idempotency_conflict")
    assert creates(client) == 0
    assert client.post(key="key-of-the-next-try-2").status_code == 200
    client.world.script("idempotency_conflict")
    again = client.post(key="key-of-the-next-try-2")
    assert again.headers["idempotency-replayed"] == "true"


def key_ignored(client: EmulatorClient) -> None:
    first = client.post(key=KEY)
    assert client.world.unconsumed() == []
    client.world.script("ignore_idempotency")
    second = client.post(key=KEY)
    assert first.json()["id"] != second.json()["id"]
    assert creates(client) == 2
    assert client.post(key=KEY).json()["id"] == first.json()["id"]


# -- task faults ------------------------------------------------------------------------------


def read_after(client: EmulatorClient, seconds: float = 10) -> dict[str, Any]:
    client.create()
    client.clock.move(seconds)
    return dict(client.read(first_task(client)).json())


def units(client: EmulatorClient) -> tuple[int, int, int]:
    stats = client.stats()
    return stats["held_units"], stats["charged_units"], stats["returned_units"]


def fails(code: str, client: EmulatorClient) -> None:
    body = read_after(client)
    assert (body["status"], body["progress"]) == ("failed", 0)
    assert (body["error"]["code"], body["error"]["type"]) == (code, "task_error")
    assert "results" not in body
    assert units(client) == (0, 0, 4_500)


def fails_bare(client: EmulatorClient) -> None:
    body = read_after(client)
    assert set(body) == {"id", "object", "status", "model", "progress", "error"}
    assert set(body["error"]) == {"code", "message"}
    assert "\n" in body["error"]["message"]
    assert units(client) == (0, 0, 4_500)


def cancelled(client: EmulatorClient) -> None:
    body = read_after(client)
    assert body["status"] == "cancelled"
    assert "results" not in body
    assert units(client) == (0, 0, 4_500)


def never_ends(status: str, client: EmulatorClient) -> None:
    assert read_after(client, 10_000)["status"] == status
    assert units(client) == (4_500, 0, 0)


def slow(client: EmulatorClient) -> None:
    assert read_after(client, 31)["status"] == "processing"
    client.clock.move(1)
    assert client.read(first_task(client)).json()["status"] == "completed"


def no_results(client: EmulatorClient) -> None:
    body = read_after(client)
    assert body["status"] == "completed"
    assert "results" not in body
    assert len(client.read(first_task(client)).json()["results"]) == 1


def unknown_status(client: EmulatorClient) -> None:
    assert read_after(client, 1)["status"] == "queued"
    client.clock.move(1)
    assert client.read(first_task(client)).json()["status"] == "completed"


def vanished(client: EmulatorClient) -> None:
    assert read_after(client)["error"]["code"] == "task_not_found"
    body = {"task_ids": [first_task(client)]}
    assert client.http.post("/v1/tasks/batch", json=body).json()["data"] == []
    assert units(client) == (0, 4_500, 0)


def with_usage(client: EmulatorClient) -> None:
    usage = read_after(client)["usage"]
    assert usage["credits_used"] == usage["cost"]["credits"] == 0.45


def bad_link(link: str, client: EmulatorClient) -> None:
    assert read_after(client)["results"] == [link]


def dear(client: EmulatorClient) -> None:
    client.create()
    assert units(client) == (30_000, 0, 0)


def repeated_id(client: EmulatorClient) -> None:
    first = client.create()  # the account's first, so that its own id is named
    client.world.script("repeated_id")
    assert client.create(prompt="another") == first
    assert client.emulator.stats()["creates"] == 2


def all_failed(client: EmulatorClient) -> None:
    task_id = client.finished()
    said = client.http.post("/v1/tasks/batch", json={"task_ids": [task_id]}).json()["data"]
    assert [task["status"] for task in said] == ["failed"]
    assert client.http.get(f"/v1/tasks/{task_id}").json()["status"] == "completed"


def same(client: EmulatorClient) -> None:
    assert image(good_bytes(client)) == ("PNG", (1024, 1024))


# -- file faults ------------------------------------------------------------------------------


def good_bytes(client: EmulatorClient) -> bytes:
    answer = ask(client, "file")
    assert answer.status_code == 200
    return answer.content


def image(content: bytes) -> tuple[str | None, tuple[int, int]]:
    with Image.open(io.BytesIO(content)) as opened:
        opened.load()
        return opened.format, opened.size


def redirected(client: EmulatorClient) -> None:
    answer = ask(client, "file")
    assert answer.status_code == 302
    assert image(client.anonymous.get(answer.headers["location"]).content) == ("PNG", (1024, 1024))


def redirected_to(link: str, client: EmulatorClient) -> None:
    answer = ask(client, "file")
    assert (answer.status_code, answer.headers["location"]) == (302, link)


def redirect_loop(client: EmulatorClient) -> None:
    answer = ask(client, "file")
    assert (answer.status_code, answer.headers["location"]) == (302, str(answer.request.url))


def truncated(client: EmulatorClient) -> None:
    with pytest.raises(httpx.RemoteProtocolError, match="without sending complete"):
        ask(client, "file")
    assert good_bytes(client)


def cut(client: EmulatorClient) -> None:
    answer = ask(client, "file")
    assert int(answer.headers["content-length"]) == len(answer.content)
    whole = good_bytes(client)
    assert whole.startswith(answer.content)
    assert len(answer.content) < len(whole)


def empty_file(client: EmulatorClient) -> None:
    assert good_bytes(client) == b""


def jpeg(client: EmulatorClient) -> None:
    answer = ask(client, "file")
    assert answer.headers["content-type"] == "image/png"
    assert answer.request.url.path.endswith(".png")
    assert image(answer.content) == ("JPEG", (1024, 1024))


def octet_stream(client: EmulatorClient) -> None:
    answer = ask(client, "file")
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.content == good_bytes(client)


def black(client: EmulatorClient) -> None:
    with Image.open(io.BytesIO(good_bytes(client))) as opened:
        assert opened.size == (1024, 1024)
        assert opened.getextrema() == ((0, 0), (0, 0), (0, 0))


def half(client: EmulatorClient) -> None:
    assert image(good_bytes(client)) == ("PNG", (512, 512))


def endless(client: EmulatorClient) -> None:
    ask(client, "credits")
    task = _task(client, client.finished())
    url = f"{client.emulator.url}{client.world.link_path(task)}"
    received = 0
    with httpx.Client(**PLAIN) as http, http.stream("GET", url) as answer:
        assert "content-length" not in answer.headers
        for piece in answer.iter_bytes():
            received += len(piece)
            if received > 20_000_000:
                break
    assert received > 20_000_000


def bomb(client: EmulatorClient) -> None:
    content = good_bytes(client)
    assert len(content) < 100_000
    assert struct.unpack(">II", content[16:24]) == (60_000, 60_000)


def noise(client: EmulatorClient) -> None:
    with pytest.raises(OSError, match="cannot identify"):
        image(good_bytes(client))


def file_status(status: int, client: EmulatorClient) -> None:
    assert ask(client, "file").status_code == status
    assert good_bytes(client)


def no_success(client: EmulatorClient) -> None:
    answer = answers(200, client, "credits")
    assert answer.json()["success"] is False


def calls_planned(wanted: list[tuple[float, str]], client: EmulatorClient) -> None:
    """test_callback_sender.py tests the calls themselves."""
    client.create(callback_url="https://hooks.example.com/hook")
    planned = client.world.due_callbacks(3)
    assert [(round(c.due_at - client.clock(), 3), c.forged) for c in planned] == wanted


Check = Callable[[EmulatorClient], Any]

CHECKS: dict[str, Check] = {
    **{
        f"{name}_before_create" if name in ("drop", "reset", "garbage") else name: partial(
            no_task, check
        )
        for name, check in TRANSPORT.items()
    },
    **{f"{name}_after_create": partial(one_task, check) for name, check in TRANSPORT.items()},
    **{name: partial(no_task, check) for name, check in TOO_BUSY.items()},
    "capacity_400": partial(
        no_task, partial(refused, 400, "no_available_channel", "invalid_request_error")
    ),
    "integer_code": partial(no_task, partial(refused, 503, 503, "upstream_error")),
    "upper_case_code": partial(no_task, partial(refused, 400, "INVALID_REQUEST", "")),
    "unauthorized": partial(no_task, partial(refused, 401, "unauthorized", "authentication_error")),
    "insufficient_quota": partial(
        no_task, partial(refused, 402, "insufficient_quota", "insufficient_quota")
    ),
    "model_denied": partial(
        no_task, partial(refused, 403, "model_access_denied", "invalid_request_error")
    ),
    "content_refused": partial(
        no_task, partial(refused, 400, "content_policy_violation", "invalid_request_error")
    ),
    "too_large_413": partial(no_task, partial(answers, 413)),
    "unsupported_415": partial(no_task, partial(answers, 415)),
    "redirect_create": partial(no_task, redirected_create),
    "delay_create": delayed_create,
    "no_id": partial(one_task, without_id),
    "html_200": partial(one_task, partial(html, 200)),
    "paid_outcome_unknown": undecided,
    "idempotency_conflict": taken,
    "ignore_idempotency": key_ignored,
    "fail": partial(fails, "service_error"),
    "fail_bare": fails_bare,
    "unknown_error_code": partial(fails, "engine_misaligned"),
    "cancelled": cancelled,
    "stuck": partial(never_ends, "processing"),
    "slow_task": slow,
    "no_results": no_results,
    "unknown_status": unknown_status,
    "unknown_final_status": partial(never_ends, "archived"),
    "vanished": vanished,
    "with_usage": with_usage,
    "private_link": partial(bad_link, "http://10.0.0.1/file.png"),
    "file_link": partial(bad_link, "file:///etc/hostname"),
    **{
        f"{kind}_{name}": partial(check, kind=kind)  # type: ignore[call-arg]  # all have this parameter
        for kind in ("read", "batch", "list", "credits", "file")
        for name, check in QUESTION.items()
    },
    **{
        f"{route}_401": partial(refused, 401, "unauthorized", "authentication_error", route=route)
        for route in ("read", "credits")
    },
    **{
        f"{route}_402": partial(refused, 402, "quota_exceeded", "insufficient_quota", route=route)
        for route in ("read", "credits")
    },
    "read_403": partial(refused, 403, "permission_denied", "invalid_request_error", route="read"),
    "read_404": partial(refused, 404, "task_not_found", "invalid_request_error", route="read"),
    "no_batch": partial(answers, 404, kind="batch"),
    "no_list": partial(answers, 404, kind="list"),
    "credits_no_success": no_success,
    "price": dear,
    "repeated_id": repeated_id,
    "batch_failed": all_failed,
    "same_file": same,
    "file_403": partial(file_status, 403),
    "file_404": partial(file_status, 404),
    "expired_link": partial(file_status, 403),
    "redirect": redirected,
    "redirect_private": partial(redirected_to, "http://10.0.0.1/file.png"),
    "redirect_file": partial(redirected_to, "file:///etc/hostname"),
    "redirect_loop": redirect_loop,
    "truncated": truncated,
    "cut_file": cut,
    "empty_file": empty_file,
    "jpeg_as_png": jpeg,
    "octet_stream": octet_stream,
    "black": black,
    "wrong_dimensions": half,
    "endless": endless,
    "bomb": bomb,
    "not_an_image": noise,
    "callback_late": partial(calls_planned, [(7.0, "")]),
    "callback_doubled": partial(calls_planned, [(2.0, ""), (2.0, "")]),
    "callback_missing": partial(calls_planned, []),
    "callback_forged": partial(calls_planned, [(2.0, "status")]),
}


def test_every_fault_has_a_test_below() -> None:
    assert set(CHECKS) == set(FAULTS)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_has_its_documented_effect_and_is_used_up(
    client: EmulatorClient, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    client.world.script(name)
    CHECKS[name](client)
    assert client.world.unconsumed() == []
    assert capfd.readouterr().err == ""  # no traceback, also if the connection broke


# -- ways to request a fault ------------------------------------------------------------------


def test_a_scripted_fault_strikes_n_times_and_then_stops(client: EmulatorClient) -> None:
    client.world.script("500", 2)
    assert [client.post().status_code for _ in range(3)] == [500, 500, 200]


def test_scripted_faults_strike_in_the_order_in_which_they_were_scripted(
    client: EmulatorClient,
) -> None:
    for name in ("503", "500", "502_html"):
        client.world.script(name)
    assert [client.post().status_code for _ in range(3)] == [503, 500, 502]


def test_a_scripted_fault_waits_for_the_prompt_that_it_is_bound_to(client: EmulatorClient) -> None:
    client.world.script("500", match="bear")
    client.world.script("fail", match="bear")
    client.world.script("read_404", match="bear")
    client.world.script("black", match="bear")
    fox = client.finished("a fox")
    assert client.fetch(fox).status_code == 200
    assert len(client.world.unconsumed()) == 4
    assert client.post("a bear").status_code == 500
    bear = client.finished("a bear")
    assert client.read(bear).status_code == 404
    assert client.read(bear).json()["status"] == "failed"
    assert client.world.unconsumed() == [{"name": "black", "n": 1, "match": "bear", "arg": None}]


def test_a_task_fault_is_not_used_up_by_a_replay_or_a_refusal(client: EmulatorClient) -> None:
    client.post(key=KEY)
    client.world.script("fail")
    client.post(key=KEY)
    client.post(size="7:5")
    assert [one["name"] for one in client.world.unconsumed()] == ["fail"]


def test_the_argument_of_a_fault_refines_it(client: EmulatorClient) -> None:
    client.world.script("insufficient_quota", arg="token_daily_quota_exceeded")
    assert client.post().json()["error"]["code"] == "token_daily_quota_exceeded"
    client.world.script("no_results", arg=2)
    task_id = client.finished()
    assert ["results" in client.read(task_id).json() for _ in range(3)] == [False, False, True]


def test_a_rate_strikes_its_share_and_the_same_requests_with_the_same_seed(tmp_path: Path) -> None:
    def struck(folder: str, seed: int) -> list[int]:
        with Emulator(
            state=tmp_path / folder, clock=Clock(), seed=seed, faults={"500": 0.3}
        ) as emulator:
            client = EmulatorClient(emulator, Clock())
            codes = [client.post().status_code for _ in range(40)]
            client.close()
            return codes

    first = struck("a", 1)
    assert 6 <= first.count(500) <= 18
    assert struck("b", 1) == first
    assert struck("c", 2) != first


def test_faults_can_be_set_at_run_time_over_http(client: EmulatorClient) -> None:
    url = f"{client.emulator.url}/emulator/faults"
    wanted = {
        "script": [{"name": "500", "n": 2, "match": "fox"}],
        "rates": {"read_404": 1},
        "quota_credits": 0.45,
    }
    said = client.anonymous.post(url, json=wanted).json()
    assert said["unconsumed"] == [{"name": "500", "n": 2, "match": "fox", "arg": None}]
    assert said["rates"] == {"read_404": 1}
    assert [client.post().status_code for _ in range(4)] == [500, 500, 200, 402]
    assert client.read(first_task(client)).status_code == 404
    assert client.anonymous.post(url, json={"clear": True}).json() == {
        "unconsumed": [],
        "rates": {},
    }
    assert client.read(first_task(client)).status_code == 200


@pytest.mark.parametrize(
    "wanted",
    [
        {"script": [{"name": "no_such_fault"}]},
        {"script": [{}]},
        {"script": [{"name": "500", "n": 0}]},
        {"script": [{"name": "500", "arg": "x"}]},
        {"script": [{"name": "delay_create", "arg": "soon"}]},
        {"script": [{"name": "batch_500", "match": "fox"}]},
        {"rates": {"500": 2}},
        {"rates": {"no_such_fault": 1}},
        [],
    ],
)
def test_a_list_with_a_wrong_fault_is_refused_as_a_whole(
    client: EmulatorClient, wanted: object
) -> None:
    answer = client.anonymous.post(f"{client.emulator.url}/emulator/faults", json=wanted)
    assert answer.status_code == 400
    assert client.world.unconsumed() == []
    assert client.world.rates() == {}


def test_the_quota_ends_buying_after_its_credits(client: EmulatorClient) -> None:
    client.world.set_quota(1.0)
    assert [client.post(f"{n}").status_code for n in range(3)] == [200, 200, 402]
    client.world.set_quota(None)
    assert client.post().status_code == 200


# -- markers in prompts -----------------------------------------------------------------------


def test_a_prompt_can_request_a_refusal(client: EmulatorClient) -> None:
    said = client.post("a fox [emulator: refuse]").json()["error"]
    assert said["code"] == "content_policy_violation"
    assert creates(client) == 0


def test_a_prompt_can_request_a_failing_task(client: EmulatorClient) -> None:
    task_id = client.finished("a fox [emulator: fail generation_timeout]")
    assert client.read(task_id).json()["error"]["code"] == "generation_timeout"


def test_a_prompt_can_damage_its_image_at_each_fetch(client: EmulatorClient) -> None:
    task_id = client.finished("a fox [emulator: wrong_dimensions]")
    assert [image(client.fetch(task_id).content)[1] for _ in range(2)] == [(512, 512)] * 2


def test_a_marker_with_once_lets_the_repeat_succeed(client: EmulatorClient) -> None:
    prompt = "a fox [emulator: fail service_error once] [emulator: black once]"
    assert client.read(client.finished(prompt)).json()["status"] == "failed"
    again = client.finished(prompt)
    assert client.read(again).json()["status"] == "completed"
    first, second = client.fetch(again).content, client.fetch(again).content
    assert first != second
    assert image(second) == ("PNG", (1024, 1024))


@pytest.mark.parametrize(
    "prompt", ["[emulator: no_such_fault]", "[emulator: 500]", "[emulator: black 7]"]
)
def test_an_unknown_marker_is_refused(client: EmulatorClient, prompt: str) -> None:
    answer = client.post(prompt)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


def test_text_similar_to_a_marker_is_text() -> None:
    for prompt in ("[emulator]", "emulator: fail", "[emulator: ]", "[emulator: a b c d]"):
        assert markers(prompt) == []


# -- the command line -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wish"),
    [
        ("500=3", FaultOption("500", n=3)),
        ("500=1", FaultOption("500", n=1)),
        ("500=1.0", FaultOption("500", rate=1.0)),
        ("500=0.05", FaultOption("500", rate=0.05)),
        ("500=5%", FaultOption("500", rate=0.05)),
        ("fail=0.1:quota_exceeded", FaultOption("fail", rate=0.1, arg="quota_exceeded")),
        ("insufficient_quota_after=10.5", FaultOption("insufficient_quota_after", arg="10.5")),
    ],
)
def test_a_fault_on_the_command_line_is_a_rate_or_a_count(text: str, wish: FaultOption) -> None:
    assert parse_fault_option(text) == wish


@pytest.mark.parametrize(
    "text", ["500", "500=", "500=x", "500=2.0", "500=-1", "nothing=1", "500=1:x", "500=101%"]
)
def test_a_wrong_fault_on_the_command_line_is_an_error(text: str) -> None:
    with pytest.raises(UnknownFaultError):
        parse_fault_option(text)
