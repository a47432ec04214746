"""Purchases are read the same from every database, written by a real journal."""

from __future__ import annotations

from contextlib import closing
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.states import Event
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.spend.tables.query import open_tables, sums
from krea_dagster.spend.tables.update import update_spend
from tests.engine.conftest import journal, journal_url  # noqa: F401 - fixtures of this file too
from tests.engine.harness import JournalWriter, make_requests


def test_every_kind_of_purchase_becomes_a_row(journal: Journal, tmp_path: Path) -> None:  # noqa: F811 - the fixture
    writer, requests = JournalWriter(journal), make_requests(8)
    writer.plan(*requests)
    ways = {
        "delivered": (Event.SUBMITTING, Event.ACCEPTED, Event.COMPLETED, Event.STORED),
        "pending": (Event.SUBMITTING, Event.ACCEPTED),
        "unknown": (Event.SUBMITTING, Event.OUTCOME_UNKNOWN),
        "refused": (Event.SUBMITTING, Event.TURNED_AWAY),
        "failed": (Event.SUBMITTING, Event.ACCEPTED, Event.FAILED),
        "lost": (Event.SUBMITTING, Event.ACCEPTED, Event.EXPIRED),
    }
    for request, events in zip(requests, ways.values(), strict=False):
        for event in events:
            writer.write(request, event)
    # One that failed and was bought again: two purchases of one request.
    for event in (*ways["failed"], Event.PLANNED, Event.SUBMITTING, Event.ACCEPTED):
        values = {"task_id": "task-second"} if has_failed(writer, requests[6]) else {}
        writer.write(requests[6], event, **(values if event is Event.ACCEPTED else {}))
    storage = Storage(str(tmp_path / "storage"))
    assert update_spend(journal, storage).purchases == 8
    (path,) = (tmp_path / "storage" / "spend" / "ledger").iterdir()
    rows = {row["idempotency_key"]: row for row in pq.read_table(path).to_pylist()}
    for request, outcome in zip(requests, ways, strict=False):
        row = rows[f"krea-{request.request_key}-1"]
        assert row["outcome"] == outcome
        charged = {"delivered": "0.4500", "refused": "0.0000", "failed": "0.0000"}.get(outcome)
        assert row["credits_charged"] == (None if charged is None else Decimal(charged)), outcome
        at_stake = outcome in ("pending", "unknown", "lost")
        assert row["credits_unknown"] == Decimal("0.4500" if at_stake else "0"), outcome
        assert (row["prompt_id"], row["rows"]) == (None, 0)
    first, second = (rows[f"krea-{requests[6].request_key}-{number}"] for number in (1, 2))
    assert (first["outcome"], first["error_code"]) == ("failed", "service_error")
    assert (second["outcome"], second["number"]) == ("pending", 2)
    with closing(open_tables(storage)) as duck:
        (total,) = sums(duck)
        assert (total.purchases, total.charged_units) == (8, 4_500)
        assert total.at_stake_units == 4 * 4_500
    assert pa.types.is_timestamp(pq.read_schema(path).field("sent_at").type)


def has_failed(writer: JournalWriter, request: object) -> bool:
    """Whether a request's first purchase has ended."""
    key = request.request_key  # type: ignore[attr-defined] # any request
    return writer.journal.records([key])[key].submissions > 1
