"""The benchmarks' server, over real HTTP: its limits, latencies, responses and its record."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import httpx
import pytest
from PIL import Image

from benchmarks.account import drawn_latencies
from benchmarks.baselines import body_of
from benchmarks.harness import BenchmarkServer
from krea_dagster.api import KreaClient
from krea_dagster.errors import TurnedAway
from krea_dagster.models import ImageRequest


class ServerClient:
    """A user's calls, over HTTP."""

    def __init__(self, server: BenchmarkServer, key: str = "bench") -> None:
        self.server = server
        headers = {"Authorization": f"Bearer {key}"}
        self.http = httpx.Client(base_url=server.url, headers=headers, trust_env=False)

    def create(self, number: int = 0, key: str = "", **fields: Any) -> httpx.Response:
        headers = {"Idempotency-Key": key} if key else {}
        body = {**body_of(number), **fields}
        return self.http.post("/v1/images/generations", json=body, headers=headers)

    def task(self, task_id: str) -> Any:
        return self.http.get(f"/v1/tasks/{task_id}").json()

    def done(self, task_id: str) -> Any:
        """The task once it is completed."""
        give_up_s = time.monotonic() + 10
        while (task := self.task(task_id))["status"] != "completed":
            assert time.monotonic() < give_up_s
        return task


@contextmanager
def serving(*options: object) -> Iterator[ServerClient]:
    with BenchmarkServer.start(*options, "--image-bytes", 20_000) as server:
        client = ServerClient(server)
        with client.http:
            yield client


def statuses(client: ServerClient, count: int) -> list[int]:
    return [client.create(number).status_code for number in range(count)]


# -- limits -----------------------------------------------------------------------------------


def test_a_bucket_takes_its_burst_and_answers_429_with_retry_after() -> None:
    with serving("--rate", 0.01, "--burst", 3, "--retry-after", 7) as client:
        assert statuses(client, 5) == [200, 200, 200, 429, 429]
        refusal = client.create()
        assert refusal.headers["retry-after"] == "7"
        assert refusal.json()["error"]["code"] == "rate_limit_exceeded"


def test_a_place_is_taken_until_the_task_ends_whether_or_not_its_end_was_seen() -> None:
    with serving("--concurrent", 2, "--latency", 0.2, "--spread", 0) as client:
        assert statuses(client, 3) == [200, 200, 429]
        while client.create().status_code == 429:
            pass
        tasks = client.server.stats()["tasks"]
        assert tasks[2]["created_s"] >= tasks[0]["done_s"]


def test_keys_share_the_limits_of_one_account_and_the_record_tells_them_apart() -> None:
    with serving("--api-keys", "bench,other", "--concurrent", 1, "--latency", 60) as client:
        assert client.create().status_code == 200
        with ServerClient(client.server, "other").http as other:
            assert other.post("/v1/images/generations", json=body_of(1)).status_code == 429
        with ServerClient(client.server, "a third").http as unknown:
            assert unknown.get("/v1/credits").status_code == 401
        creates = client.server.stats()["creates"]
        assert [(one["worker"], one["outcome"]) for one in creates] == [
            ("bench", "accepted"),
            ("other", "429"),
        ]


# -- tasks ------------------------------------------------------------------------------------


def test_the_nth_task_has_the_nth_latency_of_the_seed() -> None:
    with serving("--latency", 0.5, "--seed", 3) as client:
        for number in range(4):
            client.create(number)
        latencies = [task["latency_s"] for task in client.server.stats()["tasks"]]
    drawn = drawn_latencies(0.5, 0.3, 3)
    assert latencies == pytest.approx([drawn(number) for number in range(4)])
    assert all(0.35 <= latency <= 0.65 for latency in latencies)


def test_a_repeated_key_brings_the_first_task_and_uses_nothing_up() -> None:
    with serving("--rate", 0.01, "--burst", 1) as client:
        first = client.create(1, "the-key-of-this-test")
        again = client.create(1, "the-key-of-this-test")
        assert again.json() == first.json()
        assert again.headers["idempotency-replayed"] == "true"
        assert client.create(2, "the-key-of-this-test").status_code == 409
        stats = client.server.stats(brief=True)
        assert (stats["accepted"], stats["replayed"], stats["conflicts"]) == (1, 1, 1)


def test_a_batch_read_answers_up_to_50_and_leaves_out_what_it_does_not_know() -> None:
    with serving("--latency", 0) as client:
        task_ids = [client.create(number).json()["id"] for number in range(2)]
        asked = [task_ids[0], "task-unified-1751280000-unknown0", task_ids[1]]
        answer = client.http.post("/v1/tasks/batch", json={"task_ids": asked}).json()
        assert [task["id"] for task in answer["data"]] == task_ids
        assert answer["data"][0] == client.task(task_ids[0])
        too_many = client.http.post("/v1/tasks/batch", json={"task_ids": ["x"] * 51})
        assert too_many.status_code == 400
        stats = client.server.stats(brief=True)
        assert (stats["batch_reads"], stats["batch_ids"], stats["single_reads"]) == (1, 3, 1)


@pytest.mark.parametrize("form", ["jpeg", "png"])
def test_every_task_has_its_own_image_of_the_right_size(form: str) -> None:
    with serving("--latency", 0.05, "--format", form) as client:
        task_ids = [client.create(number, size="2:3").json()["id"] for number in range(2)]
        early = client.http.get(f"/files/{task_ids[0]}.{form}")
        assert early.status_code == 404
        links = [client.done(task_id)["results"][0] for task_id in task_ids]
        files = [httpx.get(link, trust_env=False).content for link in links]
        assert files[0] != files[1]
        for file in files:
            image = Image.open(io.BytesIO(file))
            image.load()
            assert image.size == (832, 1280)
            assert len(file) == 20_000
        stats = client.server.stats()
        assert stats["downloads"] == 2
        assert stats["download_bytes"] == 40_000
        assert all(task["downloaded_s"] >= task["done_s"] for task in stats["tasks"])


# -- our client -------------------------------------------------------------------------------


def test_our_client_accepts_every_answer() -> None:
    async def buy(url: str) -> tuple[bytes, bool | None]:
        request = ImageRequest("k", "a fox", "1:1", "1K", 7, nsfw_check=False, attempt=0)
        file = io.BytesIO()
        async with KreaClient("bench", base_url=url) as client:
            bought = await client.submit(request, idempotency_key="k" * 16)
            assert bought.credits_reserved_units == 4500
            again = await client.submit(request, idempotency_key="k" * 16)
            assert again.replayed
            with pytest.raises(TurnedAway) as refused:
                await client.submit(request, idempotency_key="l" * 16)
            assert refused.value.retry_after_s == 2.0
            task = await client.task(bought.task_id)
            unknown = "task-unified-1751280000-unknown0"
            many = await client.tasks([unknown, bought.task_id])
            assert many == {bought.task_id: task}
            await client.download(task.results[0], sink=file, max_bytes=1_000_000)
            assert (await client.credits()).user_used_units == 4500
            return file.getvalue(), client.batch_supported

    with serving("--latency", 0, "--rate", 0.01, "--burst", 1, "--retry-after", 2) as client:
        file, batch_supported = anyio.run(buy, client.server.url)
    assert len(file) == 20_000
    assert batch_supported


def test_a_server_without_batch_reads_is_recognised() -> None:
    with serving("--no-batch", "--latency", 0) as client:
        task_ids = [client.create(number).json()["id"] for number in range(2)]
        answer = client.http.post("/v1/tasks/batch", json={"task_ids": task_ids})
        assert answer.status_code == 404

        async def ask() -> tuple[str, bool | None]:
            async with KreaClient("bench", base_url=client.server.url) as ours:
                found = await ours.tasks(task_ids)
                return found[task_ids[1]].status, ours.batch_supported

        assert anyio.run(ask) == ("completed", False)
