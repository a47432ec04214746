"""Slots from the journal: their state, and their purchases at all attempts."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from krea_dagster.curation.accepted.candidates import read_slots
from krea_dagster.curation.accepted.quota import SLOT_SCHEMA
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.states import Event
from krea_dagster.errors import ConfigError
from krea_dagster.models import ImageRequest
from krea_dagster.prompts import PLAN_SCHEMA
from krea_dagster.prompts.requests import drawn_seed, request_key
from tests.engine.conftest import journal, journal_url  # noqa: F401 - fixtures of this file too
from tests.engine.harness import JournalWriter

STORED = (Event.SUBMITTING, Event.ACCEPTED, Event.COMPLETED, Event.STORED)


def request(prompt_id: str, attempt: int = 0, seed: int | None = None) -> ImageRequest:
    drawn = drawn_seed(prompt_id, 0, attempt) if seed is None else seed
    asked: dict[str, Any] = {
        "prompt": f"of {prompt_id}",
        "size": "1:1",
        "quality": "1K",
        "seed": drawn,
        "nsfw_check": False,
        "attempt": attempt,
    }
    return ImageRequest(request_key=request_key(**asked), **asked)


def planned(*rows: tuple[str, ImageRequest], **further: list[Any]) -> pa.RecordBatch:
    values = [
        {
            "prompt_id": prompt_id,
            "sample": 0,
            "partition_key": "bucket-000",
            **{
                name: getattr(one, name)
                for name in PLAN_SCHEMA.names
                if name not in ("prompt_id", "sample", "partition_key")
            },
        }
        for prompt_id, one in rows
    ]
    batch = pa.RecordBatch.from_pylist(values, PLAN_SCHEMA)
    for name, column in further.items():
        batch = batch.append_column(name, pa.array(column))
    return batch


def bought(writer: JournalWriter, one: ImageRequest, *events: Event) -> None:
    writer.plan(one)
    for event in events:
        values = {"task_id": f"task-{one.request_key[:8]}"} if event is Event.ACCEPTED else {}
        writer.write(one, event, **values)


def slots(journal: Journal, batch: pa.RecordBatch, column: str = "") -> list[dict[str, Any]]:  # noqa: F811 - the fixture
    table = read_slots([batch], journal, column=column, prices={"1K": 5_000})
    assert table.schema.equals(SLOT_SCHEMA)
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def test_what_was_bought_at_earlier_attempts_counts(journal: Journal) -> None:  # noqa: F811 - as above
    writer = JournalWriter(journal)
    for attempt in range(2):
        bought(writer, request("a", attempt), *STORED)
    (slot,) = slots(journal, planned(("a", request("a", 2))))
    assert (slot["status"], slot["attempt"], slot["drawn"]) == (None, 2, True)
    assert (slot["bought_images"], slot["bought_units"]) == (2, 9_000)
    assert slot["price_units"] == 5_000


def test_what_may_have_been_charged_counts_as_charged_and_what_failed_as_nothing(
    journal: Journal,  # noqa: F811 - as above
) -> None:
    writer = JournalWriter(journal)
    bought(writer, request("unknown"), Event.SUBMITTING, Event.OUTCOME_UNKNOWN)
    bought(writer, request("failed"), Event.SUBMITTING, Event.ACCEPTED, Event.FAILED)
    bought(writer, request("lost"), Event.SUBMITTING, Event.ACCEPTED, Event.EXPIRED)
    bought(writer, request("planned"))
    names = ("unknown", "failed", "lost", "planned", "never")
    found = slots(journal, planned(*((name, request(name)) for name in names)))
    counts = {slot["prompt_id"]: (slot["bought_images"], slot["bought_units"]) for slot in found}
    assert counts == {
        "unknown": (1, 5_000),
        "failed": (0, 0),
        "lost": (1, 4_500),
        "planned": (0, 0),
        "never": (0, 0),
    }


def test_a_seed_of_the_tables_own_is_told_from_a_drawn_one(journal: Journal) -> None:  # noqa: F811 - as above
    rows = (("a", request("a", seed=7)), ("b", request("b", 3)), ("c", request("c", 3, seed=9)))
    assert [slot["drawn"] for slot in slots(journal, planned(*rows))] == [False, True, False]


def test_a_fixed_seeds_earlier_attempts_are_found_too(journal: Journal) -> None:  # noqa: F811 - as above
    bought(JournalWriter(journal), request("a", 0, seed=7), *STORED)
    (slot,) = slots(journal, planned(("a", request("a", 1, seed=7))))
    assert slot["bought_images"] == 1


def test_the_value_of_a_column_is_read_as_text(journal: Journal) -> None:  # noqa: F811 - as above
    batch = planned(("a", request("a")), ("b", request("b")), year=[2026, None])
    assert [slot["value"] for slot in slots(journal, batch, "year")] == ["2026", None]
    assert [slot["value"] for slot in slots(journal, batch, "quality")] == ["1K", "1K"]
    with pytest.raises(ConfigError, match="column 'hue', which the prompt table does not have"):
        slots(journal, batch, "hue")
