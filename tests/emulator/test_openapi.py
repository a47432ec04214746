"""The emulator answers as its OpenAPI description says, to good requests and to bad ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
import yaml
from hypothesis import HealthCheck, settings
from schemathesis.config import SchemathesisConfig

from krea_dagster.emulator import OPENAPI, Emulator

HEADERS = {"Authorization": "Bearer emulator"}

# Unknown query parameters are ignored, so they are not generated as wrong ones.
CONFIG = SchemathesisConfig.from_dict(
    {
        "generation": {
            "mode": "all",
            "deterministic": True,
            "database": "none",
            "allow-extra-parameters": False,
        }
    }
)


def described() -> dict[str, Any]:
    """Return the description without callback_url: a generated URL may be public or private.

    test_app.py tests that field with chosen values.
    """
    document: dict[str, Any] = yaml.safe_load(OPENAPI.read_text(encoding="utf-8"))
    del document["components"]["schemas"]["ImageRequest"]["properties"]["callback_url"]
    return document


SCHEMA = schemathesis.openapi.from_dict(described(), config=CONFIG)


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    with Emulator(latency_s=0.0, credits=1e9) as running:
        yield running


@SCHEMA.parametrize()
@settings(
    max_examples=20,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
def test_each_endpoint_answers_as_described(
    case: schemathesis.Case[Any], emulator: Emulator
) -> None:
    if case.path == "/v1/tasks/batch" and case.method == "GET":
        return  # that is a read of the task "batch", and is answered as one
    case.call_and_validate(base_url=emulator.url, headers=HEADERS)


@pytest.mark.parametrize(
    "marker",
    ["", "[emulator: fail service_error]", "[emulator: fail_bare]", "[emulator: cancelled]",
     "[emulator: stuck]", "[emulator: no_results]", "[emulator: with_usage]"],
)  # fmt: skip
def test_a_task_reads_as_described_in_every_state(emulator: Emulator, marker: str) -> None:
    body = {"model": "krea-2-turbo", "prompt": f"a fox {marker}"}
    with httpx.Client(base_url=emulator.url, headers=HEADERS) as client:
        created = client.post("/v1/images/generations", json=body)
        SCHEMA["/v1/images/generations"]["POST"].validate_response(created)
        task_id = created.json()["id"]
        SCHEMA["/v1/tasks/{task_id}"]["GET"].validate_response(client.get(f"/v1/tasks/{task_id}"))
        batch = client.post("/v1/tasks/batch", json={"task_ids": [task_id]})
        SCHEMA["/v1/tasks/batch"]["POST"].validate_response(batch)
        assert len(batch.json()["data"]) == 1
        SCHEMA["/v1/tasks"]["GET"].validate_response(client.get("/v1/tasks?page_size=50"))
        SCHEMA["/emulator/books"]["GET"].validate_response(client.get("/emulator/books"))
