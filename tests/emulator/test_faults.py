"""Every fault does what it says, is used up when it strikes, and can be asked for in each way."""

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
def bench(tmp_path: Path) -> Iterator[EmulatorClient]:
    with running(tmp_path / "state") as made:
        yield made


# -- one request of each kind -----------------------------------------------------------------


def ask(bench: EmulatorClient, kind: str, timeout_s: float = 5.0) -> httpx.Response:
    """Send one request of a kind, about a finished task where it needs one."""
    if kind == "create":
        return bench.post(key=KEY)
    task_id = bench.finished() if not bench.stats()["creates"] else first_task(bench)
    if kind == "read":
        return bench.client.get(f"/v1/tasks/{task_id}", timeout=timeout_s)
    if kind == "batch":
        body = {"task_ids": [task_id]}
        return bench.client.post("/v1/tasks/batch", json=body, timeout=timeout_s)
    if kind == "file":
        link = f"{bench.emulator.url}{bench.world.link_path(_task(bench, task_id))}"
        return bench.plain.get(link, timeout=timeout_s)
    return bench.client.get(
        {"list": "/v1/tasks", "credits": "/v1/credits"}[kind], timeout=timeout_s
    )


def first_task(bench: EmulatorClient) -> str:
    return str(bench.stats()["tasks"][0]["task_id"])


def _task(bench: EmulatorClient, task_id: str) -> Any:
    account = bench.world.account("emulator")
    assert account is not None
    return bench.world.task(task_id, account)


def creates(bench: EmulatorClient) -> int:
    return int(bench.stats()["creates"])


# -- what may happen to any request -----------------------------------------------------------


def raises(error: type[Exception], bench: EmulatorClient, kind: str) -> None:
    with pytest.raises(error):
        ask(bench, kind)


def answers(status: int, bench: EmulatorClient, kind: str, **expected: Any) -> httpx.Response:
    answer = ask(bench, kind)
    assert answer.status_code == status
    for name, value in expected.items():
        assert answer.json()["error"][name] == value
    return answer


def html(status: int, bench: EmulatorClient, kind: str) -> None:
    answer = answers(status, bench, kind)
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.text.startswith("<!DOCTYPE html>")


def internal_error(bench: EmulatorClient, kind: str) -> None:
    answer = answers(500, bench, kind)
    if kind != "file":
        assert answer.json()["error"]["code"] == "internal_error"
        assert answer.json()["error"]["type"] == "api_error"


def too_busy(bench: EmulatorClient, kind: str) -> None:
    answer = answers(429, bench, kind, code="rate_limit_exceeded")
    assert answer.headers["retry-after"] == "1"


def too_busy_date(bench: EmulatorClient, kind: str) -> None:
    answer = answers(429, bench, kind)
    when = email.utils.parsedate_to_datetime(answer.headers["retry-after"])
    assert when.timestamp() == int(bench.clock.now_s + 1)


def too_busy_bare(bench: EmulatorClient, kind: str) -> None:
    assert "retry-after" not in answers(429, bench, kind).headers


def empty(bench: EmulatorClient, kind: str) -> None:
    assert answers(429, bench, kind).content == b""


def late(bench: EmulatorClient, kind: str) -> None:
    with pytest.raises(httpx.ReadTimeout):
        ask(bench, kind, timeout_s=0.05)


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


def no_task(check: Callable[[EmulatorClient, str], Any], bench: EmulatorClient) -> None:
    """The check holds, no task exists, and a repeat with the same key creates it."""
    check(bench, "create")
    assert creates(bench) == 0
    answer = bench.post(key=KEY)
    assert answer.status_code == 200
    assert "idempotency-replayed" not in answer.headers


def one_task(check: Callable[[EmulatorClient, str], Any], bench: EmulatorClient) -> None:
    """The check holds, the task exists, and a repeat with the same key finds it."""
    check(bench, "create")
    assert creates(bench) == 1
    answer = bench.post(key=KEY)
    assert answer.headers["idempotency-replayed"] == "true"
    assert answer.json()["id"] == first_task(bench)
    assert creates(bench) == 1


# -- create faults ----------------------------------------------------------------------------


def refused(
    status: int, code: str | int, kind: str, bench: EmulatorClient, route: str = "create"
) -> None:
    said = answers(status, bench, route).json()["error"]
    assert (said["code"], said["type"]) == (code, kind)


def redirected_create(bench: EmulatorClient, kind: str) -> None:
    answer = answers(307, bench, kind)
    assert answer.headers["location"].startswith(bench.emulator.url)


def without_id(bench: EmulatorClient, kind: str) -> None:
    answer = answers(200, bench, kind)
    assert "id" not in answer.json()
    assert answer.json()["status"] == "pending"


def delayed_create(bench: EmulatorClient) -> None:
    body = {"model": "krea-2-turbo", "prompt": "a fox", "seed": 7}
    with pytest.raises(httpx.ReadTimeout):
        bench.client.post(
            "/v1/images/generations",
            json=body,
            headers={"Idempotency-Key": KEY},
            timeout=0.05,
        )
    assert creates(bench) == 1
    assert bench.post(key=KEY).json()["error"]["code"] == "paid_outcome_unknown"
    bench.clock.move(5)
    assert bench.post(key=KEY).headers["idempotency-replayed"] == "true"


def undecided(bench: EmulatorClient) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        bench.post(key=KEY)
    assert creates(bench) == 1
    for _ in range(2):
        answer = bench.post(key=KEY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (
            409,
            "paid_outcome_unknown",
        )
        bench.clock.move(30)
    assert bench.post(key=KEY).headers["idempotency-replayed"] == "true"
    assert creates(bench) == 1


def taken(bench: EmulatorClient) -> None:
    for _ in range(2):
        answer = bench.post(key=KEY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "idempotency_conflict")
    assert creates(bench) == 0
    assert bench.post(key="key-of-the-next-try-2").status_code == 200
    bench.world.script("idempotency_conflict")
    again = bench.post(key="key-of-the-next-try-2")
    assert again.headers["idempotency-replayed"] == "true"


def key_ignored(bench: EmulatorClient) -> None:
    first = bench.post(key=KEY)
    assert bench.world.unconsumed() == []
    bench.world.script("ignore_idempotency")
    second = bench.post(key=KEY)
    assert first.json()["id"] != second.json()["id"]
    assert creates(bench) == 2
    assert bench.post(key=KEY).json()["id"] == first.json()["id"]


# -- task faults ------------------------------------------------------------------------------


def read_after(bench: EmulatorClient, seconds: float = 10) -> dict[str, Any]:
    bench.create()
    bench.clock.move(seconds)
    return dict(bench.read(first_task(bench)).json())


def units(bench: EmulatorClient) -> tuple[int, int, int]:
    books = bench.stats()
    return books["held_units"], books["charged_units"], books["returned_units"]


def fails(code: str, bench: EmulatorClient) -> None:
    body = read_after(bench)
    assert (body["status"], body["progress"]) == ("failed", 0)
    assert (body["error"]["code"], body["error"]["type"]) == (code, "task_error")
    assert "results" not in body
    assert units(bench) == (0, 0, 4_500)


def fails_bare(bench: EmulatorClient) -> None:
    body = read_after(bench)
    assert set(body) == {"id", "object", "status", "model", "progress", "error"}
    assert set(body["error"]) == {"code", "message"}
    assert "\n" in body["error"]["message"]
    assert units(bench) == (0, 0, 4_500)


def cancelled(bench: EmulatorClient) -> None:
    body = read_after(bench)
    assert body["status"] == "cancelled"
    assert "results" not in body
    assert units(bench) == (0, 0, 4_500)


def never_ends(status: str, bench: EmulatorClient) -> None:
    assert read_after(bench, 10_000)["status"] == status
    assert units(bench) == (4_500, 0, 0)


def slow(bench: EmulatorClient) -> None:
    assert read_after(bench, 31)["status"] == "processing"
    bench.clock.move(1)
    assert bench.read(first_task(bench)).json()["status"] == "completed"


def no_results(bench: EmulatorClient) -> None:
    body = read_after(bench)
    assert body["status"] == "completed"
    assert "results" not in body
    assert len(bench.read(first_task(bench)).json()["results"]) == 1


def unknown_status(bench: EmulatorClient) -> None:
    assert read_after(bench, 1)["status"] == "queued"
    bench.clock.move(1)
    assert bench.read(first_task(bench)).json()["status"] == "completed"


def vanished(bench: EmulatorClient) -> None:
    assert read_after(bench)["error"]["code"] == "task_not_found"
    body = {"task_ids": [first_task(bench)]}
    assert bench.client.post("/v1/tasks/batch", json=body).json()["data"] == []
    assert units(bench) == (0, 4_500, 0)


def with_usage(bench: EmulatorClient) -> None:
    usage = read_after(bench)["usage"]
    assert usage["credits_used"] == usage["cost"]["credits"] == 0.45


def bad_link(link: str, bench: EmulatorClient) -> None:
    assert read_after(bench)["results"] == [link]


def dear(bench: EmulatorClient) -> None:
    bench.create()
    assert units(bench) == (30_000, 0, 0)


def repeated_id(bench: EmulatorClient) -> None:
    first = bench.create()  # the account's first, so that its own id is named
    bench.world.script("repeated_id")
    assert bench.create(prompt="another") == first
    assert bench.emulator.stats()["creates"] == 2


def all_failed(bench: EmulatorClient) -> None:
    task_id = bench.finished()
    said = bench.client.post("/v1/tasks/batch", json={"task_ids": [task_id]}).json()["data"]
    assert [task["status"] for task in said] == ["failed"]
    assert bench.client.get(f"/v1/tasks/{task_id}").json()["status"] == "completed"


def same(bench: EmulatorClient) -> None:
    assert image(good_bytes(bench)) == ("PNG", (1024, 1024))


# -- file faults ------------------------------------------------------------------------------


def good_bytes(bench: EmulatorClient) -> bytes:
    answer = ask(bench, "file")
    assert answer.status_code == 200
    return answer.content


def image(content: bytes) -> tuple[str | None, tuple[int, int]]:
    with Image.open(io.BytesIO(content)) as opened:
        opened.load()
        return opened.format, opened.size


def redirected(bench: EmulatorClient) -> None:
    answer = ask(bench, "file")
    assert answer.status_code == 302
    assert image(bench.plain.get(answer.headers["location"]).content) == ("PNG", (1024, 1024))


def redirected_to(link: str, bench: EmulatorClient) -> None:
    answer = ask(bench, "file")
    assert (answer.status_code, answer.headers["location"]) == (302, link)


def redirect_loop(bench: EmulatorClient) -> None:
    answer = ask(bench, "file")
    assert (answer.status_code, answer.headers["location"]) == (302, str(answer.request.url))


def truncated(bench: EmulatorClient) -> None:
    with pytest.raises(httpx.RemoteProtocolError, match="without sending complete"):
        ask(bench, "file")
    assert good_bytes(bench)


def cut(bench: EmulatorClient) -> None:
    answer = ask(bench, "file")
    assert int(answer.headers["content-length"]) == len(answer.content)
    whole = good_bytes(bench)
    assert whole.startswith(answer.content)
    assert len(answer.content) < len(whole)


def empty_file(bench: EmulatorClient) -> None:
    assert good_bytes(bench) == b""


def jpeg(bench: EmulatorClient) -> None:
    answer = ask(bench, "file")
    assert answer.headers["content-type"] == "image/png"
    assert answer.request.url.path.endswith(".png")
    assert image(answer.content) == ("JPEG", (1024, 1024))


def octet_stream(bench: EmulatorClient) -> None:
    answer = ask(bench, "file")
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.content == good_bytes(bench)


def black(bench: EmulatorClient) -> None:
    with Image.open(io.BytesIO(good_bytes(bench))) as opened:
        assert opened.size == (1024, 1024)
        assert opened.getextrema() == ((0, 0), (0, 0), (0, 0))


def half(bench: EmulatorClient) -> None:
    assert image(good_bytes(bench)) == ("PNG", (512, 512))


def endless(bench: EmulatorClient) -> None:
    ask(bench, "credits")
    task = _task(bench, bench.finished())
    url = f"{bench.emulator.url}{bench.world.link_path(task)}"
    received = 0
    with httpx.Client(**PLAIN) as client, client.stream("GET", url) as answer:
        assert "content-length" not in answer.headers
        for piece in answer.iter_bytes():
            received += len(piece)
            if received > 20_000_000:
                break
    assert received > 20_000_000


def bomb(bench: EmulatorClient) -> None:
    content = good_bytes(bench)
    assert len(content) < 100_000
    assert struct.unpack(">II", content[16:24]) == (60_000, 60_000)


def noise(bench: EmulatorClient) -> None:
    with pytest.raises(OSError, match="cannot identify"):
        image(good_bytes(bench))


def file_status(status: int, bench: EmulatorClient) -> None:
    assert ask(bench, "file").status_code == status
    assert good_bytes(bench)


def no_success(bench: EmulatorClient) -> None:
    answer = answers(200, bench, "credits")
    assert answer.json()["success"] is False


def calls_planned(wanted: list[tuple[float, str]], bench: EmulatorClient) -> None:
    """The calls themselves are the matter of test_callback_sender.py."""
    bench.create(callback_url="https://hooks.example.com/hook")
    planned = bench.world.due_calls(3)
    assert [(round(c.due_at - bench.clock(), 3), c.forged) for c in planned] == wanted


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
        f"{kind}_{name}": partial(check, kind=kind)  # type: ignore[call-arg]  # named alike in all
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
def test_a_fault_does_what_it_says_and_is_used_up(
    bench: EmulatorClient, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    bench.world.script(name)
    CHECKS[name](bench)
    assert bench.world.unconsumed() == []
    assert capfd.readouterr().err == ""  # no traceback, whatever happened to the connection


# -- ways to ask for a fault ------------------------------------------------------------------


def test_a_scripted_fault_strikes_so_often_and_then_no_more(bench: EmulatorClient) -> None:
    bench.world.script("500", 2)
    assert [bench.post().status_code for _ in range(3)] == [500, 500, 200]


def test_scripted_faults_strike_in_the_order_in_which_they_were_scripted(
    bench: EmulatorClient,
) -> None:
    for name in ("503", "500", "502_html"):
        bench.world.script(name)
    assert [bench.post().status_code for _ in range(3)] == [503, 500, 502]


def test_a_scripted_fault_waits_for_the_prompt_that_it_is_bound_to(bench: EmulatorClient) -> None:
    bench.world.script("500", match="bear")
    bench.world.script("fail", match="bear")
    bench.world.script("read_404", match="bear")
    bench.world.script("black", match="bear")
    fox = bench.finished("a fox")
    assert bench.fetch(fox).status_code == 200
    assert len(bench.world.unconsumed()) == 4
    assert bench.post("a bear").status_code == 500
    bear = bench.finished("a bear")
    assert bench.read(bear).status_code == 404
    assert bench.read(bear).json()["status"] == "failed"
    assert bench.world.unconsumed() == [{"name": "black", "n": 1, "match": "bear", "arg": None}]


def test_a_task_fault_is_not_used_up_by_a_replay_or_a_refusal(bench: EmulatorClient) -> None:
    bench.post(key=KEY)
    bench.world.script("fail")
    bench.post(key=KEY)
    bench.post(size="7:5")
    assert [one["name"] for one in bench.world.unconsumed()] == ["fail"]


def test_the_argument_of_a_fault_refines_it(bench: EmulatorClient) -> None:
    bench.world.script("insufficient_quota", arg="token_daily_quota_exceeded")
    assert bench.post().json()["error"]["code"] == "token_daily_quota_exceeded"
    bench.world.script("no_results", arg=2)
    task_id = bench.finished()
    assert ["results" in bench.read(task_id).json() for _ in range(3)] == [False, False, True]


def test_a_rate_strikes_that_share_and_always_the_same_ones(tmp_path: Path) -> None:
    def struck(folder: str, seed: int) -> list[int]:
        with Emulator(
            state=tmp_path / folder, clock=Clock(), seed=seed, faults={"500": 0.3}
        ) as emulator:
            bench = EmulatorClient(emulator, Clock())
            codes = [bench.post().status_code for _ in range(40)]
            bench.close()
            return codes

    first = struck("a", 1)
    assert 6 <= first.count(500) <= 18
    assert struck("b", 1) == first
    assert struck("c", 2) != first


def test_faults_can_be_set_at_run_time_over_http(bench: EmulatorClient) -> None:
    url = f"{bench.emulator.url}/emulator/faults"
    wanted = {
        "script": [{"name": "500", "n": 2, "match": "fox"}],
        "rates": {"read_404": 1},
        "quota_credits": 0.45,
    }
    said = bench.plain.post(url, json=wanted).json()
    assert said["unconsumed"] == [{"name": "500", "n": 2, "match": "fox", "arg": None}]
    assert said["rates"] == {"read_404": 1}
    assert [bench.post().status_code for _ in range(4)] == [500, 500, 200, 402]
    assert bench.read(first_task(bench)).status_code == 404
    assert bench.plain.post(url, json={"clear": True}).json() == {"unconsumed": [], "rates": {}}
    assert bench.read(first_task(bench)).status_code == 200


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
def test_faults_that_make_no_sense_are_refused_as_a_whole(
    bench: EmulatorClient, wanted: object
) -> None:
    answer = bench.plain.post(f"{bench.emulator.url}/emulator/faults", json=wanted)
    assert answer.status_code == 400
    assert bench.world.unconsumed() == []
    assert bench.world.rates() == {}


def test_the_quota_ends_buying_after_so_many_credits(bench: EmulatorClient) -> None:
    bench.world.set_quota(1.0)
    assert [bench.post(f"{n}").status_code for n in range(3)] == [200, 200, 402]
    bench.world.set_quota(None)
    assert bench.post().status_code == 200


# -- markers in prompts -----------------------------------------------------------------------


def test_a_prompt_can_ask_to_be_refused(bench: EmulatorClient) -> None:
    said = bench.post("a fox [emulator: refuse]").json()["error"]
    assert said["code"] == "content_policy_violation"
    assert creates(bench) == 0


def test_a_prompt_can_ask_its_task_to_fail(bench: EmulatorClient) -> None:
    task_id = bench.finished("a fox [emulator: fail generation_timeout]")
    assert bench.read(task_id).json()["error"]["code"] == "generation_timeout"


def test_a_prompt_can_damage_its_picture_at_each_fetch(bench: EmulatorClient) -> None:
    task_id = bench.finished("a fox [emulator: wrong_dimensions]")
    assert [image(bench.fetch(task_id).content)[1] for _ in range(2)] == [(512, 512)] * 2


def test_a_marker_with_once_lets_the_repeat_succeed(bench: EmulatorClient) -> None:
    prompt = "a fox [emulator: fail service_error once] [emulator: black once]"
    assert bench.read(bench.finished(prompt)).json()["status"] == "failed"
    again = bench.finished(prompt)
    assert bench.read(again).json()["status"] == "completed"
    first, second = bench.fetch(again).content, bench.fetch(again).content
    assert first != second
    assert image(second) == ("PNG", (1024, 1024))


@pytest.mark.parametrize(
    "prompt", ["[emulator: no_such_fault]", "[emulator: 500]", "[emulator: black 7]"]
)
def test_a_marker_that_means_nothing_is_refused(bench: EmulatorClient, prompt: str) -> None:
    answer = bench.post(prompt)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


def test_text_that_only_looks_like_a_marker_is_text() -> None:
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
def test_a_fault_on_the_command_line_that_makes_no_sense_is_an_error(text: str) -> None:
    with pytest.raises(UnknownFaultError):
        parse_fault_option(text)
