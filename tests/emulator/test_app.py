"""The emulator's HTTP API: the documented calls, and each documented error."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from krea_dagster.emulator import Emulator
from tests.emulator.harness import AUTH, Clock, EmulatorClient, running

KEY_1 = "key-0000000000000001"


@pytest.fixture
def client(tmp_path: Path) -> Iterator[EmulatorClient]:
    with running(tmp_path / "state") as made:
        yield made


@pytest.fixture
def clock() -> Clock:
    return Clock()


def error(answer: httpx.Response) -> tuple[int, str, str]:
    said = answer.json()["error"]
    return answer.status_code, said["code"], said["type"]


# -- create -----------------------------------------------------------------------------------


def test_a_create_call_is_answered_as_documented(client: EmulatorClient) -> None:
    answer = client.post()
    body = answer.json()
    assert re.fullmatch(r"task-unified-1800000000-[a-z0-9]{8}", body.pop("id"))
    assert body == {
        "created": 1_800_000_000,
        "model": "krea-2-turbo",
        "object": "image.generation.task",
        "progress": 0,
        "status": "pending",
        "task_info": {"can_cancel": False, "estimated_time": 45},
        "type": "image",
        "usage": {"billing_rule": "per_call", "credits_reserved": 0.45, "user_group": "default"},
    }
    assert "idempotency-replayed" not in answer.headers
    assert answer.headers["x-request-id"]


def test_a_2k_image_costs_four_times_as_much(client: EmulatorClient) -> None:
    assert client.post(quality="2K").json()["usage"]["credits_reserved"] == 1.8


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "krea-2"),
        ("model", None),
        ("prompt", ""),
        ("prompt", 7),
        ("prompt", None),
        ("prompt", "word " * 493),
        ("prompt", "猫" * 641),
        ("size", "7:5"),
        ("size", None),
        ("size", "1024x1024"),
        ("quality", "4K"),
        ("quality", "1k"),
        ("seed", -1),
        ("seed", 1_048_577),
        ("seed", 1.5),
        ("seed", True),
        ("seed", "7"),
        ("seed", None),
        ("nsfw_check", 1),
        ("nsfw_check", "false"),
        ("callback_url", "http://example.com/hook"),
        ("callback_url", "https://10.1.2.3/hook"),
        ("callback_url", "https://127.0.0.1/hook"),
        ("callback_url", "https://172.20.0.1/hook"),
        ("callback_url", "https://192.168.1.1/hook"),
        ("callback_url", "https://[::1]/hook"),
        ("callback_url", "https://localhost/hook"),
        ("callback_url", "https://"),
        ("callback_url", "https://example.com:port/"),
        ("callback_url", "https://example.com/" + "a" * 2048),
        ("callback_url", None),
    ],
)
def test_a_wrong_field_is_refused_and_nothing_is_reserved(
    client: EmulatorClient, field: str, value: Any
) -> None:
    answer = client.post(**{field: value})
    assert error(answer) == (400, "invalid_request", "invalid_request_error")
    assert answer.json()["error"]["param"] == field
    assert answer.json()["error"]["message"].startswith("Invalid request parameters")
    assert client.stats()["reserved_units"] == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 0},
        {"seed": 1_048_576},
        {"prompt": "word " * 492},
        {"nsfw_check": True},
        {"callback_url": "https://example.com:8443/hook?x=1"},
        {"callback_url": "https://8.8.8.8/hook"},
        {"unknown_field": [1, {"a": None}]},
    ],
)
def test_what_the_contract_allows_is_accepted(
    client: EmulatorClient, fields: dict[str, Any]
) -> None:
    assert client.post(**fields).status_code == 200


def test_a_lone_surrogate_is_kept_as_the_replacement_character(client: EmulatorClient) -> None:
    answer = client.http.post(
        "/v1/images/generations",
        content=rb'{"model":"krea-2-turbo","prompt":"a \ud800 b"}',
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 200
    assert client.stats()["tasks"][0]["prompt"] == "a \ufffd b"


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b'{"model":"krea-2-turbo","prompt":"a","seed":NaN}', "application/json", 400),
        (b'{"seed":' + b"9" * 5000 + b"}", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b'{"model":"krea-2-turbo","prompt":"a"}', "text/plain", 415),
        (b" " * (1 << 20) + b"{}", "application/json", 413),
    ],
)
def test_a_body_that_is_not_a_request_is_refused(
    client: EmulatorClient, content: bytes, kind: str, status: int
) -> None:
    answer = client.http.post(
        "/v1/images/generations", content=content, headers={"content-type": kind}
    )
    assert answer.status_code == status
    assert answer.json()["error"]["code"]


def test_errors_of_the_create_call_name_the_request_in_their_message(
    client: EmulatorClient,
) -> None:
    answer = client.post(size="7:5")
    tail = f" (request id: {answer.headers['x-request-id']})"
    assert answer.json()["error"]["message"] == "Invalid request parameters" + tail


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Basic emulator", "emulator", "Bearer"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/images/generations"),
        ("POST", "/v1/tasks/batch"),
        ("GET", "/v1/tasks/task-unified-1800000000-abcdefgh"),
        ("GET", "/v1/tasks"),
        ("GET", "/v1/credits"),
    ],
)
def test_every_call_needs_the_key(
    client: EmulatorClient, method: str, path: str, header: str | None
) -> None:
    headers = {} if header is None else {"Authorization": header}
    answer = client.anonymous.request(method, client.emulator.url + path, headers=headers)
    assert error(answer) == (401, "unauthorized", "authentication_error")


def test_a_call_beyond_the_credits_is_refused(tmp_path: Path) -> None:
    with Emulator(state=tmp_path, credits=1.0) as emulator:
        client = EmulatorClient(emulator, Clock())
        client.create("one")
        client.create("two")
        assert error(client.post("three")) == (402, "insufficient_quota", "insufficient_quota")
        assert client.stats()["creates"] == 2
        client.close()


def test_create_calls_above_the_rate_are_refused(tmp_path: Path, clock: Clock) -> None:
    with Emulator(state=tmp_path, clock=clock, rate=2) as emulator:
        client = EmulatorClient(emulator, clock)
        client.create("one")
        client.create("two")
        answer = client.post("three")
        assert error(answer) == (429, "rate_limit_exceeded", "rate_limit_error")
        assert answer.headers["retry-after"] == "1"
        clock.move(0.5)
        client.create("three")
        client.close()


def test_create_calls_above_the_concurrency_are_refused_except_a_replay(
    tmp_path: Path, clock: Clock
) -> None:
    with Emulator(
        state=tmp_path, clock=clock, max_concurrent=1, latency_s=2, latency_jitter=0
    ) as emulator:
        client = EmulatorClient(emulator, clock)
        first = client.post("one", key=KEY_1).json()["id"]
        answer = client.post("two")
        assert answer.status_code == 429
        assert "retry-after" not in answer.headers
        assert client.post("one", key=KEY_1).json()["id"] == first
        clock.move(2)
        client.create("two")
        client.close()


# -- replays ----------------------------------------------------------------------------------


def test_the_same_key_and_body_return_the_first_task_and_charge_nothing(
    client: EmulatorClient,
) -> None:
    first = client.post(key=KEY_1)
    client.clock.move(22 * 3600)
    again = client.post(key=KEY_1)
    assert again.json() == first.json()
    assert again.headers["idempotency-replayed"] == "true"
    stats = client.stats()
    assert (stats["creates"], stats["replays"], stats["reserved_units"]) == (1, 1, 4_500)


def test_the_same_body_in_another_order_of_fields_is_the_same_body(client: EmulatorClient) -> None:
    headers = {"Idempotency-Key": KEY_1}
    fields = {"prompt": "a fox", "model": "krea-2-turbo", "seed": 7, "size": "1:1"}
    first = client.post(key=KEY_1).json()["id"]
    again = client.http.post("/v1/images/generations", json=fields, headers=headers)
    assert again.json()["id"] == first


def test_the_same_key_with_another_body_is_a_conflict(client: EmulatorClient) -> None:
    client.post(key=KEY_1)
    answer = client.post("a bear", key=KEY_1)
    assert error(answer)[:2] == (409, "idempotency_conflict")
    assert client.stats()["creates"] == 1


def test_a_key_belongs_to_its_account(client: EmulatorClient) -> None:
    client.post(key=KEY_1)
    client.http.headers["Authorization"] = "Bearer other"
    assert "idempotency-replayed" not in client.post("a bear", key=KEY_1).headers


@pytest.mark.parametrize("key", ["short", "x" * 97, "has a space in the key"])
def test_a_key_of_the_wrong_form_is_refused(client: EmulatorClient, key: str) -> None:
    assert client.post(key=key).json()["error"]["param"] == "Idempotency-Key"


def test_without_a_key_the_same_body_is_bought_again(client: EmulatorClient) -> None:
    client.create()
    client.create()
    stats = client.stats()
    assert (stats["creates"], stats["bodies_bought_more_than_once"]) == (2, 1)


def test_idempotency_can_be_switched_off(tmp_path: Path) -> None:
    with Emulator(state=tmp_path, idempotency=False) as emulator:
        client = EmulatorClient(emulator, Clock())
        first = client.post(key=KEY_1)
        again = client.post(key=KEY_1)
        assert first.json()["id"] != again.json()["id"]
        assert "idempotency-replayed" not in again.headers
        client.close()


# -- query ------------------------------------------------------------------------------------


def test_a_task_goes_from_pending_to_completed_by_the_clock(client: EmulatorClient) -> None:
    task_id = client.create()
    seen = []
    for _ in range(5):
        body = client.read(task_id).json()
        seen.append((body["status"], body["progress"], "results" in body))
        client.clock.move(0.5)
    assert seen == [
        ("pending", 0, False),
        ("processing", 25, False),
        ("processing", 50, False),
        ("processing", 75, False),
        ("completed", 100, True),
    ]


def test_a_completed_task_reads_as_documented(client: EmulatorClient) -> None:
    task_id = client.finished()
    body = client.read(task_id).json()
    [link] = body.pop("results")
    assert link.startswith(f"{client.emulator.url}/files/")
    assert link.endswith(".png")
    assert body == {
        "created": 1_800_000_000,
        "id": task_id,
        "model": "krea-2-turbo",
        "object": "image.generation.task",
        "progress": 100,
        "status": "completed",
        "task_info": {"can_cancel": False},
        "type": "image",
    }


def test_an_id_of_the_wrong_form_is_refused(client: EmulatorClient) -> None:
    answer = client.read("cgt-2025-abc")
    assert answer.status_code == 400
    assert answer.json() == {
        "error": {
            "code": "invalid_task_id",
            "message": "Invalid task ID format, must start with 'task-unified-'",
            "type": "invalid_request_error",
            "param": "task_id",
        }
    }


def test_an_unknown_task_is_not_found(client: EmulatorClient) -> None:
    answer = client.read("task-unified-1800000000-abcdefgh")
    assert error(answer) == (404, "task_not_found", "invalid_request_error")


def test_a_task_of_another_account_is_denied(client: EmulatorClient) -> None:
    task_id = client.create()
    client.http.headers["Authorization"] = "Bearer other"
    assert error(client.read(task_id)) == (403, "permission_denied", "invalid_request_error")
    assert client.http.post("/v1/tasks/batch", json={"task_ids": [task_id]}).json()["data"] == []
    assert client.http.get("/v1/tasks").json()["data"] == []


def test_a_task_can_be_read_without_end_unless_a_lifetime_is_set(
    tmp_path: Path, client: EmulatorClient
) -> None:
    task_id = client.finished()
    client.clock.move(365 * 24 * 3600)
    assert client.fetch(task_id).status_code == 200
    with Emulator(state=tmp_path / "short", clock=client.clock, task_lifetime_s=3600) as emulator:
        short = EmulatorClient(emulator, client.clock)
        task_id = short.finished()
        link = short.link(task_id)
        client.clock.move(3600)
        assert short.read(task_id).status_code == 404
        assert short.anonymous.get(link).status_code == 404
        assert short.http.get("/v1/tasks").json()["total"] == 0
        short.close()


def test_a_batch_read_leaves_out_what_it_does_not_know(client: EmulatorClient) -> None:
    first, second = client.create("one"), client.finished("two")
    ids = [second, "task-unified-1800000000-abcdefgh", "nonsense", first, second]
    body = client.http.post("/v1/tasks/batch", json={"task_ids": ids}).json()
    assert body["code"] == 200
    assert [task["id"] for task in body["data"]] == [second, first]
    assert all("results" in task for task in body["data"])


@pytest.mark.parametrize(
    "body", [{}, [], {"task_ids": "x"}, {"task_ids": [1]}, {"task_ids": ["x"] * 51}]
)
def test_a_wrong_batch_body_is_refused(client: EmulatorClient, body: object) -> None:
    assert error(client.http.post("/v1/tasks/batch", json=body))[0] == 400


def test_the_batch_endpoint_can_be_missing(tmp_path: Path) -> None:
    with Emulator(state=tmp_path, batch=False) as emulator:
        answer = httpx.post(f"{emulator.url}/v1/tasks/batch", json={"task_ids": []}, headers=AUTH)
        assert answer.status_code == 404


def test_the_list_is_newest_first_in_pages_and_without_links(client: EmulatorClient) -> None:
    ids = [client.create(f"image {n}") for n in range(5)]
    client.clock.move(10)
    pages = [
        client.http.get("/v1/tasks", params={"page": page, "page_size": 2}).json()
        for page in (1, 2, 3, 4)
    ]
    assert [row["id"] for page in pages for row in page["data"]] == ids[::-1]
    assert {page["total"] for page in pages} == {5}
    assert all("results" not in row for page in pages for row in page["data"])
    assert pages[0]["data"][0]["has_results"]


def test_the_list_can_be_filtered(client: EmulatorClient) -> None:
    client.create("done")
    client.create("broken [emulator: fail service_error]")
    client.clock.move(10)
    client.create("new")
    found = {}
    for status in ("", "pending", "processing", "completed", "failed", "cancelled"):
        rows = client.http.get(f"/v1/tasks?status={status}").json()["data"]
        found[status] = [row["status"] for row in rows]
    assert found == {
        "": ["pending", "failed", "completed"],
        "pending": ["pending"],
        "processing": ["pending"],
        "completed": ["completed"],
        "failed": ["failed"],
        "cancelled": [],
    }
    assert client.http.get("/v1/tasks?type=video").json()["total"] == 0
    assert client.http.get("/v1/tasks?model=other").json()["total"] == 0


@pytest.mark.parametrize("query", ["page=0", "page=x", "page_size=51", "page_size=0", "status=no"])
def test_a_wrong_query_of_the_list_call_is_refused(client: EmulatorClient, query: str) -> None:
    assert error(client.http.get(f"/v1/tasks?{query}"))[0] == 400


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/images/generations", 405),
        ("DELETE", "/v1/tasks/task-unified-1800000000-abcdefgh", 405),
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/tasks/", 404),
    ],
)
def test_other_routes_are_json_errors(
    client: EmulatorClient, method: str, path: str, status: int
) -> None:
    answer = client.http.request(method, path)
    assert error(answer)[0] == status


# -- money ------------------------------------------------------------------------------------


def money(client: EmulatorClient) -> tuple[float, float]:
    user = client.http.get("/v1/credits").json()["data"]["user"]
    return user["remaining_credits"], user["used_credits"]


def test_credits_are_reserved_at_once_settled_at_the_end_and_returned_on_failure(
    client: EmulatorClient,
) -> None:
    assert money(client) == (1000.0, 0.0)
    client.create("good")
    client.create("bad [emulator: fail service_error]")
    client.create("never [emulator: stuck]", quality="2K")
    assert money(client) == (997.3, 0.0)
    client.clock.move(10)
    assert money(client) == (997.75, 0.45)
    stats = client.stats()
    assert stats["reserved_units"] == 27_000
    assert stats["charged_units"] == 4_500
    assert stats["returned_units"] == 4_500
    assert stats["held_units"] == 18_000
    assert [task["charged_units"] for task in stats["tasks"]] == [4_500, 0, 0]


def test_the_credits_call_is_answered_as_documented(client: EmulatorClient) -> None:
    assert client.http.get("/v1/credits").json() == {
        "data": {
            "token": {"remaining_credits": 1000.0, "unlimited_credits": True, "used_credits": 0.0},
            "user": {"remaining_credits": 1000.0, "used_credits": 0.0},
        },
        "message": "",
        "success": True,
    }


def test_repeating_a_failed_task_does_not_count_as_bought_twice(client: EmulatorClient) -> None:
    client.world.script("fail")
    client.finished()
    client.finished()
    assert client.stats()["bodies_bought_more_than_once"] == 0
    client.finished()
    assert client.stats()["bodies_bought_more_than_once"] == 1


# -- files ------------------------------------------------------------------------------------


def test_the_image_has_the_requested_size(client: EmulatorClient) -> None:
    answer = client.fetch(client.finished(size="16:9"))
    assert answer.headers["content-type"] == "image/png"
    with Image.open(io.BytesIO(answer.content)) as image:
        assert (image.format, image.size) == ("PNG", (1344, 768))


def test_a_link_works_for_a_day_after_its_read_and_each_read_returns_a_new_one(
    client: EmulatorClient,
) -> None:
    task_id = client.finished()
    link = client.link(task_id)
    client.clock.move(24 * 3600 - 1)
    first = client.anonymous.get(link)
    assert first.status_code == 200
    client.clock.move(1)
    assert client.anonymous.get(link).status_code == 403
    assert client.fetch(task_id).content == first.content


def test_a_link_that_was_never_returned_is_not_found(client: EmulatorClient) -> None:
    link = client.link(client.finished())
    assert client.anonymous.get(link.replace(".png", "0.png")).status_code == 404
    assert client.anonymous.get(f"{client.emulator.url}/files/x.png").status_code == 404


def test_links_name_the_host_that_the_client_used(client: EmulatorClient) -> None:
    task_id = client.finished()
    answer = client.http.get(f"/v1/tasks/{task_id}", headers={"Host": "localhost:1234"})
    assert answer.json()["results"][0].startswith("http://localhost:1234/files/")


def test_a_key_sent_to_the_file_host_is_counted(client: EmulatorClient) -> None:
    link = client.link(client.finished())
    assert client.anonymous.get(link).status_code == 200
    assert client.stats()["key_leaks"] == 0
    assert client.http.get(link).status_code == 200
    assert client.stats()["key_leaks"] == 1


# -- statistics ------------------------------------------------------------------------------


def test_the_statistics_count_every_request(client: EmulatorClient) -> None:
    task_id = client.finished(size="1:2")
    client.post(size="7:5")
    client.world.script("drop_before_create")
    with pytest.raises(httpx.RemoteProtocolError):
        client.post()
    content = client.fetch(task_id).content
    client.http.post("/v1/tasks/batch", json={"task_ids": []})
    client.http.get("/v1/tasks")
    client.http.get("/v1/credits")
    stats = client.http.get("/emulator/books").json()
    assert stats == client.stats()
    assert stats["requests"] == {
        "create": {"200": 1, "400": 1, "dropped": 1},
        "read": {"200": 1},
        "batch": {"200": 1},
        "list": {"200": 1},
        "credits": {"200": 1},
        "file": {"200": 1},
    }
    assert (stats["submit_posts"], stats["creates"], stats["refused"]) == (3, 1, 1)
    [entry] = stats["tasks"]
    assert (entry["task_id"], entry["prompt"], entry["size"]) == (task_id, "a fox", "1:2")
    assert (entry["seed"], entry["used_seed"], entry["fetched"]) == (7, 7, 1)
    assert (entry["created_at"], entry["completed_at"]) == (1_800_000_000.0, 1_800_000_002.0)
    assert entry["file_sha256"] == hashlib.sha256(content).hexdigest()
    assert "tasks" not in client.http.get("/emulator/books?tasks=0").json()


def test_the_emulators_own_routes_need_no_key(client: EmulatorClient) -> None:
    health = client.anonymous.get(f"{client.emulator.url}/emulator/health")
    assert health.json() == {"status": "ok", "synthetic": True}
    assert client.anonymous.get(f"{client.emulator.url}/emulator/books").status_code == 200
