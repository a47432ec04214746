"""Several review servers on one journal, as on several machines with PostgreSQL."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from krea_dagster.engine.journal.journal import Journal
from tests.curation.review.review_harness import ReviewProject, Server, make_project, sha256
from tests.engine.conftest import journal_url  # noqa: F401 - a fixture of this file too

EACH = 60


class Reviewer:
    """A reviewer's page: it gives verdicts, and polls for those of others."""

    def __init__(self, server: Server, name: str) -> None:
        self.name, self._number = name, 0
        origin = f"http://127.0.0.1:{server.port}"
        self.page = httpx.Client(base_url=server.url, headers={"Origin": origin}, timeout=60)
        self.heard: list[str] = []

    def judge(self, row: int) -> str:
        entry: dict[str, Any] = {
            "verdict_id": uuid4().hex,
            "image_sha256": sha256(row),
            "verdict": "keep",
            "reason": None,
            "reviewer": self.name,
            "request_key": f"key-{row}",
            "prompt_id": "prompt-000000",
            "sample": 0,
            "attempt": 0,
            "partition_key": "bucket-000",
        }
        answer = self.page.post("api/verdicts", json={"verdicts": [entry]}).json()
        assert [one["verdict_id"] for one in answer["verdicts"]] == [entry["verdict_id"]]
        return str(entry["verdict_id"])

    def poll(self) -> None:
        said = self.page.get("api/since", params={"number": self._number}).json()
        self.heard += [one["verdict_id"] for one in said["verdicts"]]
        self._number = said["number"]


@pytest.fixture
def project(tmp_path: Path) -> ReviewProject:
    return make_project(tmp_path / "krea", rows=EACH, subjects=1)


@pytest.fixture
def people(project: ReviewProject, journal_url: str) -> Iterator[list[Reviewer]]:  # noqa: F811 - the fixture
    Journal(journal_url).close()
    servers = [Server(project, "--journal", journal_url) for _ in range(2)]
    team = [Reviewer(server, name) for server, name in zip(servers, ("ada", "ben"), strict=True)]
    yield team
    for person, server in zip(team, servers, strict=True):
        person.page.close()
        assert server.stop()[0] == 0


def test_every_reviewer_gets_each_verdict_once_in_the_journal_s_order(
    people: list[Reviewer],
    journal_url: str,  # noqa: F811 - the fixture
) -> None:
    """They review the same images at the same time while both poll."""
    over = threading.Event()

    def work(person: Reviewer) -> list[str]:
        return [person.judge(row) for row in range(EACH)]

    def poll(person: Reviewer) -> None:
        while not over.is_set():
            person.poll()
        person.poll()

    with ThreadPoolExecutor(4) as pool:
        polling = [pool.submit(poll, person) for person in people]
        given = [found for done in pool.map(work, people) for found in done]
        over.set()
        for one in polling:
            one.result()
    with closing(Journal(journal_url)) as journal:
        kept = [one.verdict_id for one in journal.verdicts.history()]
    assert sorted(kept) == sorted(given)
    for person in people:
        assert person.heard == kept
