"""A running emulator whose clock the test moves, and a client for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from krea_dagster.emulator import Emulator
from tests.manual_clock import ManualClock

KEY = "emulator"
PLAIN: dict[str, Any] = {"timeout": 5.0, "verify": False, "trust_env": False}
AUTH = {"Authorization": f"Bearer {KEY}"}


class Clock(ManualClock):
    """A clock in unix seconds that the test moves."""

    def __init__(self) -> None:
        super().__init__(1_800_000_000.0)


class EmulatorClient:
    """An emulator, a client with the key, and the calls that the tests repeat."""

    def __init__(self, emulator: Emulator, clock: Clock) -> None:
        self.emulator = emulator
        self.world = emulator.world
        self.clock = clock
        # Plain HTTP needs no certificates, and loading them takes longer than most of the tests.
        self.http = httpx.Client(base_url=emulator.url, headers=AUTH, **PLAIN)
        self.anonymous = httpx.Client(**PLAIN)

    def close(self) -> None:
        self.http.close()
        self.anonymous.close()

    def post(self, prompt: str = "a fox", key: str | None = None, **fields: Any) -> httpx.Response:
        headers = {} if key is None else {"Idempotency-Key": key}
        body = {"model": "krea-2-turbo", "prompt": prompt, "seed": 7, **fields}
        return self.http.post("/v1/images/generations", json=body, headers=headers)

    def create(self, prompt: str = "a fox", **fields: Any) -> str:
        answer = self.post(prompt, **fields)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def read(self, task_id: str) -> httpx.Response:
        return self.http.get(f"/v1/tasks/{task_id}")

    def finished(self, prompt: str = "a fox", **fields: Any) -> str:
        task_id = self.create(prompt, **fields)
        self.clock.move(10)
        return task_id

    def link(self, task_id: str) -> str:
        return str(self.read(task_id).json()["results"][0])

    def fetch(self, task_id: str) -> httpx.Response:
        return self.anonymous.get(self.link(task_id))

    def stats(self) -> dict[str, Any]:
        return self.emulator.stats()


@contextlib.contextmanager
def running(state: Path) -> Iterator[EmulatorClient]:
    """Run an emulator whose tasks take 2 s of the test's clock."""
    clock = Clock()
    with Emulator(
        api_key=KEY,
        state=state,
        clock=clock,
        latency_s=2.0,
        latency_jitter=0.0,
        other_accounts={"other": 10.0},
    ) as emulator:
        client = EmulatorClient(emulator, clock)
        yield client
        client.close()
